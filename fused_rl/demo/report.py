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
    """A curve of the figure: a field of the records by step; and one beside it, in grey."""

    key: str
    title: str
    unit: str
    colour: str
    other: str | None = None


class Config(Protocol):
    """What a run depends on, a dataclass, and what of it is shown.

    Attributes:
        steps, seed, out, model: options of the command.
        panels: the curves of the figure, two in a row.
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
    """Panels by step, two in a row, as a PNG: each value, and a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(panels) // 2
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [record["step"] for record in records]
    reach = len(steps) // 50
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=True):
        curves = {panel.key: panel.colour} | ({panel.other: "#777777"} if panel.other else {})
        lowest = 0.0
        for key, colour in curves.items():
            values = [record[key] for record in records]
            lowest = min([lowest, *values])
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            mean = running_mean(values, reach)
            axes.plot(steps, mean, color=colour, linewidth=2, label=key.split("_")[-1])
        if panel.other:
            axes.legend(frameon=False)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.set_ylim(bottom=lowest)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with outputs.replacing(path) as partial:
        figure.savefig(partial, dpi=150)
