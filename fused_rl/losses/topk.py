"""Divergences from a teacher of which only some log-probabilities are known: its top k.

    s, t       the student's and the teacher's probabilities at the K ids
    S, T       their sums over the ids; 1 - S, 1 - T is what is left for the others

    TRUNCATED      sum_k c(s[k], t[k])
    RENORMALISED   sum_k c(s[k] / S, t[k] / T)
    BUCKET         sum_k c(s[k], t[k]) + c(1 - S, 1 - T)

c are the terms of divergences.py, of which each is 0 where s = t and positive elsewhere, also where
the probabilities do not add up to 1: TRUNCATED FORWARD is sum_k t log(t / s) + S - T. Without
S - T, as trainers have it, a student that puts all of its mass on the ids is below 0.
BUCKET is the divergence between both distributions with the other entries joined to one, and so
never more than that of the whole vocabulary. docs/distillation.md says which tail has the right
minimum.
"""

import math
from enum import Enum

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.divergences import Divergence
from fused_rl.kl.log_ratios import log1mexp
from fused_rl.reference import promoted

__all__ = ["Tail", "topk_divergence"]

# The least mass of a tail: of what is left of 1, float32 log-probabilities know no less.
LEAST_TAIL = 2.0**-24


class Tail(Enum):
    """What becomes of the entries that are not among the teacher's top k; see the module."""

    TRUNCATED = "truncated"
    RENORMALISED = "renormalised"
    BUCKET = "bucket"


def topk_divergence(
    logprobs_at: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: Divergence = Divergence.FORWARD,
    tail: Tail = Tail.BUCKET,
) -> Tensor:
    """The divergence between student and teacher per token, from their log-probs at the same ids.

    Differentiable in both. The gradient of a tail that holds almost nothing is a difference of what
    the ids have: from float32 log-probs and a tail of 1e-4 it keeps three digits, from one of 1e-6
    one.

    Args:
        logprobs_at: [..., K], any floating dtype: the student's, in nats, of linear_logprobs_at.
            For RENORMALISED the logits of linear.linear_logits_at are as good.
        teacher_logprobs: [..., K], the teacher's, at the same ids, each id at most once per token.
            -inf pads lists of different lengths: such an entry is none of the K, whatever the
            student has there, and joins the tail. So does NaN, an entry that is not known.
        divergence: which; divergences.py has the formulas.
        tail: what becomes of all other entries.

    Returns:
        [...], float32, or float64 for float64 inputs, in nats; 0 for a token without entries. inf
        where the divergence is, with a finite gradient. A sum of probabilities that rounds to 1 or
        above leaves a tail of 2^-24, whose gradient is the one there. NaN of the student stays NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: a forward-mode or second derivative.
    """
    checks.is_floating("logprobs_at", logprobs_at)
    checks.is_floating("teacher_logprobs", teacher_logprobs)
    checks.same_shape("teacher_logprobs", teacher_logprobs, "logprobs_at", logprobs_at)
    checks.require(
        logprobs_at.dim() > 0 and logprobs_at.shape[-1] > 0,
        lambda: f"logprobs_at must be [..., K] with K >= 1, got {list(logprobs_at.shape)}",
    )
    checks.same_device(logprobs_at=logprobs_at, teacher_logprobs=teacher_logprobs)
    checks.require(
        isinstance(divergence, Divergence),
        lambda: f"divergence must be a Divergence, got {divergence!r}",
    )
    checks.require(isinstance(tail, Tail), lambda: f"tail must be a Tail, got {tail!r}")
    student, teacher = promoted(logprobs_at, teacher_logprobs)
    counted = teacher > -torch.inf
    empty = ~counted.any(-1, keepdim=True)
    # Without an entry both sides are the same numbers, of no gradient.
    both = (x.where(counted, -torch.inf).where(~empty, -1.0) for x in (student, teacher))
    return divergence.terms(*(_with_tail(x, tail) for x in both)).sum(-1)


def _with_tail(logprobs: Tensor, tail: Tail) -> Tensor:
    """[..., K], or [..., K + 1] with the bucket."""
    if tail is Tail.RENORMALISED:
        return logprobs.log_softmax(-1)
    return torch.cat([logprobs, _log_tail(logprobs)], -1) if tail is Tail.BUCKET else logprobs


def _log_tail(logprobs: Tensor) -> Tensor:  # [..., 1]
    """log(1 - sum_k exp logprobs[k]).

    In float64: a float32 sum next to 1 would round away what the log-probabilities know of it.
    """
    # Of no probability, and with a gradient where all are so: logsumexp has none of -inf alone.
    m = logprobs.double().clamp(min=-700.0).logsumexp(-1, keepdim=True)
    highest = math.log1p(-LEAST_TAIL)
    # Held at the bound with the gradient there, not 0: the student has to come back.
    m = m + (m.clamp(max=highest) - m).detach()
    return log1mexp(m).to(logprobs.dtype)
