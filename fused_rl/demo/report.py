"""What the demo leaves behind: a JSON log, a figure, and the table of the loss step.

The table compares two ways to the same loss and gradients, at the vocabulary of a real model:
ours, and plain torch with its [N, V] logits. Each runs in a process of its own, so that memory that
one has freed is not lent to the other; `python -m fused_rl.demo.report WAY N H V` is that process.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import fused_rl
from fused_rl import LossOutput, TokenBatch, TokenStats, grpo, linear_policy_loss
from fused_rl.system import children, outputs

if TYPE_CHECKING:
    from rich.console import Console

TOKENS, HIDDEN, VOCABULARY = 1024, 512, 151936
DTYPE = torch.bfloat16
REPEATS = 3
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


def plain_policy_loss(
    hidden: torch.Tensor, weight: torch.Tensor, batch: TokenBatch, loss: Any
) -> LossOutput:
    """The loss by way of [N, V] logits. Entropy is only logged, so it is spared a gradient."""
    log_p = F.log_softmax(F.linear(hidden, weight).float(), -1)
    logprobs = log_p.gather(-1, batch.labels[:, None])[:, 0]
    with torch.no_grad():
        entropy = log_p.exp().mul_(log_p).sum(-1).neg_()
    return loss(TokenStats(logprobs, entropy), batch)


WAYS: dict[str, Callable[..., LossOutput]] = {
    "fused_rl": linear_policy_loss,
    "plain torch": plain_policy_loss,
}


def loss_step(way: str, tokens: int, hidden_size: int, vocabulary: int) -> Callable[[], float]:
    """A function that forms the loss and all its gradients once, and returns the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(DTYPE).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=generator).div_(hidden_size**0.5)
    weight = weight.to(DTYPE).requires_grad_()
    batch = TokenBatch.packed(
        torch.randint(vocabulary, (tokens,), generator=generator),
        torch.tensor([0, tokens]),
        torch.randn(tokens, generator=generator),
        ref_logprobs=torch.full((tokens,), -12.0),
    )
    loss = grpo(beta=0.02)

    def step() -> float:
        output = WAYS[way](hidden, weight, batch, loss)
        output.loss.backward()
        hidden.grad = weight.grad = None
        return float(output.loss.detach())

    return step


def measure(step: Callable[[], float]) -> dict[str, float | None]:
    """Loss, seconds, and bytes of memory at the peak beyond those held before."""
    gc.collect()
    before = resident_bytes("VmRSS", reset_peak=True)
    began = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - began
    peak = resident_bytes("VmHWM")
    return {
        "loss": loss,
        "seconds": seconds,
        "peak_bytes": None if before is None or peak is None else max(0, peak - before),
    }


def resident_bytes(field: str, *, reset_peak: bool = False) -> int | None:
    """VmRSS (now) or VmHWM (the peak since its reset) of this process; None without /proc."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def serve(way: str, *sizes: str) -> None:
    """After a step to warm up, one JSON object on stdout per line on stdin: a step, measured."""
    step = loss_step(way, *map(int, sizes))
    measure(step)
    for _ in sys.stdin:
        print(json.dumps(measure(step)), flush=True)


def compare_loss_steps(
    tokens: int = TOKENS, hidden_size: int = HIDDEN, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """Medians of each way's measurements, taken in turn."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    sizes = [str(n) for n in (tokens, hidden_size, vocabulary)]
    with ExitStack() as stack:
        measured = {}
        for way in WAYS:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
            measured[way] = stack.enter_context(
                subprocess.Popen(
                    **children.python("-m", "fused_rl.demo.report", way, *sizes),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            stack.callback(measured[way].kill)
            _ask(measured[way])
        for _ in range(REPEATS):
            for way, child in measured.items():
                runs[way].append(_ask(child))
    return {
        "tokens": tokens,
        "hidden_size": hidden_size,
        "vocabulary": vocabulary,
        "dtype": str(DTYPE).removeprefix("torch."),
        "ways": {way: _median(results) for way, results in runs.items()},
    }


def _ask(child: subprocess.Popen) -> dict[str, Any]:
    child.stdin.write("\n")
    child.stdin.flush()
    if line := child.stdout.readline():
        return json.loads(line)
    raise RuntimeError(f"{child.args} ended with status {child.wait()} while it was measured")


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [result[key] for result in results] for key in results[0]}
    return {
        key: None if None in values else statistics.median(values)
        for key, values in columns.items()
    }


def print_comparison(console: "Console", comparison: dict[str, Any]) -> None:
    """What compare_loss_steps returned, as a table."""
    from rich.table import Column, Table

    table = Table("", *(Column(n, justify="right") for n in ("time", "peak memory", "loss")))
    for way, result in comparison["ways"].items():
        peak = result["peak_bytes"]
        memory = "n/a" if peak is None else f"{peak / 2**20:.0f} MiB"
        table.add_row(way, f"{1e3 * result['seconds']:.0f} ms", memory, f"{result['loss']:.5f}")
    shape = "N = {tokens} tokens, H = {hidden_size}, V = {vocabulary}, {dtype}"
    console.print(f"The loss and its gradients, {shape.format(**comparison)}:")
    console.print(table)


if __name__ == "__main__":
    serve(*sys.argv[1:])
