"""What the demo leaves behind: a JSON log and a figure."""

import statistics
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fused_rl
from fused_rl.system import outputs

FIRST_STEPS = 5
LAST_FRACTION = 0.1

Record = dict[str, float]


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


def write_figure(path: Path, records: list[Record], kl: str) -> None:
    """Reward, KL, entropy and clip fraction by step, as a PNG: each value, and a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("reward", "Reward", "mean of the step's answers", "#2a6fbb"),
        ("kl", f"KL to the initial model ({kl})", "nats per token", "#c8553d"),
        ("entropy", "Entropy of the policy", "nats per token", "#3a8f5c"),
        ("clip_fraction", "Clip fraction", "share of tokens", "#7a5ba8"),
    )
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
