"""The loss step, ours beside plain torch with its [N, V] logits, at the vocabulary of a real model.

Each way runs in a process of its own, so that memory that one has freed is not lent to the other;
`python -m fused_rl.demo.comparison WAY N H V` is that process.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fused_rl import LossOutput, TokenBatch, TokenStats, grpo, linear_policy_loss
from fused_rl.bench.clock import Clock, peak_extra_bytes
from fused_rl.system import children

if TYPE_CHECKING:
    from rich.console import Console

TOKENS, HIDDEN, VOCABULARY = 1024, 512, 151936
DTYPE, DEVICE = torch.bfloat16, "cpu"
REPEATS = 3


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
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=noise).to(DTYPE).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=noise).div_(hidden_size**0.5)
    weight = weight.to(DTYPE).requires_grad_()
    batch = TokenBatch.packed(
        torch.randint(vocabulary, (tokens,), generator=noise),
        torch.tensor([0, tokens]),
        torch.randn(tokens, generator=noise),
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
    clock, losses, seconds = Clock(DEVICE), [], []

    def timed() -> None:
        seconds.append(clock(lambda: losses.append(step())))

    peak = peak_extra_bytes(timed, DEVICE)
    return {"loss": losses[0], "seconds": seconds[0], "peak_bytes": peak}


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
                    **children.python("-m", "fused_rl.demo.comparison", way, *sizes),
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
