"""Time, memory and error of the head, ours beside the peers: `fused-rl bench`.

Every figure can be trusted on a noisy machine: providers run in turns, in one process, with the
bare matrix products of the same shape and dtype, and a time is judged by its ratio to theirs in the
same round. Correctness comes first: a provider whose error is over ten times that of eager torch in
the same dtype is reported as wrong, and not timed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_rl
from fused_rl import TokenBatch, TokenStats, bench_report, reference
from fused_rl.bench_clock import Clock, interleaved, peak_extra_bytes, spread
from fused_rl.bench_peers import (
    BETA,
    PEERS,
    ROWS,
    SEQUENCES,
    Case,
    Missing,
    batch_of,
    eager,
    no_grad,
    products,
    steps,
)

GATE = 10  # times the error of eager torch
JUDGED_ROWS = 64
# The exact gradients are in float64 up to this N * H * V; beyond, in float32 for half precisions.
EXACT_WORK = 2**33

Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What is measured. nhv: its bare products. counted: the share of tokens under the loss."""

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


@dataclass(frozen=True)
class BenchConfig:
    """What to run: sizes, dtype and device by name, names in PEERS, timed rounds, directory."""

    tokens: int = 1024
    hidden: int = 1024
    vocabulary: int = 32768
    dtype: str = "bfloat16"
    device: str = "cpu"
    peers: tuple[str, ...] = ("eager",)
    rounds: int = 7
    sweep: bool = False
    out: str = "out/bench"

    def __post_init__(self) -> None:
        if self.tokens % SEQUENCES:
            raise ValueError(f"tokens must be a multiple of {SEQUENCES}, got {self.tokens}")
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise ValueError(f"peers must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no device of the kind")


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


def stats_errors(case: Case, stats: tuple[Tensor, Tensor | None], rows: Tensor) -> list[float]:
    """The largest errors of log-probs and, where there are any, entropies, against float64.

    stats: of the tokens `rows` of the case.
    """
    labels = case.labels[rows]
    ones = torch.ones(len(rows), dtype=torch.float64, device=labels.device)
    exact = reference.linear_logprobs(
        *(case.hidden[rows].double(), case.weight.double(), None, labels, ones, 1.0, 0.0)
    )
    given = [t for t in stats[:2] if t is not None]
    return [(a.double() - b).abs().max().item() for a, b in zip(given, exact[:2], strict=False)]


def step_gradients(case: Case, batch: TokenBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dhidden and dweight of the step in plain torch, in chunks of tokens, in the dtype given."""
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    pieces = list(torch.arange(len(case.labels), device=hidden.device).split(ROWS))
    with torch.no_grad():
        parts = [eager(hidden[i], weight, case.labels[i]) for i in pieces]
    stats = TokenStats(*(torch.cat(t) for t in zip(*parts, strict=True)))
    logprobs = stats.logprobs.requires_grad_()
    loss = fused_rl.grpo(beta=BETA)(TokenStats(logprobs, stats.entropy), batch).loss
    (dlogprobs,) = torch.autograd.grad(loss, logprobs)
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    for i in pieces:
        h, w = hidden[i].requires_grad_(), weight.detach().requires_grad_()
        chunk = eager(h, w, case.labels[i])[0]
        dhidden[i], dw = torch.autograd.grad(chunk, (h, w), dlogprobs[i])
        dweight += dw
    return dhidden, dweight


def gradient_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of the gradients, by norm. found: as many as there are."""
    pairs = [(a.to(b.dtype), b) for a, b in zip(found, exact, strict=False)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return max(errors) if all(e == e for e in errors) else float("nan")


class Judge:
    """The error of a provider's results, and whether eager torch does so well."""

    def __init__(self, case: Case, kind: Kind, batch: TokenBatch | None) -> None:
        self.case, self.batch = case, batch
        self.key = "logprob_error" if batch is None else "gradient_error"
        if batch is None:
            self.rows = judged_rows(len(case.labels)).to(case.labels.device)
            some = (case.hidden[self.rows], case.weight, case.labels[self.rows])
            self.limits = [GATE * e for e in stats_errors(case, eager(*some), self.rows)]
            return
        dtype = case.hidden.dtype
        small = len(case.labels) * case.weight.numel() <= EXACT_WORK
        exact = torch.float64 if small or dtype == torch.float32 else torch.float32
        wanted = slice(0, 1) if kind.frozen else slice(0, 2)
        self.exact = step_gradients(case, batch, exact)[wanted]
        self.limits = [GATE * gradient_error(step_gradients(case, batch, dtype), self.exact)]

    def __call__(self, result: tuple[Tensor | None, ...]) -> tuple[float, bool]:
        """The error, and whether it is within the limits."""
        if self.batch is not None:
            errors = [gradient_error(result[1:], self.exact)]
        else:
            picked = tuple(None if t is None else t[self.rows] for t in result[:2])
            errors = stats_errors(self.case, picked, self.rows)
        # NaN is over every limit.
        within = all(e <= limit for e, limit in zip(errors, self.limits, strict=False))
        return errors[0], within


def measure(
    case: Case, kind: Kind, peers: tuple[str, ...], rounds: int, tick: Callable[[], None]
) -> Iterator[Record]:
    """One record for the bare products and for each provider; tick() after each step of the way."""
    device = case.hidden.device
    batch = None if kind == NO_GRAD else batch_of(case, kind.counted)
    providers = no_grad(case, peers) if batch is None else steps(case, batch, peers, kind.frozen)
    judge = Judge(case, kind, batch)
    verdicts = {}
    for title, run in providers.items():
        verdicts[title] = _judged(judge, run)
        tick()
    right = {title: providers[title] for title, v in verdicts.items() if v["verdict"] == "right"}
    base = bench_report.PRODUCTS
    runs = {base: products(case, kind.nhv), **right}
    seconds = interleaved(runs, rounds, Clock(device), tick)
    common = {"case": kind.title, "nhv": kind.nhv, **_shape(case)}
    yield {**common, "provider": base, "verdict": "right", **_times(seconds[base], seconds[base])}
    for title, verdict in verdicts.items():
        record = {**common, "provider": title, **verdict}
        if title in right:
            record |= _times(seconds[title], seconds[base])
            record["peak_extra_bytes"] = peak_extra_bytes(right[title], device)
        yield record


def _judged(judge: Judge, run: Callable[[], tuple]) -> Record:
    try:
        error, within = judge(run())
    except (RuntimeError, MemoryError) as failure:
        return {"verdict": "failed", "note": str(failure).split("\n")[0][:200]}
    return {"verdict": "right" if within else "wrong", judge.key: error}


def _shape(case: Case) -> Record:
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    dtype = str(case.hidden.dtype).removeprefix("torch.")
    return {"tokens": N, "hidden": H, "vocabulary": V, "dtype": dtype}


def _times(seconds: list[float], base: list[float]) -> Record:
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    found = {"seconds_best": min(seconds)}
    for name, values in (("seconds", seconds), ("ratio", ratios)):
        low, median, high = spread(values)
        middle = "seconds_median" if name == "seconds" else "ratio_to_products"
        found |= {middle: median, f"{name}_p20": low, f"{name}_p80": high}
    return found


def usable(names: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The peers that are to be had here, and why the others are not."""
    found, reasons = [], []
    for name in names:
        peer = PEERS[name]
        try:
            peer.load() if peer.stats else peer.check()
            found.append(name)
        except Missing as missing:
            reasons.append(str(missing))
    return tuple(found), reasons


def shapes(config: BenchConfig) -> list[tuple[int, int]]:
    """N and V of what is measured beside the shape asked for: halves of N, then of V."""
    if not config.sweep:
        return []
    sizes = [(max(8, config.tokens // k // 8 * 8), config.vocabulary) for k in (8, 4, 2)]
    return sizes + [(config.tokens, max(8, config.vocabulary // k)) for k in (8, 4, 2)]


def run(config: BenchConfig) -> int:
    """Measures, shows and writes; 1 if one of our ways is wrong or fails, else 0."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=118)
    peers, reasons = usable(config.peers)
    for reason in reasons:
        console.print(f"left out: {reason}")
    config = replace(config, peers=peers)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        records = list(collect(config, progress))
    content = {
        "environment": environment(config.device),
        "shape": asdict(config),
        "records": records,
    }
    bench_report.show(console, content)
    for path in bench_report.write(Path(config.out), content):
        console.print(f"written to {path}")
    ours = [r for r in records if r["provider"].startswith(bench_report.OURS)]
    return int(any(r["verdict"] != "right" for r in ours))


def collect(config: BenchConfig, progress: Any) -> Iterator[Record]:
    """The records of all shapes and kinds."""
    task = progress.add_task("", total=None)
    dtype = getattr(torch, config.dtype)
    first = (config.tokens, config.vocabulary)
    for N, V in dict.fromkeys([first, *shapes(config)]):
        case = Case.make(N, config.hidden, V, dtype, config.device)
        for kind in KINDS if first == (N, V) else (NO_GRAD, STEP):
            total = len(config.peers) + 2 + config.rounds
            progress.reset(task, total=total, description=f"N={N} V={V}: {kind.title}")
            yield from measure(
                case, kind, config.peers, config.rounds, lambda: progress.advance(task)
            )
        del case
    progress.remove_task(task)
