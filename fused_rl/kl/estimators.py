"""Estimates of KL(policy, reference) from the sampled token alone, value and gradient chosen apart.

With d = logprobs - ref_logprobs, at tokens sampled from the policy:

        value             derivative       as a loss, on-policy, its expected gradient is that of
    K1  d                 1                nothing: it is 0
    K2  d^2 / 2           d                reverse KL(policy, reference)
    K3  expm1(-d) + d     -expm1(-d)       forward KL(reference, policy)
    ABS |d|               sign(d)          (monitoring only)

Values: K1 and K3 are unbiased for the reverse KL and K3 is never negative; K2 is biased.
Sources: J. Schulman, "Approximating KL divergence" (2020), for the estimators; "Rethinking KL
regularization in RLHF" (arXiv 2510.01555) and "A comedy of estimators" (arXiv 2512.21852) for their
gradients.
"""

from enum import Enum

from torch import Tensor

from fused_rl import checks, ops, reference
from fused_rl.kl.log_ratios import log_ratio


class KL(Enum):
    """An estimator of KL(policy, reference); see the module's table."""

    K1 = reference.K1
    K2 = reference.K2
    K3 = reference.K3
    ABS = reference.ABS


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    value: KL = KL.K3,
    grad: KL | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The estimate `value` of KL per token, which backpropagates as the estimate `grad` would.

    kl_penalty(p, q, value=KL.K3, grad=KL.K2) reports k3 and pushes along k2: the value of low
    variance, and on-policy the gradient of the reverse KL.

    Args:
        logprobs: [...], any floating dtype: the policy's log-probabilities, in nats.
        ref_logprobs: [...], the reference's.
        value: the estimator whose value is returned.
        grad: the estimator whose derivative is used; None: that of value.
        weight: [...], multiplies both: the importance ratio policy / old policy, for tokens that
            the old policy sampled. Detached, the expected gradients are those of the table above;
            attached, the gradient of the sampling itself is added, and with K1 or K3 the sum is
            that of the reverse KL. Attached and in float32, K3 loses it where the reference is more
            than about 15 nats above the policy: two terms of exp(-d) leave d. KLPenalty with
            importance does not.

    Returns:
        [...], float32, or float64 for float64 inputs, in nats. Where the reference is more than 20
        nats above the policy, k3's exponent is held at 20: the value is finite, the derivative that
        at the bound. A reference of NaN is not known, d = 0; -inf of both is d = 0, of one d = +-20
        (log_ratios.py). NaN of the policy stays NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: a forward-mode or second derivative.
    """
    checks.is_floating("logprobs", logprobs)
    checks.is_floating("ref_logprobs", ref_logprobs)
    if weight is not None:
        checks.is_floating("weight", weight)
        checks.same_shape("weight", weight, "logprobs", logprobs)
    checks.same_shape("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.same_device(logprobs=logprobs, ref_logprobs=ref_logprobs, weight=weight)
    checks.require(isinstance(value, KL), lambda: f"value must be a KL, got {value!r}")
    checks.require(
        grad is None or isinstance(grad, KL), lambda: f"grad must be a KL or None, got {grad!r}"
    )
    d = log_ratio(logprobs, ref_logprobs)
    penalty, _ = ops.kl(ops.Deviation(d, value.value, (grad or value).value))
    return penalty if weight is None else weight * penalty
