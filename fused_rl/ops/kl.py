"""An estimator of KL at d = logprobs - ref_logprobs, and the slope that it backpropagates with."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.record import Operator


class Deviation(NamedTuple):
    d: Tensor  # [...]
    value_kind: int  # numbers of reference.py
    slope_kind: int


class Estimate(NamedTuple):
    value: Tensor  # [...]
    slope: Tensor  # [...]


class OfValue(NamedTuple):
    dvalue: Tensor
    slope: Tensor


@Operator
def kl(at: Deviation) -> Estimate:
    """The estimator `value_kind` at d, and the derivative of the estimator `slope_kind` there."""
    value = reference.kl(at.d, at.value_kind)
    return Estimate(value.clone(), reference.kl_slope(at.d, at.slope_kind).clone())


@kl.fake
def _(at: Deviation) -> Estimate:
    return Estimate(at.d.new_empty(at.d.shape), at.d.new_empty(at.d.shape))


@Operator
def kl_backward(known: OfValue) -> Tensor:
    """dd; an operator, so that a second derivative, which slope does not hold, raises."""
    return known.dvalue * known.slope


@kl_backward.fake
def _(known: OfValue) -> Tensor:
    return torch.empty_like(known.dvalue * known.slope)


kl.differentiate(kl_backward, of="kl_penalty")
