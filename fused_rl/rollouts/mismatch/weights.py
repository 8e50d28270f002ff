"""Rollout mismatch: what sampled is never quite what is trained. Weights and masks that say so.

With r = exp(logprobs - rollout_logprobs), where logprobs are those of the trained policy before
the step (batch.old_logprobs; where there are none, those given), formed per token, over the whole
sequence or as its geometric mean (Level):

    truncated_weights    clip(r, low, high)                 bounded variance, some bias
    masked_weights       r where low <= r <= high, else 0   what is too far off teaches nothing
    acceptance_mask      low <= r <= high
    veto_mask            no token of the sequence has r < floor

Masks are [N] bool for batch.with_mask, weights [N] for batch.with_weights; they combine:

    batch = batch.with_mask(acceptance_mask(batch, level=Level.GEOMETRIC, low=0.999, high=1.001))
    batch = batch.with_weights(truncated_weights(batch, high=2.0))

All are detached, and True or 1 outside loss_mask. exp is held within exp(+-20).

A log-prob of NaN, as engines report it for tokens that are all but certain, says nothing of the
mismatch. In truncated_weights such a token has r = 1, and adds nothing to its sequence's. Where r
is asked to lie within bounds it does not: masked_weights is 0, and the masks reject the token, or
at a coarser level its sequence. PolicyLoss counts these tokens in the metric unknown_fraction.
Log-probs that are -inf on both sides have r = 1.
"""

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.log_ratios import BOUND, difference
from fused_rl.losses.batch import TokenBatch, is_batch
from fused_rl.losses.sequences import Level

__all__ = [
    "acceptance_mask",
    "masked_weights",
    "off_policy_sequence_mask",
    "top_entropy_mask",
    "truncated_weights",
    "veto_mask",
]


@torch.no_grad()
def truncated_weights(
    batch: TokenBatch,
    *,
    level: Level = Level.TOKEN,
    low: float = 0.0,
    high: float = 2.0,
    logprobs: Tensor | None = None,
) -> Tensor:
    """clip(r, low, high): truncated importance sampling (TIS). Where r is not known it is 1.

    As for V-trace (IMPALA, arXiv 1802.01561, section 4.1); for language models "Your efficient RL
    framework secretly brings you off-policy RL training" (Yao et al., 2025).

    Args:
        batch: with rollout_logprobs, and old_logprobs unless logprobs are given.
        level: over which tokens r is formed.
        logprobs: [N] or in the batch's shape: of the policy before the step, in nats.

    Raises:
        ValueError: log-probs that are missing; low above high.
    """
    _bounds(low, high)
    ratio = _ratio(batch, level, logprobs, unknown=0.0)
    # inf - inf within a sequence is not known either.
    return ratio.where(~ratio.isnan(), 1.0).clamp(low, high).where(batch.loss_mask, 1.0)


@torch.no_grad()
def masked_weights(
    batch: TokenBatch,
    *,
    level: Level = Level.TOKEN,
    low: float = 0.5,
    high: float = 5.0,
    logprobs: Tensor | None = None,
) -> Tensor:
    """r where low <= r <= high, else 0: masked importance sampling (MIS), IcePop per token. NaN: 0.

    IcePop: "Every step evolves" (arXiv 2510.18855).

    Args and errors: as truncated_weights.
    """
    _bounds(low, high)
    ratio = _ratio(batch, level, logprobs)
    inside = (low <= ratio) & (ratio <= high)
    return ratio.where(inside, 0.0).where(batch.loss_mask, 1.0)


@torch.no_grad()
def acceptance_mask(
    batch: TokenBatch,
    *,
    level: Level = Level.GEOMETRIC,
    low: float = 0.99,
    high: float = 1.01,
    logprobs: Tensor | None = None,
) -> Tensor:
    """low <= r <= high: rejection of tokens or of whole sequences. NaN is rejected.

    Args and errors: as truncated_weights.
    """
    _bounds(low, high)
    ratio = _ratio(batch, level, logprobs)
    return ((low <= ratio) & (ratio <= high)) | ~batch.loss_mask


@torch.no_grad()
def veto_mask(batch: TokenBatch, *, floor: float = 1e-4, logprobs: Tensor | None = None) -> Tensor:
    """False for every token of a sequence in which any counted token has r < floor.

    One token that the trained policy would all but never have sampled condemns its sequence.

    Args and errors: as truncated_weights.
    """
    checks.is_not_negative("floor", floor)
    ratio = _ratio(batch, Level.TOKEN, logprobs)
    least = batch.sequence_min(ratio)
    return (least >= floor)[batch.sequence] | ~batch.loss_mask


@torch.no_grad()
def off_policy_sequence_mask(logprobs: Tensor, batch: TokenBatch, *, delta: float) -> Tensor:
    """False where A < 0 and mean(old_logprobs - logprobs) over the sequence > delta.

    Off-policy sequence masking, DeepSeek-V3.2 (arXiv 2512.02556, section 3.1): mistakes of a policy
    that is already left behind teach nothing; what went well may still. A log-prob of NaN counts as
    no difference.

    Args:
        logprobs: [N] or in the batch's shape: of the current policy, in nats.
        batch: with old_logprobs.

    Raises:
        ValueError: old_logprobs that are missing, logprobs that do not fit.
    """
    checks.is_bound("delta", delta)
    is_batch(batch)
    old = _present("old_logprobs", batch.old_logprobs)
    gap = difference(old, _flat("logprobs", logprobs, batch))
    known = batch.loss_mask & ~gap.isnan()
    left_behind = batch.at_level(gap.where(known, 0.0), Level.GEOMETRIC) > delta
    return ~(left_behind & (batch.advantages < 0))


@torch.no_grad()
def top_entropy_mask(entropy: Tensor, batch: TokenBatch, *, fraction: float = 0.2) -> Tensor:
    """True for the counted tokens of highest entropy, a fraction of them, rounded up; ties stay.

    math.ceil(fraction * counted tokens) of them, where no two are equal. NaN ranks last.

    "Beyond the 80/20 rule" (arXiv 2506.01939): the few tokens at which a chain of thought forks
    carry the gradient.

    Args:
        entropy: [N] or in the batch's shape, in nats.

    Raises:
        ValueError: a fraction outside 0 to 1; entropy that does not fit.
    """
    is_batch(batch)
    checks.is_bound("fraction", fraction)
    checks.require(0 < fraction <= 1, lambda: f"fraction must be in (0, 1], got {fraction}")
    entropy = _flat("entropy", entropy, batch)
    ranked = entropy.where(batch.loss_mask & ~entropy.isnan(), -torch.inf)
    if not len(ranked):
        return batch.loss_mask
    # In float64, as Python would: 0.3 * 50 is no 15 in float32.
    keep = (batch.loss_mask.sum().double() * fraction).ceil().long().clamp(min=1)
    least = ranked.sort(descending=True).values[keep - 1]
    return (ranked >= least) | ~batch.loss_mask


def _ratio(
    batch: TokenBatch, level: Level, logprobs: Tensor | None, unknown: float = torch.nan
) -> Tensor:
    """r at that level; `unknown` is the log-ratio of a token of which one log-prob is NaN."""
    is_batch(batch)
    rollout = _present("rollout_logprobs", batch.rollout_logprobs)
    if logprobs is None:
        current = _present("old_logprobs, or logprobs=", batch.old_logprobs)
    else:
        current = _flat("logprobs", logprobs, batch)
    gap = difference(current, rollout)
    gap = gap.where(~gap.isnan(), unknown).where(batch.loss_mask, 0.0)
    return batch.at_level(gap, level).clamp(-BOUND, BOUND).exp()


def _present(name: str, tensor: Tensor | None) -> Tensor:
    checks.require(tensor is not None, lambda: f"this needs a batch with {name}; it has None")
    return tensor


def _flat(name: str, tensor: Tensor, batch: TokenBatch) -> Tensor:
    checks.is_floating(name, tensor)
    checks.require(
        tensor.shape in (batch.labels.shape, batch.shape),
        lambda: f"{name} must be one per token, {list(batch.shape)}, got {list(tensor.shape)}",
    )
    return tensor.reshape(-1)


def _bounds(low: float, high: float) -> None:
    for name, bound in (("low", low), ("high", high)):
        checks.is_bound(name, bound)
        checks.at_least(name, bound, 0)
    checks.require(low <= high, lambda: f"low must not exceed high, got {low} and {high}")
