"""The terms of a divergence from log-probabilities that are already there.

value = g + g' with the slopes of reference.py, g = dc / d log s and g' = dc / d log t.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.record import Operator


class LogPair(NamedTuple):
    """Of one shape and dtype."""

    logs: Tensor  # [...]
    logt: Tensor  # [...]
    kind: int  # kind, parameter and factor of divergences.Divergence
    parameter: float
    factor: float


class Terms(NamedTuple):
    """[...] each. value is infinite where a term is; the slopes are finite there."""

    value: Tensor
    slope: Tensor
    teacher_slope: Tensor


class OfTerms(NamedTuple):
    dvalue: Tensor


class Slopes(NamedTuple):
    slope: Tensor
    teacher_slope: Tensor


class TermGradients(NamedTuple):
    dlogs: Tensor
    dlogt: Tensor


@Operator
def divergence_terms(of: LogPair) -> Terms:
    pair = reference.Pair.of(of.logs, of.logt)
    slope, teacher_slope = (of.factor * g for g in reference.slopes(pair, of.kind, of.parameter))
    infinite = reference.is_infinite(pair.d, of.kind, of.parameter)
    return Terms((slope + teacher_slope).masked_fill(infinite, torch.inf), slope, teacher_slope)


@divergence_terms.fake
def _(of: LogPair) -> Terms:
    return Terms(*(torch.empty_like(of.logs + of.logt) for _ in range(3)))


@Operator
def divergence_terms_backward(up: OfTerms, of: LogPair, known: Slopes) -> TermGradients:
    """Takes the log-probabilities too: a second derivative, which no slope holds, raises then."""
    return TermGradients(up.dvalue * known.slope, up.dvalue * known.teacher_slope)


@divergence_terms_backward.fake
def _(up: OfTerms, of: LogPair, known: Slopes) -> TermGradients:
    return TermGradients(*(torch.empty_like(up.dvalue * g) for g in known))


divergence_terms.differentiate(divergence_terms_backward, of="topk_divergence")
