"""What the library must choose by measurement: each way's time and error at the sizes in question.

    products      each product of a step, with its own result: TFLOP/s
    row kernels   columns of a block, warps of a program: GB/s beside a copy's
    chunks        tokens of a chunk in the one pass; bytes of the logits in the two
    graph         a step replayed from a CUDA graph is the step, within a rounding of its results

The forwards have a file of their own, forwards.py. Settings of the library are replaced for the
time of a measurement, and put back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import grpo, linear_logprobs, ops
from fused_rl.bench.clock import Clock, Timing, interleaved
from fused_rl.bench.peers import BETA, Case, batch_of, gradients, steps
from fused_rl.bench.records import OURS, Record
from fused_rl.bench.tasks import gradient_error

Call = Callable[[], Any]

# Ends the names of ours with kernels that are off by default.
UNPROVEN = ", unproven"
LOSS_ERROR = 1e-5  # of a loss in float32, whose terms are near 1


class Sizes(NamedTuple):
    """What is tried: on a GPU, or (SMALL) to see that trying works."""

    tokens: tuple[int, ...]  # of the forwards
    tiles: tuple[tuple[int, int], ...]  # tokens x vocabulary, in L2
    # block_m, block_n, block_k, num_warps, num_stages: beside those of the kernels' own table
    fused: tuple[tuple[int, ...], ...]
    rows: int  # of logits
    blocks: tuple[tuple[int, int], ...]  # columns, warps of the row kernels
    chunks: tuple[int, ...]  # tokens
    scratch: tuple[int, ...]  # bytes


LARGE = Sizes(
    tokens=(64, 512, 2048, 8192),
    tiles=((4096, 2048), (2048, 4096), (1024, 8192), (2048, 8192), (4096, 4096)),
    fused=(
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 3),
    ),
    rows=1024,
    blocks=((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)),
    chunks=(256, 512, 768, 1024, 1536, 2048, 4096, 8192),
    scratch=(2**28, 2**29, 2**30, 2**31, 2**32),
)
SMALL = Sizes(
    tokens=(8, 16),
    tiles=((16, 64), (8, 128)),
    fused=((16, 64, 16, 4, 2),),
    rows=4,
    blocks=((64, 4), (128, 4)),
    chunks=(8,),
    scratch=(2**14,),
)


@contextmanager
def replaced(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name, value): attributes that have these values within the block."""
    with ExitStack() as stack:
        for owner, name, value in settings:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def with_unproven(ways: dict[str, Call]) -> dict[str, Call]:
    """The ways, and each of ours once more with the kernels that are off by default."""
    ours = {name: run for name, run in ways.items() if name.startswith(OURS)}
    return ways | {name + UNPROVEN: unproven(run) for name, run in ours.items()}


def unproven(run: Call) -> Call:
    """run() with kernels, too, that have no proof yet. What first uses have shown stays known."""
    from fused_rl.ops import trust

    def with_them() -> Any:
        with replaced((trust, "_options", trust.Options(unproven=True))):
            return run()

    return with_them


def timed(runs: dict[str, Call], rounds: int, clock: Clock, **common: Any) -> Iterator[Record]:
    """A record for each; those that fail say why. The first is what the others are compared to."""
    working, failed = {}, {}
    for name, run in runs.items():
        try:
            run()
            working[name] = run
        # A tile may not compile, or not fit: that is a result.
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    taken = interleaved(working, rounds, clock.timing)
    base = next(iter(runs))
    for name in runs:
        if name in failed:
            yield {**common, "way": name, "failed": failed[name]}
            continue
        seconds = [t.seconds for t in taken[name]]
        ratios = [a / b.seconds for a, b in zip(seconds, taken[base], strict=True)]
        yield {
            **common,
            "way": name,
            "ms_best": min(seconds) * 1e3,
            "ms_median": statistics.median(seconds) * 1e3,
            "host_ms": host_ms(taken[name]),
            "ratio": statistics.median(ratios),
        }


def host_ms(taken: list[Timing]) -> float:
    """Milliseconds until the call returned, the median. As long as the device's: it is bound by its
    launches, or waits for the device within.
    """
    return statistics.median(t.host for t in taken) * 1e3


def products_of(case: Case, sizes: Sizes, rounds: int, clock: Clock) -> list[Record]:
    """The products that a step is made of, in chunks of tokens: fp32 logits, dhidden, dweight."""
    (N, H), V = case.hidden.shape, case.weight.shape[0]
    records = []
    for count in (c for c in sizes.chunks if c <= N):
        runs = _products(case.hidden[:count], case.weight)
        for record in timed(runs, rounds, clock, tokens=count):
            if "failed" not in record:
                record["TFLOP_per_s"] = 2 * count * H * V / record["ms_median"] / 1e9
            records.append(record)
    return records


def _products(hidden: Tensor, weight: Tensor) -> dict[str, Call]:
    from fused_rl.kernels.linear_gradients import add_product_, product

    shape = (hidden.shape[0], weight.shape[0])
    draw = torch.randn(shape, device=hidden.device).to(hidden.dtype)
    logits, total = torch.empty(shape, device=hidden.device), weight.float()
    dweight = torch.empty_like(weight)
    return {
        "logits, half": lambda: hidden @ weight.T,
        "logits, fp32": lambda: product(hidden, weight.T, logits),
        "dhidden, half": lambda: draw @ weight,
        "dhidden, fp32": lambda: product(draw, weight),
        "dweight, half": lambda: torch.mm(draw.T, hidden, out=dweight),
        "dweight, fp32 added": lambda: add_product_(total, draw.T, hidden),
    }


def row_kernels(
    V: int, sizes: Sizes, device: Any, of: torch.device, rounds: int, clock: Clock
) -> list[Record]:
    """GB/s of the row kernels on logits in float32; the gradient is in bfloat16. First the copy."""
    from fused_rl.kernels import logprobs

    N = sizes.rows
    raw = torch.randn(N, V, device=of)
    labels = torch.randint(0, V, (N,), device=of)
    ones, draw = torch.ones(N, device=of), torch.empty(N, V, dtype=torch.bfloat16, device=of)
    head = (raw, None, labels, ones, 1.0, 0.0, 0, -1)
    entropy, lse = logprobs.fwd(*head, device.multiprocessors)[1:3]
    target = torch.empty_like(raw)
    runs, moved = {"copy": lambda: target.copy_(raw)}, {"copy": 8}
    for block, warps in sizes.blocks:
        settings = ((logprobs, "BLOCK_V", block), (logprobs, "NUM_WARPS", warps))

        def forward(settings=settings) -> None:
            with replaced(*settings):
                logprobs.fwd(*head, device.multiprocessors)

        def backward(settings=settings) -> None:
            with replaced(*settings):
                logprobs.bwd(ones, ones, *head, lse, entropy, draw)

        for name, run, per_logit in (("statistics", forward, 4), ("gradient", backward, 6)):
            title = f"{name}, {block} columns, {warps} warps"
            runs[title], moved[title] = run, per_logit
    records = list(timed(runs, rounds, clock, tokens=N))
    for record in records:
        if "failed" not in record:
            bytes_moved = moved[record["way"]] * N * V
            record["GB_per_s"] = bytes_moved / record["ms_median"] / 1e6
    return records


def chunks(case: Case, sizes: Sizes, rounds: int, clock: Clock) -> list[Record]:
    """The GRPO step in chunks of each size. The first way is the library's own choice."""
    batch, loss = batch_of(case), grpo(beta=BETA)
    N = len(case.labels)
    records = []
    for frozen in (False, True):
        own = steps(case, batch, (), frozen)["fused_rl linear_policy_loss"]
        runs = {"as chosen": own}
        for count in (c for c in sizes.chunks if c <= N):

            def one_pass(own=own, count=count) -> tuple[Tensor, ...]:
                forced = (ops, "one_pass_pays", lambda *_: True)
                with replaced(forced, (ops, "chunk_tokens", lambda *_: count)):
                    return own()

            runs[f"one pass, chunks of {count}"] = one_pass
        records += _chunk_records(runs, rounds, clock, frozen)

    def two_passes(scratch: int | None) -> tuple[Tensor, ...]:
        hidden, weight = case.leaves()
        stats = linear_logprobs(hidden, weight, case.labels, chunk_bytes=scratch)
        return gradients(loss(stats, batch).loss, (hidden, weight))

    runs = {"two passes": lambda: two_passes(None)}
    for scratch in sizes.scratch:
        runs[f"two passes, {scratch} bytes"] = lambda scratch=scratch: two_passes(scratch)
    return [*records, *_chunk_records(runs, rounds, clock, False)]


def _chunk_records(
    runs: dict[str, Call], rounds: int, clock: Clock, frozen: bool
) -> Iterator[Record]:
    exact = next(iter(runs.values()))()
    for record in timed(runs, rounds, clock, frozen=frozen):
        if "failed" not in record:
            found = runs[record["way"]]()
            record["difference"] = gradient_error(found[1:], exact[1:])
        yield record


def graph(case: Case) -> list[Record]:
    """A step in a CUDA graph: captured, replayed on new numbers, and compared with the eager one.

    A graph multiplies all rows, the eager step those that have a gradient: sums of fp32 products in
    another order, so that results in half precision may differ by a rounding. Without a GPU the
    step runs twice, and only that is compared.
    """
    # A copy: the numbers change under the graph.
    case = Case(case.hidden.clone(), case.weight, case.labels)
    batch, loss = batch_of(case), grpo(beta=BETA)
    hidden, weight = case.leaves()
    other = hidden.detach().roll(1, 0)

    def step() -> tuple[Tensor, ...]:
        stats = linear_logprobs(hidden, weight, case.labels)
        return gradients(loss(stats, batch).loss, (hidden, weight))

    try:
        replay = captured(step) if hidden.is_cuda else step
    except RuntimeError as error:
        return [{"way": "linear_logprobs and grpo", "failed": str(error).splitlines()[0]}]
    with torch.no_grad():
        hidden.copy_(other)
    found, expected = replay(), step()
    return [
        {
            "way": "linear_logprobs and grpo",
            "captured": hidden.is_cuda,
            "equal": all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)),
            "within_an_ulp": abs(found[0] - expected[0]).item() <= LOSS_ERROR
            and all(within_an_ulp(a, b) for a, b in zip(found[1:], expected[1:], strict=True)),
            "difference": gradient_error(found[1:], expected[1:]),
        }
    ]


def within_an_ulp(found: Tensor, expected: Tensor) -> bool:
    """Whether the difference is a last place of each number's own, or one of the smallest that
    counts: an element that cancels is as exact as its terms, 1e-3 of the usual one in size.
    """
    a, b = found.double(), expected.double()
    ulp = torch.finfo(expected.dtype).eps * b.abs()
    floor = torch.finfo(expected.dtype).eps * 1e-3 * b.abs().mean()
    return bool(((a - b).abs() <= torch.maximum(ulp, floor)).all())


def captured(step: Call) -> Call:
    """step from a graph. It ran on a stream of its own first, so that all that is lazy is there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        results = step()

    def replay() -> tuple[Tensor, ...]:
        recorded.replay()
        return results

    return replay
