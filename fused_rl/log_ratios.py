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

import torch
from torch import Tensor

from fused_rl.reference import promoted

# In nats: beyond it no ratio is told apart, and exp(20) is 5e8.
BOUND = 20.0


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
    gap = difference(logprobs, other).nan_to_num(nan=0.0, posinf=BOUND, neginf=-BOUND)
    gap = gap.where(~logprobs.isnan(), torch.nan)
    return gap + _step(logprobs, gap.dtype) - _step(other, gap.dtype)


def _step(logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    """0, with the gradient of logprobs."""
    finite = logprobs.to(dtype).where(logprobs.isfinite(), 0.0)
    return finite - finite.detach()
