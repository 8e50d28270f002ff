"""What the demo leaves behind: a JSON log and a figure."""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console

import fused_rl
from fused_rl.demo import ranks
from fused_rl.system import outputs

FIRST_STEPS = 5
LAST_FRACTION = 0.1

Record = dict[str, float]


class Panel(NamedTuple):
    """A curve of the figure: a field of the records by step."""

    key: str
    title: str
    unit: str
    colour: str


class Config(Protocol):
    """What a run depends on, a dataclass, and what of it is shown.

    Attributes:
        steps, seed, out, model: options of the command.
        panels: the curves of the figure, four.
        shown: fields of the records that the progress bar has, and how they are written.
        compares: whether the loss step is measured in the end.
    """

    steps: int
    seed: int
    out: str
    model: str | None
    panels: tuple[Panel, ...]
    shown: dict[str, str]
    compares: bool

    def prepared(self, console: Console) -> Iterator[Record]:
        """The steps of the run, once what they need is there."""


def summarise(records: list[Record]) -> dict[str, Any]:
    """Mean rewards of the first five steps and of the last tenth, None where there are none."""
    rewards = [record["reward"] for record in records]
    last = max(1, round(LAST_FRACTION * len(rewards)))
    return {
        "steps_done": len(rewards),
        "first_mean_reward": statistics.fmean(rewards[:FIRST_STEPS]) if rewards else None,
        "last_mean_reward": statistics.fmean(rewards[-last:]) if rewards else None,
        "seconds": sum(record["seconds"] for record in records),
    }


def write_log(
    path: Path, config: Any, records: list[Record], *, interrupted: bool, loss_step: Any = None
) -> dict[str, Any]:
    """Writes everything as JSON and returns it.

    Args:
        path: the file; its directory is made.
        config: a dataclass.
        records: one per step.
        interrupted: whether the run ended before its last step.
        loss_step: what compare_loss_steps returned, or None.
    """
    log = {
        "config": asdict(config),
        "versions": {
            "fused_rl": fused_rl.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "processes": ranks.world(),
        },
        "interrupted": interrupted,
        "summary": summarise(records),
        "loss_step": loss_step,
        "steps": records,
    }
    outputs.write_json(path, log)
    return log


def running_mean(values: list[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` neighbours on either side."""
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def write_figure(path: Path, records: list[Record], panels: tuple[Panel, ...]) -> None:
    """Four panels by step, as a PNG: each value, and a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [record["step"] for record in records]
    reach = len(steps) // 50
    for axes, (key, title, unit, colour) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = [record[key] for record in records]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values, reach), color=colour, linewidth=2)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=min([0.0, *values]))
        axes.margins(x=0.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with outputs.replacing(path) as partial:
        figure.savefig(partial, dpi=150)
