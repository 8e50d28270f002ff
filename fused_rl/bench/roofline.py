"""`fused-rl doctor --measure`: rates of this CPU, and where the time of each way goes.

    products = count * N H V / rate of the library's products      rest = time - products
    exponentials = count * N V / their rate                               - exponentials

Counts and measured rates give the parts, by arithmetic; the rest is what they leave of the measured
time: memory traffic, packing, threads that wait, the loss. It is negative where products run faster
there than in the loop that measured their rate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fused_rl import ops
from fused_rl.bench import rates
from fused_rl.bench.clock import interleaved, wall
from fused_rl.bench.peers import Case, Step, batch_of, no_grad, steps
from fused_rl.bench.rates import Group
from fused_rl.stats import IGNORE_INDEX

TOKENS, HIDDEN, VOCABULARY = 1024, 1024, 32768
# The first vocabulary that is tried, and how many times as large the next one is.
LEAST_VOCABULARY, STEP = 2048, 4
# Of all ways together: the most rounds after one that warms up, and for how long new ones begin. So
# many are to fit in.
ROUNDS, SECONDS, LEAST_ROUNDS = 7, 4.0, 2


class Way(NamedTuple):
    """nhv: the work that nobody is spared. products, exponentials: what is done, in N H V and N V.

    ours: the title in `bench.peers`. kept: whether that may be less, nhv and 1, where exponentials
    are kept in the place of logits.
    """

    title: str
    ours: str
    nhv: int
    products: int
    exponentials: int
    frozen: bool = False
    kept: bool = False

    def of(self, case: Case) -> Way:
        """With what is done at this shape."""
        if not self.kept or not ops.exponentials_fit(*_head_of(case)):
            return self
        return self._replace(products=self.nhv, exponentials=1)


def _head_of(case: Case) -> tuple[ops.Head, ops.Limits]:
    ones = torch.ones(len(case.labels))
    limits = ops.Limits(IGNORE_INDEX, ops.scratch_bytes(case.hidden.device, None))
    return ops.Head(case.hidden, case.weight, None, case.labels, ones, 1.0, 0.0), limits


AUTOGRAD, ONE_PASS = "fused_rl linear_logprobs", "fused_rl linear_policy_loss"
WAYS = (
    Way("no gradient", "fused_rl", 2, 2, 1),
    Way("step by autograd", AUTOGRAD, 6, 8, 2, kept=True),
    Way("step in one pass", ONE_PASS, 6, 6, 2, kept=True),
    Way("frozen head by autograd", AUTOGRAD, 4, 4, 1, frozen=True),
    Way("frozen head in one pass", ONE_PASS, 4, 4, 1, frozen=True),
)


class Speeds(NamedTuple):
    """Of all threads: FLOP/s of the multiply-adds and of the products, exponentials per second; 0:
    not known.
    """

    peak: float
    products: float
    exponentials: float


class Parts(NamedTuple):
    """Seconds."""

    products: float
    exponentials: float
    rest: float


def speeds(multiply_adds: Group, products: Group, exponentials: Group) -> Speeds:
    """The fastest unit; products in bfloat16, or in float32 where bfloat16 runs as that."""
    bfloat16, float32 = (rate.all for rate in products.rates)
    peak = max(rate.all for rate in multiply_adds.rates)
    return Speeds(peak, bfloat16 or float32, exponentials.rates[0].all)


def parts(way: Way, case: Case, seconds: float, known: Speeds) -> Parts | None:
    """Where the time goes; None if that is not known."""
    if not known.products:
        return None
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    way = way.of(case)
    of_products = way.products * N * H * V / known.products
    of_exponentials = way.exponentials * N * V / known.exponentials
    return Parts(of_products, of_exponentials, seconds - of_products - of_exponentials)


def share_of_peak(way: Way, case: Case, seconds: float, known: Speeds) -> float | None:
    """The work that nobody is spared, over what the CPU does in that time; None if not known."""
    work = way.nhv * case.hidden.numel() * case.weight.shape[0]
    return work / seconds / known.peak if known.peak else None


def calls(case: Case) -> dict[Way, Step]:
    """Each way, to be run."""
    batch = batch_of(case)
    found = no_grad(case, ())
    trained, frozen = (steps(case, batch, (), frozen=f) for f in (False, True))

    def kind(way: Way) -> dict[str, Step]:
        return found if way.nhv == 2 else frozen if way.frozen else trained

    return {way: kind(way)[way.ours] for way in WAYS}


def fits(V: int, round_seconds: float, available: float) -> bool:
    """Whether a vocabulary is small enough.

    Args:
        round_seconds: what all ways are expected to take with it, once each.
        available: bytes of memory, of which half may be taken.
    """
    # Weight, its noise and gradient, logits.
    needed = V * (8 * HIDDEN + 8 * TOKENS)
    return (LEAST_ROUNDS + 1) * round_seconds <= SECONDS and needed <= available / 2


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> float:
    """What can be had without swapping, by Linux; elsewhere infinite."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float("inf")


def fitting_case(bound: int) -> Case:
    """Inputs of the bench's shape, or of a smaller vocabulary where time or memory is short."""
    V = LEAST_VOCABULARY
    while True:
        case = Case.make(TOKENS, HIDDEN, min(V, bound), torch.bfloat16)
        if bound <= V:
            return case
        once = sum(min(t) for t in interleaved(calls(case), LEAST_ROUNDS, wall).values())
        if not fits(STEP * V, STEP * once, available_bytes()):
            return case
        V *= STEP


def timed(case: Case, seconds: float = SECONDS) -> dict[Way, float]:
    """Seconds of each way, the best of a few rounds."""
    until = time.perf_counter() + seconds
    found = interleaved(calls(case), ROUNDS, wall, enough=lambda: time.perf_counter() > until)
    return {way: min(of_way) for way, of_way in found.items()}


def lines(seconds: float = rates.SECONDS, bound: int = VOCABULARY) -> Iterator[str]:
    """What the command prints, line by line, as it is measured.

    Args:
        seconds: of each rate on each number of threads.
        bound: the largest vocabulary.
    """
    if ops.native_missing:
        yield f"no rates of the C++ library: {ops.native_missing}"
    count = torch.get_num_threads()
    yield row("best of short rounds", "1 thread", *([f"{count} threads"] if count > 1 else []))
    groups = []
    for group in rates.measured(seconds):
        groups.append(group)
        yield from of_group(group, count)
    multiply_adds, products, _, exponentials, _ = groups
    yield from of_ways(fitting_case(bound), speeds(multiply_adds, products, exponentials), count)


def of_group(group: Group, count: int) -> Iterator[str]:
    """Its title and its rates."""
    yield f"{group.title}, {group.unit}"
    for rate in group.rates:
        values = (rate.one, rate.all) if count > 1 else (rate.one,)
        yield row(f"  {rate.title}", *(number(v / group.scale) for v in values))


def of_ways(case: Case, known: Speeds, count: int) -> Iterator[str]:
    """A row for each way, and what the columns mean."""
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    yield f"each way in ms: N={N} H={H} V={V} bfloat16, threads: {count}"
    yield row("", "NHV", "done", "time", "products", "exp", "rest", "of peak")
    for way, seconds in timed(case).items():
        in_parts = parts(way, case, seconds, known) or (0.0, 0.0, 0.0)
        doing = way.of(case)
        done = f"{doing.products} + {doing.exponentials}"
        values = (number(1e3 * t) for t in (seconds, *in_parts))
        share = number(share_of_peak(way, case, seconds, known) or 0.0)
        yield row(f"  {way.title}", str(way.nhv), done, *values, share)
    yield "done: products of so many N H V + exponentials of so many N V"
    yield "products, exp: computed, from what is done and the library's rates above"
    yield "rest: time - products - exp"
    yield "of peak: NHV / time, over the fastest multiply-adds above"


def row(title: str, *cells: str) -> str:
    """A line of the tables."""
    return (f"{title:<28}" + "".join(f"{cell:>10}" for cell in cells)).rstrip()


def number(value: float) -> str:
    """Three digits or all before the point; a dash for what is not there."""
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}") if value else "-"
