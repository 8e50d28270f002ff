"""Tasks, ours beside the peers, and who does them rightly.

Correctness comes first: a provider whose error is over ten times that of eager torch in the same
dtype is reported as wrong, and not timed. rounds.py times the others.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import fused_rl
from fused_rl import TokenBatch, TokenStats, reference
from fused_rl.bench.clock import spread
from fused_rl.bench.peers import (
    BETA,
    PEERS,
    ROWS,
    Case,
    Missing,
    Peer,
    batch_of,
    eager,
    no_grad,
    steps,
)
from fused_rl.bench.products import bare, factors
from fused_rl.bench.records import Record

GATE = 10  # times the error of eager torch
JUDGED_ROWS = 64
# The exact gradients are in float64 up to this N * H * V; beyond, in float32 for half precisions.
EXACT_WORK = 2**33


@dataclass(frozen=True)
class Kind:
    """What is measured of a head. nhv: its bare products. counted: the share of tokens under the
    loss.
    """

    title: str
    name: str
    nhv: int
    counted: float = 1.0
    frozen: bool = False


NO_GRAD = Kind("log-probs and entropy, no gradient", "linear_logprobs", 2)
STEP = Kind("GRPO step, head trained", "grpo_step", 6)
KINDS = (
    NO_GRAD,
    STEP,
    Kind("GRPO step, head frozen", "grpo_step_frozen", 4, frozen=True),
    Kind("GRPO step, half the tokens masked", "grpo_step_half", 6, counted=0.5),
)


def environment(device: str = "cpu") -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    of_device = next(b for b in fused_rl.backends() if b.device == device)
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_rl": fused_rl.__version__,
        "liger": installed("liger-kernel"),
        "trl": installed("trl"),
        "triton": installed("triton"),
        "backend": of_device._asdict(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judged_rows(N: int, rows: int = JUDGED_ROWS) -> Tensor:
    """Up to `rows` indices, evenly spread over N tokens."""
    return torch.arange(min(N, rows)) * N // min(N, rows)


def exact_stats(case: Case, rows: Tensor) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of the tokens `rows` of the case, in float64."""
    labels = case.labels[rows]
    ones = torch.ones(len(rows), dtype=torch.float64, device=labels.device)
    return reference.linear_logprobs(
        *(case.hidden[rows].double(), case.weight.double(), None, labels, ones, 1.0, 0.0)
    )[:2]


def largest_errors(stats: tuple[Tensor | None, ...], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Of log-probs and, where there are any, entropies."""
    given = [t for t in stats[:2] if t is not None]
    return [(a.double() - b).abs().max().item() for a, b in zip(given, exact, strict=False)]


def stats_errors(case: Case, stats: tuple[Tensor, Tensor | None], rows: Tensor) -> list[float]:
    """The largest errors of log-probs and, where there are any, entropies, against float64.

    stats: of the tokens `rows` of the case.
    """
    return largest_errors(stats, exact_stats(case, rows))


def step_gradients(case: Case, batch: TokenBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dhidden and dweight of the step in plain torch, in chunks of tokens, in the dtype given."""
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    pieces = zip(hidden.split(ROWS), case.labels.split(ROWS), strict=True)
    with torch.no_grad():
        parts = [eager(h, weight, labels) for h, labels in pieces]
    stats = TokenStats(*(torch.cat(t) for t in zip(*parts, strict=True)))
    logprobs = stats.logprobs.requires_grad_()
    loss = fused_rl.grpo(beta=BETA)(TokenStats(logprobs, stats.entropy), batch).loss
    (dlogprobs,) = torch.autograd.grad(loss, logprobs)
    return chunk_gradients(hidden, weight, case.labels, dlogprobs)


def chunk_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, dlogprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """dhidden and dweight from the gradient of the log-probs, in plain torch, in chunks of tokens;
    dweight in float32 or better.
    """
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for i in torch.arange(len(labels), device=hidden.device).split(ROWS):
        h, w = hidden[i].requires_grad_(), weight.detach().requires_grad_()
        chunk = eager(h, w, labels[i])[0]
        dhidden[i], dw = torch.autograd.grad(chunk, (h, w), dlogprobs[i])
        dweight += dw
    return dhidden, dweight


def gradient_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of the gradients, by norm; absolute where they are to be 0, as if
    no token counts. found: as many as there are.
    """
    pairs = [(a.to(b.dtype), b) for a, b in zip(found, exact, strict=False)]
    errors = [(a - b).norm().item() / (b.norm().item() or 1.0) for a, b in pairs]
    return max(errors) if all(e == e for e in errors) else float("nan")


@dataclass(frozen=True)
class Judge:
    """errors: those of a result, the first being the one to show. limits: what each may be."""

    errors: Callable[[tuple], list[float]]
    limits: list[float]

    def __call__(self, result: tuple) -> tuple[float, bool]:
        """The error, and whether all are within their limits. NaN is over every limit."""
        errors = self.errors(result)
        return errors[0], all(e <= limit for e, limit in zip(errors, self.limits, strict=False))


def stats_judge(case: Case) -> Judge:
    """Of log-probs and entropies, against eager torch's own error."""
    rows = judged_rows(len(case.labels)).to(case.labels.device)
    some = (case.hidden[rows], case.weight, case.labels[rows])

    def errors(result: tuple) -> list[float]:
        return stats_errors(case, tuple(None if t is None else t[rows] for t in result[:2]), rows)

    return Judge(errors, [GATE * e for e in stats_errors(case, eager(*some), rows)])


def step_judge(case: Case, batch: TokenBatch, frozen: bool) -> Judge:
    """Of dhidden and, unless frozen, dweight, against eager torch's own error."""
    dtype = case.hidden.dtype
    small = len(case.labels) * case.weight.numel() <= EXACT_WORK
    widest = torch.float64 if small or dtype == torch.float32 else torch.float32
    exact = step_gradients(case, batch, widest)[: 1 if frozen else 2]
    of_eager = gradient_error(step_gradients(case, batch, dtype), exact)
    return Judge(lambda result: [gradient_error(result[1:], exact)], [GATE * of_eager])


@dataclass(frozen=True)
class Task:
    """One thing to do, at one shape.

    fields: what every record of it says. ways: names of peers -> title -> call, ours among them.
    bare: title -> the work that nobody is spared; times are judged by the first, PRODUCTS.
    error: its name.
    """

    fields: Record
    device: torch.device
    ways: Callable[[tuple[str, ...]], dict[str, Callable[[], tuple]]]
    bare: dict[str, Callable[[], object]]
    judge: Judge
    error: str


def head_task(case: Case, kind: Kind) -> Task:
    """A kind of work of the head."""
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    common = {"case": kind.title, "name": kind.name, "nhv": kind.nhv}
    common |= {"tokens": N, "hidden": H, "vocabulary": V, "dtype": dtype_name(case.hidden)}
    products = bare(factors(case.hidden, case.weight, kind.nhv))
    if kind == NO_GRAD:
        ways = partial(no_grad, case)
        return Task(common, case.hidden.device, ways, products, stats_judge(case), "logprob_error")
    batch = batch_of(case, kind.counted)
    common["counted_tokens"] = int(batch.num_tokens)
    judge = step_judge(case, batch, kind.frozen)
    ways = partial(steps, case, batch, frozen=kind.frozen)
    return Task(common, case.hidden.device, ways, products, judge, "gradient_error")


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def judged(task: Task, run: Callable[[], tuple]) -> Record:
    """verdict: "right", "wrong" or "failed", with the error or the reason."""
    try:
        error, within = task.judge(run())
    # Whatever a peer raises, the others are still to be measured.
    except Exception as failure:
        note = str(failure).split("\n")[0][:200] or type(failure).__name__
        return {"verdict": "failed", "note": note}
    return {"verdict": "right" if within else "wrong", task.error: error}


def times(seconds: list[float], base: list[float]) -> Record:
    """Median and spread of the times and of their ratios to those of the bare work."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    found = {"seconds_best": min(seconds)}
    for name, values in (("seconds", seconds), ("ratio", ratios)):
        low, median, high = spread(values)
        middle = "seconds_median" if name == "seconds" else "ratio_to_products"
        found |= {middle: median, f"{name}_p20": low, f"{name}_p80": high}
    return found


def usable(
    names: tuple[str, ...], device: str = "cpu", peers: dict[str, Peer] = PEERS
) -> tuple[tuple[str, ...], list[str]]:
    """The peers that are to be had here, and why the others are not."""
    found, reasons = [], []
    for name in names:
        if name not in peers:
            reasons.append(f"{PEERS[name].title}: has nothing of the kind")
            continue
        peer = peers[name]
        try:
            if peer.stats:
                peer.load(device)
            else:
                peer.check(device)
            found.append(name)
        except Missing as missing:
            reasons.append(str(missing))
    return tuple(found), reasons
