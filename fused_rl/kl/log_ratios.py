"""Log-ratios of tokens, and what is not known of them.

    log_ratio[n] = logprobs[n] - other[n]

logprobs are the policy's, other those of the old policy, the reference or the rollout. An inference
engine may report NaN for a token, a masked vocabulary gives -inf. The same everywhere, on every
device, without waiting for one:

    other is NaN       it is not known and counts as the policy's own: 0, so ratio 1 and KL 0;
                       the metric unknown_fraction counts such tokens
    both are -inf      they agree: 0
    one is -inf        BOUND, with its sign
    logprobs is NaN    NaN: the policy itself is broken, and the loss has to say so
"""

import math

import torch
from torch import Tensor

from fused_rl.derivatives import is_constant
from fused_rl.reference import promoted

# In nats: beyond it no ratio is told apart, and exp(20) is 5e8. An int: torch.compile with dynamic
# shapes would compile twice for a float that lives in a module.
BOUND = 20


def difference(logprobs: Tensor, other: Tensor) -> Tensor:
    """logprobs - other, [...], without gradient: 0 where both are -inf, NaN where either is NaN.

    float32, or float64 for float64 inputs.
    """
    logprobs, other = promoted(logprobs.detach(), other.detach())
    return (logprobs - other).where(logprobs != other, 0.0)


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """[...]: logprobs - other, finite as in the module's table; gradients where they are finite.

    float32, or float64 for float64 inputs.
    """
    logprobs, other = promoted(logprobs, other)
    gap = (logprobs.detach() - other.detach()).nan_to_num(nan=0.0, posinf=BOUND, neginf=-BOUND)
    # 0 with the gradient, NaN where the policy is; in few operations, for many call this.
    own = logprobs.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)
    gap = gap + (own - own.detach())
    if is_constant(other):
        return gap
    other = other.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return gap - (other - other.detach())


def held(power: Tensor) -> Tensor:
    """[...]: power, BOUND at most, so that its exp is finite; the gradient is the identity's."""
    return power + (power.clamp(max=BOUND) - power).detach()


def log1mexp(x: Tensor) -> Tensor:
    """[...]: log(1 - e^x) of x < 0, of log-probs those of the rest; where it cancels, by expm1."""
    far, near = torch.log1p(-x.exp()), torch.log(-torch.expm1(x))
    return torch.where(x < -math.log(2.0), far, near)
