"""The operators of two heads on CUDA and ROCm; triton.py says how operators find their kernels.

The teacher's gradients are the student's with the two sides exchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl.ops import divergence, divergence_chunk
from fused_rl.ops.chunk import ChunkLogits, Sums, dhidden_dtype
from fused_rl.ops.chunks import gradients_like
from fused_rl.ops.divergence import TwoGradients, TwoNeeds
from fused_rl.ops.divergence_chunk import StudentUpstream, TwoChunkStatistics
from fused_rl.ops.formulas import at
from fused_rl.ops.record import Gradients, Limits, Needs
from fused_rl.ops.triton import (
    gradients_of,
    on_cuda,
    operands,
    power_of_two,
    put_back,
    taking_part,
)
from fused_rl.ops.triton_chunk import final_dtype, with_shares, worth_a_copy
from fused_rl.ops.two_heads import Measure, TwoHeads, TwoKnown, TwoStatistics, TwoUpstream


def sides(heads: TwoHeads) -> tuple[Any, Any]:
    """Both heads as the kernels take them."""
    from fused_rl.kernels.linear_divergences import Head as Side

    student, teacher = (Side(*operands(head)) for head in (heads.student(), heads.teacher()))
    return student, teacher


def room(tokens: int, vocabulary: int, like: Tensor) -> Tensor:
    """For the logits of both, [2, tokens, row_stride] fp32."""
    from fused_rl.kernels.linear_gradients import row_stride

    return like.new_empty(2, tokens, row_stride(vocabulary), dtype=torch.float32)


@on_cuda(divergence_chunk.linear_divergence_chunk)
def linear_divergence_chunk(heads: TwoHeads, measure: Measure, device: Any) -> TwoChunkStatistics:
    from fused_rl.kernels import linear_divergences as kernel

    z = room(len(heads.labels), len(heads.weight), heads.temperature)
    stats = kernel.statistics(*sides(heads), tuple(measure), z, -1, device.multiprocessors)
    return TwoChunkStatistics(*stats, z.flatten())


@on_cuda(divergence.linear_divergence)
def linear_divergence(
    heads: TwoHeads, measure: Measure, limits: Limits, device: Any
) -> TwoStatistics:
    from fused_rl.kernels import linear_divergences as kernel
    from fused_rl.kernels.linear_gradients import chunk_tokens

    N, (V, H) = len(heads.labels), heads.weight.shape
    rows = taking_part(heads.labels != limits.ignore_index)
    taken = heads if rows is None else heads.at(rows)
    most = chunk_tokens(V, H, kernel.FORWARD_BYTES, limits.chunk_bytes, device.multiprocessors)
    z = room(min(most, len(taken.labels)), V, heads.temperature)
    student, teacher = sides(taken)
    of_chunks = []
    # No token makes one empty chunk.
    for start in range(0, max(1, len(taken.labels)), most):
        part = [tokens_of(side, slice(start, start + most)) for side in (student, teacher)]
        given = (tuple(measure), z[:, : len(part[0].labels)], limits.ignore_index)
        of_chunks.append(kernel.statistics(*part, *given, device.multiprocessors))
    stats = (torch.cat(parts) for parts in zip(*of_chunks, strict=True))
    return TwoStatistics(*(put_back(rows, t, t.new_empty(N)) for t in stats))


def tokens_of(side: Any, tokens: slice) -> Any:
    """Some tokens of a side."""
    hidden, labels, temperature = (t[tokens] for t in (side.hidden, side.labels, side.temperature))
    return side._replace(hidden=hidden, labels=labels, temperature=temperature)


def of_log(upstream: TwoUpstream, measure: Measure, slope: Tensor) -> tuple[Tensor, ...]:
    """[N] each: gradients of logits are no larger than if these were gradients of log-probs.

    |g - s sum g| <= 2 |sum g| + factor: the terms of one sign sum up to at most factor, whatever
    the divergence is, so that no g is more than that beyond the sum.
    """
    bound = 2.0 * slope.abs() + measure.factor
    return upstream.ddivergence * bound, upstream.dlogprobs, upstream.dentropy


@on_cuda(divergence.linear_divergence_backward)
def linear_divergence_backward(
    upstream: TwoUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    needs: TwoNeeds,
    device: Any,
) -> TwoGradients:
    of_student = _student_gradients(upstream, heads, measure, limits, known, Needs(*needs[:3]))
    turned = (upstream.swapped(), heads.swapped(), measure.swapped(), limits, known.swapped())
    return TwoGradients(*of_student, *_student_gradients(*turned, Needs(*needs[3:])))


def _student_gradients(
    upstream: TwoUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    needs: Needs,
) -> Gradients:
    from fused_rl.kernels import linear_divergences as kernel

    head = heads.student()
    if not any(needs):
        return gradients_like(head, needs)
    rows = taking_part(upstream.live(heads.labels, limits.ignore_index))
    given = _given(rows, upstream, heads, measure, known)
    found = kernel.bwd(*given.arguments, *limits, tuple(needs))
    return gradients_of(rows, found, given.power, head, needs)


@on_cuda(divergence_chunk.linear_divergence_chunk_backward)
def linear_divergence_chunk_backward(
    logits: ChunkLogits,
    upstream: StudentUpstream,
    heads: TwoHeads,
    measure: Measure,
    known: TwoKnown,
    sums: Sums,
    device: Any,
) -> Tensor:
    from fused_rl.kernels import linear_divergences as kernel
    from fused_rl.kernels.linear_gradients import row_stride

    among = upstream.among()
    rows = worth_a_copy(taking_part(among.live(heads.labels, -1)), heads.labels)
    z = logits.z.view(2, len(heads.labels), row_stride(len(heads.weight)))
    z = z if rows is None else z[:, rows]
    given = _given(rows, among, heads, measure, known)
    final = final_dtype(given.arguments[1].hidden, sums)
    dhidden = with_shares(
        given.power, sums, lambda *into: kernel.chunk_bwd(z, *given.arguments, *into, final)
    )
    return put_back(rows, dhidden, heads.hidden, dhidden_dtype(heads, sums))


class Given(NamedTuple):
    """What the kernels of gradients take."""

    power: Tensor | None  # in the upstream gradients
    arguments: tuple


def _given(
    rows: Tensor | None, upstream: TwoUpstream, heads: TwoHeads, measure: Measure, known: TwoKnown
) -> Given:
    """Of some of the tokens."""
    from fused_rl.kernels.linear_divergences import Known

    if rows is not None:
        upstream, heads, known = at(rows, upstream), heads.at(rows), at(rows, known)
    student, teacher = sides(heads)
    power = power_of_two(student, of_log(upstream, measure, known.slope))
    of_student = upstream[:3] if power is None else tuple(g * power for g in upstream[:3])
    return Given(power, (of_student, student, teacher, tuple(measure), Known(*known[:5])))
