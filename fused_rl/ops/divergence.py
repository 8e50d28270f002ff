"""Divergences between two distributions per token, from two heads, in two passes.

4 NHV forward, where the hidden sizes are equal, and 8 NHV more for the student's gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunks import check_tokens, gradients_like, pair_tokens
from fused_rl.ops.formulas import add_products, at
from fused_rl.ops.record import Gradients, Limits, Needs, Operator
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


class TwoNeeds(NamedTuple):
    """Which gradients are asked for; the others come back empty."""

    need_dhidden: bool
    need_dweight: bool
    need_dbias: bool
    need_dteacher_hidden: bool
    need_dteacher_weight: bool
    need_dteacher_bias: bool


class TwoGradients(NamedTuple):
    """Each in the shape and dtype of what it is the gradient of, or empty."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    dteacher_hidden: Tensor
    dteacher_weight: Tensor
    dteacher_bias: Tensor


def pair_rows(heads: TwoHeads, chunk_bytes: int) -> int:
    """Tokens whose logits, the student's and the teacher's, fit into chunk_bytes."""
    return pair_tokens(heads.hidden, heads.weight, heads.dtype, chunk_bytes)


def check_two(heads: TwoHeads, ignore_index: int) -> None:
    """ValueError as check_tokens raises, for both heads."""
    V = len(heads.weight)
    check_tokens(heads.labels, heads.temperature, V, ignore_index)
    try:
        check_tokens(heads.labels, heads.teacher_temperature, V, ignore_index)
    except ValueError as error:
        raise ValueError(f"teacher_{error}") from error


def both_logits(heads: TwoHeads) -> tuple[Tensor, Tensor]:
    """[N, V] each, in one dtype."""
    return heads.student().logits().to(heads.dtype), heads.teacher().logits().to(heads.dtype)


@Operator
def linear_divergence(heads: TwoHeads, measure: Measure, limits: Limits) -> TwoStatistics:
    """Nothing of size V is kept. Tokens whose label is ignore_index have 0 everywhere."""
    check_two(heads, limits.ignore_index)
    out = TwoStatistics(*(t.zero_() for t in two_statistics_like(heads)))
    chosen = (heads.labels != limits.ignore_index).nonzero()[:, 0]
    for rows in chosen.split(pair_rows(heads, limits.chunk_bytes)):
        part = heads.at(rows)
        of_part = two_statistics(*both_logits(part), part.labels, measure)
        for total, values in zip(out, of_part, strict=True):
            total[rows] = values
    return out


@linear_divergence.fake
def _(heads: TwoHeads, measure: Measure, limits: Limits) -> TwoStatistics:
    return two_statistics_like(heads)


@Operator
def linear_divergence_backward(
    upstream: TwoUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    needs: TwoNeeds,
) -> TwoGradients:
    """Tokens whose upstream gradients are all 0 cost nothing."""
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
    hidden, weight, bias = heads[:3]
    if not any(needs):
        return gradients_like(heads.student(), needs)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape if needs.need_dweight else 0, dtype=heads.dtype)
    dbias = weight.new_zeros(weight.shape[0] if needs.need_dbias else 0, dtype=torch.float64)
    chosen = upstream.live(heads.labels, limits.ignore_index).nonzero()[:, 0]
    for rows in chosen.split(pair_rows(heads, limits.chunk_bytes)):
        part = heads.at(rows)
        of_part = (at(rows, upstream), part, measure, at(rows, known))
        draw = student_gradient(*of_part, *both_logits(part))
        dhidden[rows] = add_products(draw, part.student(), dweight, dbias).to(hidden.dtype)
    return Gradients(
        dhidden if needs.need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype),
        dbias.to(bias.dtype if needs.need_dbias else weight.dtype),
    )


@linear_divergence_backward.fake
def _(
    upstream: TwoUpstream,
    heads: TwoHeads,
    measure: Measure,
    limits: Limits,
    known: TwoKnown,
    needs: TwoNeeds,
) -> TwoGradients:
    of_student = gradients_like(heads.student(), Needs(*needs[:3]))
    of_teacher = gradients_like(heads.teacher(), Needs(*needs[3:]))
    return TwoGradients(*of_student, *of_teacher)


linear_divergence.differentiate(linear_divergence_backward, of="linear_divergence")
