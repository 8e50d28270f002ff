"""The operators of a chunk's logits on CUDA and ROCm: fp32 logits, or exponentials in bfloat16.

Which of the two a chunk has is the dtype of its z. triton.py says how operators find their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rl.ops import chunk, stored
from fused_rl.ops.chunk import ChunkLogits, ChunkStatistics, Sums, dhidden_dtype
from fused_rl.ops.chunks import HAS_TRITON, waiting_dtype
from fused_rl.ops.record import Given, Gradients, Head, Known, Limits, Needs, Upstream
from fused_rl.ops.stored import Stored, StoredStatistics
from fused_rl.ops.triton import (
    is_right,
    on_cuda,
    operands,
    picked,
    place_of,
    power_of_two,
    put_back,
    taking_part,
)


@on_cuda(chunk.linear_logprobs_chunk)
def linear_logprobs_chunk(head: Head, given: Given, device: Any) -> ChunkStatistics:
    from fused_rl.kernels import configs, linear_gradients, logprobs

    head = operands(head)
    hidden, weight, bias, *tokens = head
    if config := configs.chosen(head, device, stores=True):
        return _exponentials(head, config, device)
    N, V = hidden.shape[0], weight.shape[0]
    stride = linear_gradients.row_stride(V)
    z = head.temperature.new_empty(N * stride)
    raw = linear_gradients.product(hidden, weight.T, z.view(N, stride)[:, :V])
    return ChunkStatistics(*logprobs.fwd(raw, bias, *tokens, -1, device.multiprocessors), z)


def _exponentials(head: Head, config: Any, device: Any) -> ChunkStatistics:
    """The statistics, and one buffer of bfloat16: E, and behind it s, the log-probs and lse."""
    from fused_rl.kernels import linear_exponentials as kernel
    from fused_rl.kernels.linear_gradients import row_stride

    N, V = head.hidden.shape[0], head.weight.shape[0]
    z = head.hidden.new_empty(N * row_stride(V) + 8 * N)
    e, *kept = _exponentials_of(z, N, V)
    stats, s = kernel.fwd(*head, device, config, e[:, :V])
    for to, value in zip(kept, (s, stats[0], stats[2]), strict=True):
        to.copy_(value)
    return ChunkStatistics(*stats, z)


def _exponentials_of(z: Tensor, N: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E, with the room between its rows; s and the log-probs, [N] fp32 each; lse, [N] fp64."""
    from fused_rl.kernels.linear_gradients import row_stride

    stride = row_stride(V)
    e, s, logprobs, lse = z.split([N * stride, 2 * N, 2 * N, 4 * N])
    of_tokens = (s.view(torch.float32), logprobs.view(torch.float32), lse.view(torch.float64))
    return e.view(N, stride), *of_tokens


@on_cuda(chunk.linear_logprobs_chunk_backward)
def linear_logprobs_chunk_backward(
    logits: ChunkLogits, upstream: Upstream, head: Head, known: Known, sums: Sums, device: Any
) -> Tensor:
    rows = taking_part((upstream.dlogprobs != 0) | (upstream.dentropy != 0))
    rows = worth_a_copy(rows, head.labels)
    dhidden = _chunk_gradients(rows, logits, upstream, head, known, sums)
    return put_back(rows, dhidden, head.hidden, dhidden_dtype(head, sums))


@on_cuda(chunk.linear_logprobs_chunk_unit)
def linear_logprobs_chunk_unit(
    logits: ChunkLogits, head: Head, known: Known, device: Any
) -> Tensor:
    none, ones = head.weight.new_empty(0), torch.ones_like(known.entropy)
    upstream, sums = Upstream(ones, torch.zeros_like(ones)), Sums(none, none, False)
    dhidden = _chunk_gradients(None, logits, upstream, head, known, sums)
    return dhidden.to(waiting_dtype(head.hidden))


def _chunk_gradients(
    rows: Tensor | None,
    logits: ChunkLogits,
    upstream: Upstream,
    head: Head,
    known: Known,
    sums: Sums,
) -> Tensor:
    """dhidden of some of the tokens, in fp32; their share of the sums."""
    from fused_rl.kernels import exponentials_gradients
    from fused_rl.kernels import linear_gradients as kernel

    if logits.z.dtype == torch.bfloat16:
        given = _of_exponentials(rows, logits, upstream, head, known)
        return exponentials_gradients.bwd(*given, *_asked(sums), sums.accumulate)
    N, V = head.hidden.shape[0], head.weight.shape[0]
    raw = rows_of(logits.z.view(N, kernel.row_stride(V)), rows)[:, :V]
    upstream, taken, known = picked(rows, upstream, head, known)
    power = power_of_two(taken, upstream)
    if power is not None:
        upstream = Upstream(*(g * power for g in upstream))
    left, right, *tokens = taken
    given, final = (upstream, raw, left, right, tokens, (-1, *known)), final_dtype(left, sums)
    return with_shares(power, sums, lambda *into: kernel.chunk_bwd(*given, *into, final))


def final_dtype(hidden: Tensor, sums: Sums) -> torch.dtype:
    """What dhidden is rounded to in the end; hidden: as the kernels take it."""
    return torch.float32 if sums.partial else hidden.dtype


def _asked(sums: Sums) -> list[Tensor | None]:
    return [None if not t.numel() else t for t in (sums.dweight, sums.dbias)]


def with_shares(power: Tensor | None, sums: Sums, run: Callable[..., Tensor]) -> Tensor:
    """dhidden = run(dweight, dbias, accumulate), which gives all of it `power` times too large."""
    into = _asked(sums)
    # Shares that are still scaled cannot be added where the sum is.
    shares = into if power is None else [None if t is None else t.float() * 0 for t in into]
    dhidden = run(*shares, sums.accumulate and power is None)
    if power is not None:
        dhidden.div_(power)
        for to, share in zip(into, shares, strict=True):
            if to is not None:
                to.copy_(to + share / power if sums.accumulate else share / power)
    return dhidden


def rows_of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Some of them, as far apart as they were; all, if None."""
    return tensor if rows is None else tensor[rows]


def _of_exponentials(
    rows: Tensor | None, logits: ChunkLogits, upstream: Upstream, head: Head, known: Known
) -> tuple:
    """What exponentials_gradients takes of some of the tokens."""
    from fused_rl.kernels.exponentials_gradients import of_whole

    kept = _exponentials_of(logits.z, len(head.labels), len(head.weight))
    e, *of_tokens = (rows_of(t, rows) for t in kept)
    upstream, taken, known = picked(rows, upstream, head, known)
    hidden, weight, *tokens = taken
    e = e[:, : len(weight)]
    return upstream, e, hidden, weight, tokens, of_whole(*of_tokens, *known)


@on_cuda(stored.linear_logprobs_stored)
def linear_logprobs_stored(head: Head, limits: Limits, device: Any) -> StoredStatistics:
    counted = head.labels != limits.ignore_index
    rows = stored.rows_that_count(head.labels, limits.ignore_index)
    some = None if len(rows) == len(counted) else rows
    head = head._replace(labels=head.labels.where(counted, 0))
    *stats, z = linear_logprobs_chunk(head if some is None else head.at(rows), Given(True), device)
    totals = (put_back(some, t, t.new_empty(len(counted))) for t in stats)
    return StoredStatistics(*(t.where(counted, 0.0) for t in totals), rows, z)


# Columns that E is read in where a gradient needs every entry, and E must stay what it is.
BLOCK_COLUMNS = 16384


@on_cuda(stored.linear_logprobs_stored_backward)
def linear_logprobs_stored_backward(
    upstream: Upstream,
    head: Head,
    limits: Limits,
    known: Known,
    of_logits: Stored,
    given: Given,
    needs: Needs,
    device: Any,
) -> Gradients:
    from fused_rl.kernels import exponentials_gradients as kernel

    hidden, weight, bias, labels, *_ = head
    rows = None if len(of_logits.rows) == len(labels) else of_logits.rows
    counted = labels != limits.ignore_index
    upstream = Upstream(*(g.where(counted, 0.0) for g in upstream))
    upstream, head, known = picked(rows, upstream, head, known)
    # A second choice: of the tokens that count, those that have a gradient.
    some = taking_part((upstream.dlogprobs != 0) | (upstream.dentropy != 0))
    some = worth_a_copy(some, head.labels)
    dweight = weight.new_empty(weight.shape if needs.need_dweight else 0)
    dbias = known.entropy.new_empty(len(weight) if needs.need_dbias else 0)
    args = (some, ChunkLogits(of_logits.z), upstream, head, known)
    every_entry = given.has_dentropy or head.softcap != 0.0
    if every_entry and of_logits.z.dtype == torch.bfloat16:
        sums = (None if not t.numel() else t for t in (dweight, dbias))
        dhidden = kernel.bwd_by_blocks(*_of_exponentials(*args), *sums, BLOCK_COLUMNS)
    else:
        dhidden = _chunk_gradients(*args, Sums(dweight, dbias, False))
    dhidden = put_back(some, dhidden, head.hidden, waiting_dtype(hidden))
    return Gradients(
        put_back(rows, dhidden, hidden) if needs.need_dhidden else hidden.new_empty(0),
        dweight,
        dbias.to(weight.dtype if bias is None else bias.dtype),
    )


def worth_a_copy(rows: Tensor | None, logits: Tensor) -> Tensor | None:
    """Those of the tokens that take part, unless nearly all do: the others' products then cost less
    than a copy of the logits without them.
    """
    return None if rows is None or 8 * len(rows) > 7 * len(logits) else rows


def keeps_exponentials(head: Head, limits: Limits, device: torch.device, place: Any) -> bool:
    """Whether they stand for logits on a device, those of all tokens fit into chunk_bytes, and the
    kernels were right: else the next way down is to form the logits again.
    """
    from fused_rl.kernels import configs
    from fused_rl.kernels.linear_gradients import row_stride

    if 2 * len(head.labels) * row_stride(len(head.weight)) > limits.chunk_bytes:
        return False
    there = configs.chosen(head, place, stores=True) is not None
    return there and is_right(stored.linear_logprobs_stored, (head, limits), device, place)


def fits_in_half(head: Head, limits: Limits) -> bool:
    """`keeps_exponentials` on the device that the head is on."""
    device = head.hidden.device
    if device.type != "cuda" or not HAS_TRITON or head.hidden.dtype != torch.bfloat16:
        return False
    with torch.cuda.device(device):
        return keeps_exponentials(head, limits, device, place_of(device))
