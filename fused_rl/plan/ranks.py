"""A head and its step over R ranks, in every way of spreading it: what one rank holds and receives.

              tokens             rows: weight    dweight    optimizer    moved in a step
    ddp       its own            V               V          V            dweight twice
    zero-1    its own            V               V          V / R        dweight, weight
    zero-2    its own            V               V          V / R        dweight, weight
    zero-3    its own            V + V / R       V          V / R        dweight, weight twice
    fsdp      its own            V + V / R       V          V / R        dweight, weight
    tp        the same on all    V / R           V / R      V / R        statistics, dhidden
    tokens    everybody's        V / R           V / R      V / R        statistics, dhidden, hidden

In tp and tokens no rank ever has the whole head. Where a step has several micro-batches, ddp,
zero-1 and "fsdp, once a step" keep the whole gradient until its end; zero-2, zero-3 and "fsdp, each
micro-batch" reduce it each time, and keep their rows of it.

Volumes of ZeRO's stages are those of its paper (Rajbhandari et al., 2020, section 7).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_rl.plan import forecast, traffic
from fused_rl.plan.config import size
from fused_rl.plan.memory import Parts, Plan, Way, one_pass, plan, sizes_of
from fused_rl.plan.time import Times, ceil

# Of AdamW for a number of the weight: two moments, and a copy of a half precision, in float32.
MOMENTS, COPY = 8, 4


class Group(NamedTuple):
    """R ranks, the micro-batches of a step, and the dtype that dweight is added up in over both."""

    world: int
    micro_batches: int
    reduce_dtype: torch.dtype


class Rank(NamedTuple):
    """One rank in a step.

    tokens: of all ranks. memory: the phases of Way, with what is there beside the head's own parts.
    received: bytes by what they are of, the rank's own part among them. local: what the rank
    computes of a micro-batch, as a plan. break_even: active tokens of all ranks in a step, at most,
    that travel for no more than the way moves; None where it moves tokens itself.
    """

    name: str
    tokens: int
    memory: Way
    received: Parts
    local: Plan
    break_even: int | None = None


class _Data(NamedTuple):
    """A way in which every rank has tokens of its own.

    weight, kept, optimizer: rows of the weight, of the gradient that is kept between micro-batches,
    and of the optimizer. gathers, reductions: of the weight and of dweight in a step; an all-reduce
    moves as much as two reductions.
    """

    name: str
    weight: int
    kept: int
    optimizer: int
    gathers: int
    reductions: int


def _data_parallel(V: int, group: Group) -> dict[str, list[_Data]]:
    M, part = group.micro_batches, ceil(V, group.world)
    both = V + part
    once = _Data("fsdp" if M == 1 else "fsdp, once a step", both, V, part, 1, 1)
    each = _Data("fsdp, each micro-batch", both, part, part, M, M)
    return {
        "ddp": [_Data("ddp", V, V, V, 0, 2)],
        "zero-1": [_Data("zero-1", V, V, part, 1, 1)],
        "zero-2": [_Data("zero-2", V, part, part, 1, M)],
        "zero-3": [_Data("zero-3", both, part, part, 2 * M, M)],
        "fsdp": [once, each][: min(M, 2)],
    }


NAMES = (*_data_parallel(1, Group(1, 1, torch.float32)), "tp", "tokens")


def ranks(planned: Plan, group: Group, names: tuple[str, ...] = NAMES) -> list[Rank]:
    """A rank in each of these ways.

    Args:
        planned: the whole head, and the tokens of a micro-batch: each rank's own, in tp the same.
        names: of NAMES.

    Raises:
        ValueError: fewer than two ranks, no micro-batches, or more of either than can be counted.
    """
    size("micro-batches", group.micro_batches)
    if size("world", group.world) < 2:
        raise ValueError(f"world must be at least 2, got {group.world}")
    ways = {
        name: [_with_own_tokens(planned, group, data) for data in found]
        for name, found in _data_parallel(planned.vocabulary, group).items()
    }
    if "tp" in names:
        ways["tp"] = _vocabulary_parallel(planned, group)
    if "tokens" in names:
        ways["tokens"] = [_travelling(planned, group)]
    return [rank for name in NAMES if name in names for rank in ways[name]]


def head_times(rank: Rank, group: Group) -> Times | None:
    """Predicted milliseconds of the head in a step; None where the card or precision has none."""
    found = forecast.predicted(rank.local).get("linear_policy_loss")
    return found and Times(*(t * group.micro_batches for t in found))


def _with_own_tokens(p: Plan, group: Group, data: _Data) -> Rank:
    """The whole head at the rank's tokens, and what keeps its copies alike."""
    held = _held(p, group, data.weight, data.kept, data.optimizer)
    step = p.ways[-1]
    phases = {name: _sum(parts, held) for name, parts in step.phases.items()}
    elements, reduced = p.vocabulary * p.hidden, group.reduce_dtype.itemsize
    if not p.frozen:
        whole = held["dweight"] and data.kept == p.vocabulary
        # An engine reduces a copy of the gradient, in buckets or whole.
        copy = elements * (reduced + (0 if whole else p.dtype.itemsize))
        phases["reduce"] = _sum(held, {"dweight": copy})
    # A weight that is whole everywhere is gathered only after its update.
    gathers = 0 if p.frozen and data.weight == p.vocabulary else data.gathers
    of_matrix = (p.vocabulary, p.hidden, group.world)
    received = {
        "weight": gathers * traffic.weight_bytes(*of_matrix, p.dtype.itemsize),
        "dweight": (not p.frozen) * data.reductions * traffic.weight_bytes(*of_matrix, reduced),
    }
    tokens = group.micro_batches * group.world * p.tokens
    bound = traffic.break_even(sum(received.values()), p.hidden, p.dtype.itemsize)
    return Rank(data.name, tokens, step._replace(phases=phases), received, p, bound)


def _vocabulary_parallel(p: Plan, group: Group) -> list[Rank]:
    """A part of the vocabulary at tokens that all ranks have: with hidden states whole on every
    rank, and cut along the sequence.
    """
    N, H, R, rows = p.tokens, p.hidden, group.world, ceil(p.vocabulary, group.world)
    local, s = _of_part(p, rows), sizes_of(N, H, rows, p.dtype, p.device)
    # Two passes form their logits in the same chunks as one.
    phases = one_pass(s, local.chunks, p.frozen).phases
    chunk, n, two_passes = phases["chunk"], max(local.chunks), local.ways[-1].nhv == 8

    def dhidden(tokens: int) -> int:
        return traffic.dhidden_bytes(tokens, H, R, s.w if two_passes else s.waiting, s.acc)

    statistics = traffic.statistics_bytes(n, R)
    whole = {"chunk": _sum(chunk, {"buffers": statistics + dhidden(n)})}
    gathered, summed = traffic.hidden_bytes(N, H, s.w), traffic.summed_bytes(N, H, R, s.acc)
    cut = {
        "chunk": _sum(
            chunk, {"dhidden": N * H * (s.acc - s.waiting), "buffers": gathered + statistics}
        ),
        "scatter": {
            "dweight": chunk["dweight"],
            "dhidden": N * H * s.acc,
            "buffers": gathered + summed,
        },
    }
    of_all = {"statistics": traffic.statistics_bytes(N, R)}
    of_whole = of_all | {"dhidden": sum(map(dhidden, local.chunks))}
    of_cut = of_all | {"hidden": gathered * (2 if two_passes else 1), "dhidden": summed}
    ways = (("tp", whole, of_whole), ("tp, sequence-sharded", cut, of_cut))
    return [_with_rows(p, group, name, N, phases | at, got, local) for name, at, got in ways]


def _travelling(p: Plan, group: Group) -> Rank:
    """A part of the vocabulary at everybody's tokens, chunks of each rank at a time."""
    N, H, R, rows = p.tokens, p.hidden, group.world, ceil(p.vocabulary, group.world)
    s = sizes_of(N, H, rows, p.dtype, p.device)
    chunks = [R * n for n in _of_part(p, p.vocabulary).chunks]
    way = one_pass(s, chunks, p.frozen)
    way = way._replace(flop=R * way.flop)
    here = p._replace(tokens=R * N, vocabulary=rows, chunks=chunks, ways=[way])
    chunk = _sum(way.phases["chunk"], {"buffers": traffic.travel_bytes(max(chunks), H, s.w, s.acc)})
    received = {
        "hidden": traffic.hidden_bytes(R * N, H, s.w),
        "dhidden": traffic.summed_bytes(R * N, H, R, s.acc),
        "statistics": R * N * traffic.TOKEN,
    }
    return _with_rows(p, group, "tokens", R * N, way.phases | {"chunk": chunk}, received, here)


def _of_part(p: Plan, rows: int) -> Plan:
    """The plan of a part of the head."""
    config = {"hidden_size": p.hidden, "vocab_size": rows}
    options = {"dtype": p.dtype, "frozen": p.frozen, "device": p.device, "alone": False}
    return plan(config, p.tokens, chunk_bytes=p.chunk_bytes, **options)


def _with_rows(
    p: Plan,
    group: Group,
    name: str,
    tokens: int,
    phases: dict[str, Parts],
    received: Parts,
    local: Plan,
) -> Rank:
    """A rank of a vocabulary in parts; tokens of all ranks, and bytes, of a micro-batch."""
    rows = local.vocabulary
    held = _held(p, group, rows, rows, rows)
    memory = local.ways[-1]._replace(phases={n: _sum(of, held) for n, of in phases.items()})
    times = group.micro_batches
    received = {of: times * count for of, count in received.items()}
    return Rank(name, times * tokens, memory, received, local)


def _held(p: Plan, group: Group, weight: int, kept: int, optimizer: int) -> Parts:
    """Bytes of these rows of the weight, of the gradient that is kept, and of the optimizer."""
    of_row = MOMENTS + (COPY if p.dtype.itemsize < 4 else 0)
    reduced = group.reduce_dtype.itemsize if group.micro_batches > 1 else 0
    return {
        "weight": weight * p.hidden * p.dtype.itemsize,
        "dweight": 0 if p.frozen else kept * p.hidden * reduced,
        "optimizer": 0 if p.frozen else optimizer * p.hidden * of_row,
    }


def _sum(a: Parts, b: Parts) -> Parts:
    return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
