"""The logits of a chunk of tokens by two heads, and the student's gradients: 4 NHV, and 4 NHV more.

For a loss that is known between the two, or that only scales what is formed here: with a head that
is not trained, 6 NHV for any loss. All labels are inside the vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.ops.chunk import ChunkLogits, Sums, dhidden_dtype
from fused_rl.ops.chunks import counted_rows, padded
from fused_rl.ops.divergence import (
    TwoGradients,
    TwoNeeds,
    both_logits,
    check_two,
    linear_divergence_backward,
    pair_rows,
)
from fused_rl.ops.formulas import add_products
from fused_rl.ops.frozen import Unit
from fused_rl.ops.record import Limits, Operator
from fused_rl.ops.two_heads import (
    Measure,
    TwoHeads,
    TwoKnown,
    TwoStatistics,
    TwoUpstream,
    student_gradient,
    two_statistics,
    two_statistics_like,
)


class TwoChunkStatistics(NamedTuple):
    """TwoStatistics, and both heads' logits for the backward pass that follows at once."""

    divergence: Tensor
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    teacher_logprobs: Tensor
    teacher_entropy: Tensor
    teacher_lse: Tensor
    slope: Tensor
    teacher_slope: Tensor
    z: Tensor  # in plain torch [2 * V * padded(N)]; a kernel has a layout of its own


class StudentUpstream(NamedTuple):
    """What of TwoUpstream has a gradient in one pass."""

    ddivergence: Tensor
    dlogprobs: Tensor
    dentropy: Tensor

    def among(self) -> TwoUpstream:
        zeros = torch.zeros_like(self.ddivergence)
        return TwoUpstream(*self, zeros, zeros)


@Operator
def linear_divergence_chunk(heads: TwoHeads, measure: Measure) -> TwoChunkStatistics:
    """In plain torch z is the student's [N, V], and the teacher's, flattened."""
    z = torch.stack(both_logits(heads))
    stats = two_statistics(*z, heads.labels, measure)
    N, V = len(heads.labels), len(heads.weight)
    return TwoChunkStatistics(*stats, F.pad(z.flatten(), (0, 2 * V * (padded(N) - N))))


@linear_divergence_chunk.fake
def _(heads: TwoHeads, measure: Measure) -> TwoChunkStatistics:
    room = 2 * heads.weight.shape[0] * padded(heads.hidden.shape[0])
    z = heads.hidden.new_empty(room, dtype=heads.dtype)
    return TwoChunkStatistics(*two_statistics_like(heads), z)


@Operator
def linear_divergence_chunk_backward(
    logits: ChunkLogits,
    upstream: StudentUpstream,
    heads: TwoHeads,
    measure: Measure,
    known: TwoKnown,
    sums: Sums,
) -> Tensor:
    """dhidden [N, H], in `dhidden_dtype`."""
    if not sums.accumulate:
        sums.dweight.zero_()
        sums.dbias.zero_()
    N, V = len(heads.labels), len(heads.weight)
    z = logits.z[: 2 * N * V].view(2, N, V)
    draw = student_gradient(upstream.among(), heads, measure, known, *z)
    dhidden = add_products(draw, heads.student(), sums.dweight, sums.dbias)
    return dhidden.to(dhidden_dtype(heads, sums))


@linear_divergence_chunk_backward.fake
def _(
    logits: ChunkLogits,
    upstream: StudentUpstream,
    heads: TwoHeads,
    measure: Measure,
    known: TwoKnown,
    sums: Sums,
) -> Tensor:
    return heads.hidden.new_empty(heads.hidden.shape, dtype=dhidden_dtype(heads, sums))


class TwoFrozenStatistics(NamedTuple):
    """TwoStatistics, and unit[n] = d divergence[n] / d hidden[n], which the backward scales."""

    divergence: Tensor
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    teacher_logprobs: Tensor
    teacher_entropy: Tensor
    teacher_lse: Tensor
    slope: Tensor
    teacher_slope: Tensor
    unit: Tensor  # [N, H], in the dtype of hidden


class OthersGiven(NamedTuple):
    """Whether a loss depends on more than the divergence."""

    has_dlogprobs: bool
    has_dentropy: bool


@Operator
def linear_divergence_frozen(
    heads: TwoHeads, measure: Measure, limits: Limits
) -> TwoFrozenStatistics:
    """linear_divergence, with its gradient formed while the logits are there."""
    check_two(heads, limits.ignore_index)
    totals = [t.zero_() for t in two_statistics_like(heads)]
    totals.append(torch.zeros_like(heads.hidden, memory_format=torch.contiguous_format))
    counted = heads.labels != limits.ignore_index
    chunks = counted_rows(counted, pair_rows(heads, limits.chunk_bytes))
    all_there = any(isinstance(rows, slice) for rows in chunks)
    # A chunk has labels of the vocabulary alone.
    heads = heads._replace(labels=heads.labels.where(counted, 0)) if all_there else heads
    for rows in chunks:
        for total, of_part in zip(totals, _with_unit(heads.at(rows), measure), strict=True):
            total[rows] = of_part.to(total.dtype)
    if all_there:
        *vectors, unit = totals
        totals = [*(t.where(counted, 0.0) for t in vectors), unit.where(counted[:, None], 0.0)]
    return TwoFrozenStatistics(*totals)


def _with_unit(heads: TwoHeads, measure: Measure) -> TwoFrozenStatistics:
    """Of a chunk."""
    *stats, z = linear_divergence_chunk(heads, measure)
    known = known_of(TwoStatistics(*stats))
    zeros, none = torch.zeros_like(known.slope), heads.weight.new_empty(0)
    upstream = StudentUpstream(torch.ones_like(zeros), zeros, zeros)
    args = (ChunkLogits(z), upstream, heads, measure, known, Sums(none, none.clone(), False))
    return TwoFrozenStatistics(*stats, linear_divergence_chunk_backward(*args))


def known_of(stats: TwoStatistics) -> TwoKnown:
    of_lse = (stats.lse, stats.entropy, stats.teacher_lse, stats.teacher_entropy)
    return TwoKnown(*of_lse, stats.slope, stats.teacher_slope)


@linear_divergence_frozen.fake
def _(heads: TwoHeads, measure: Measure, limits: Limits) -> TwoFrozenStatistics:
    unit = heads.hidden.new_empty(heads.hidden.shape)
    return TwoFrozenStatistics(*two_statistics_like(heads), unit)


@Operator
def linear_divergence_frozen_backward(
    upstream: StudentUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    unit: Unit,
    given: OthersGiven,
) -> Tensor:
    """dhidden. Gradients of logprobs and entropy are not in `unit`: their tokens form their logits
    again.
    """
    hidden, (ddivergence, dlogprobs, dentropy) = heads.hidden, upstream
    # where, not the product alone: 0 * NaN is NaN.
    live = (heads.labels != limits.ignore_index) & (ddivergence != 0)
    scaled = ddivergence[:, None] * unit.unit.to(ddivergence.dtype)
    dhidden = scaled.where(live[:, None], 0.0).to(hidden.dtype)
    if not (given.has_dlogprobs or given.has_dentropy):
        return dhidden
    others = (dlogprobs != 0) | (dentropy != 0)
    of_these = StudentUpstream(ddivergence.where(others, 0.0), dlogprobs, dentropy).among()
    needs = TwoNeeds(True, False, False, False, False, False)
    formed: TwoGradients = linear_divergence_backward(
        of_these, heads, measure, limits, known, needs
    )
    return torch.where(others[:, None], formed.dhidden, dhidden)


@linear_divergence_frozen_backward.fake
def _(
    upstream: StudentUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    unit: Unit,
    given: OthersGiven,
) -> Tensor:
    return heads.hidden.new_empty(heads.hidden.shape)


linear_divergence_frozen.differentiate(linear_divergence_frozen_backward, of="linear_divergence")
