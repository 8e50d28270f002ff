"""Rollout mismatch: what sampled is never quite what is trained. How far off, why, and what then.

With d = logprobs - rollout_logprobs, the trainer's before the step minus the engine's:

    mismatch_report      how large d is, what rounding alone explains of it, and what else it looks
                         like: another temperature, a kept set, stale weights, shifted tokens, ...
    LogitRounding        what rounding logits does to log-probs, by a model
    truncated_weights    clip(exp d, low, high)              bounded variance, some bias
    masked_weights       exp d where low <= exp d <= high, else 0
    acceptance_mask      low <= exp d <= high
    veto_mask            no token of the sequence has exp d < floor

What rounding does at a head that is at hand, by doing it: `linear.rounding_differences`.
"""

from fused_rl.rollouts.mismatch.gaps import TokenGap
from fused_rl.rollouts.mismatch.report import MismatchReport, mismatch_report
from fused_rl.rollouts.mismatch.rounding import LogitRounding, RoundingError
from fused_rl.rollouts.mismatch.weights import (
    acceptance_mask,
    masked_weights,
    off_policy_sequence_mask,
    top_entropy_mask,
    truncated_weights,
    veto_mask,
)

__all__ = [
    "LogitRounding",
    "MismatchReport",
    "RoundingError",
    "TokenGap",
    "acceptance_mask",
    "masked_weights",
    "mismatch_report",
    "off_policy_sequence_mask",
    "top_entropy_mask",
    "truncated_weights",
    "veto_mask",
]
