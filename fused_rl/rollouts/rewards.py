"""Rewards: the KL inside them, what lengths add, and the same scale for all of them.

Rewards enter the gradient through the advantages alone: everything here is detached. Per-token
tensors are [B, T], or packed [N] with cu_seqlens; outside loss_mask they come out as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.estimators import KL, kl_penalty
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses.sequences import Level, has_next, segment_sum, sequence_ids
from fused_rl.reference import acc_dtype, promoted
from fused_rl.rollouts.groups import Groups

__all__ = [
    "Moments",
    "length_rewards",
    "overlong_penalty",
    "shape_rewards",
    "whiten",
]


def is_finite(name: str, values: Tensor) -> None:
    """ValueError with the place of the first NaN or inf."""
    if not checks.has_values(values):
        return
    bad = (~values.isfinite()).nonzero()
    checks.require(
        len(bad) == 0,
        lambda: f"{name} must be finite, got {values[tuple(bad[0])]} at index {bad[0].tolist()}",
    )


@torch.no_grad()
def shape_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    beta: float | Tensor,
    kind: KL = KL.K1,
    level: Level = Level.TOKEN,
    clamp_min: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """reward[t] = -beta * k[t], and the sequence's own reward on top at its last counted token.

    Per-token KL in the reward, InstructGPT (arXiv 2203.02155, section 3.5) and Ziegler et al.
    (arXiv 1909.08593, eq. 2). With K1 the policy gradient of it is that of the reverse KL; no other
    estimator has that property here (arXiv 2512.21852).

    Args:
        rewards: [B]. That of a sequence without counted tokens is lost.
        logprobs: [B, T] or [N]: of the policy that sampled, in nats. Once the policy has moved away
            from it, only the current one's keep the gradient exact (with importance weights).
        ref_logprobs: the same shape: the reference's.
        loss_mask: the same shape, bool: True counts.
        beta: weight of the KL, a number or a tensor [].
        kind: the estimator.
        level: TOKEN: k of each token. SEQUENCE: k of the summed log-ratio, at the last token.
        clamp_min: lower bound on k; with K1 and 0, only tokens likelier than under the reference
            are punished, as AlpacaFarm does (arXiv 2305.14387).
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Returns:
        The shape of logprobs, float32, or float64 for float64 inputs. A token whose logprobs or
        ref_logprobs are NaN, not known, adds no KL; -inf is as in log_ratios.py.

    Raises:
        ValueError: shapes that do not fit; rewards that are not finite.
    """
    checks.is_floating("rewards", rewards)
    checks.is_floating("logprobs", logprobs)
    checks.is_floating("ref_logprobs", ref_logprobs)
    checks.is_tensor("loss_mask", loss_mask)
    checks.same_shape("loss_mask", loss_mask, "logprobs", logprobs)
    checks.same_shape("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.is_weight("beta", beta)
    checks.is_one_of("kind", kind, KL)
    if clamp_min is not None:
        checks.is_bound("clamp_min", clamp_min)
    checks.require(
        level in (Level.TOKEN, Level.PRODUCT),
        lambda: f"level must be Level.TOKEN or Level.PRODUCT, got {level!r}",
    )
    is_finite("rewards", rewards)
    sequence, B = sequence_ids(logprobs.shape, cu_seqlens, logprobs.device)
    checks.require(
        rewards.shape == (B,),
        lambda: f"rewards must be one per sequence, [{B}], got {list(rewards.shape)}",
    )
    counted = loss_mask.reshape(-1).bool()
    rows = counted.nonzero()[:, 0]
    last = rows[~has_next(sequence[rows])]
    rewards, logprobs, ref_logprobs = promoted(rewards, logprobs, ref_logprobs)
    # Of both not known: logprobs may be an inference engine's.
    d = log_ratio(logprobs, ref_logprobs).reshape(-1)
    d = d.where(counted & ~d.isnan(), 0.0)
    if level is Level.PRODUCT:
        d = torch.zeros_like(d).index_copy(0, last, segment_sum(d, sequence, B)[sequence[last]])
    k = kl_penalty(d, torch.zeros_like(d), value=kind)
    shaped = (-beta * (k if clamp_min is None else k.clamp(min=clamp_min))).where(counted, 0.0)
    return shaped.index_add(0, last, rewards[sequence[last]]).reshape(logprobs.shape)


class Moments(NamedTuple):
    """Of counted values, float64 and []: how many, their mean, their summed squared deviations."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, values: Tensor, loss_mask: Tensor | None = None) -> Moments:
        """Of values [...] where loss_mask [...] is True. Equal values have squares of exactly 0.

        Raises:
            ValueError: a counted value that is not finite.
        """
        checks.is_tensor("values", values)
        counted = values.double().reshape(-1)
        if loss_mask is not None:
            checks.is_tensor("loss_mask", loss_mask)
            checks.same_shape("loss_mask", loss_mask, "values", values)
            is_finite("values", values.where(loss_mask.bool(), 0.0))
            counted = counted[loss_mask.reshape(-1).bool()]
        else:
            is_finite("values", values)
        count = counted.new_tensor(len(counted))
        origin = counted[:1].sum()
        mean = origin + (counted - origin).sum() / count.clamp(min=1)
        return cls(count, mean, (counted - mean).square().sum())

    @classmethod
    def merged(cls, parts: Sequence[Moments]) -> Moments:
        """Of everything together, from the moments of its parts: of other ranks or micro-batches.

        The pairwise update of Chan, Golub and LeVeque (1983).

        Raises:
            ValueError: parts that are not one or more Moments.
        """

        def of_both(a: Moments, b: Moments) -> Moments:
            count = a.count + b.count
            share = b.count / count.clamp(min=1)
            gap = b.mean - a.mean
            squares = a.squares + b.squares + gap.square() * a.count * share
            return cls(count, a.mean + gap * share, squares)

        checks.require(
            isinstance(parts, Sequence)
            and len(parts) > 0
            and all(isinstance(part, Moments) for part in parts),
            lambda: f"parts must be Moments, one or more, got {checks.shown(parts)}",
        )
        return reduce(of_both, parts)


@torch.no_grad()
def whiten(
    values: Tensor,
    loss_mask: Tensor | None = None,
    *,
    statistics: Moments | None = None,
    keep_mean: bool = False,
    eps: float = 1e-8,
    ddof: int = 1,
) -> Tensor:
    """(values - mean) / sqrt(variance + eps), over the counted tokens. Equal values become 0.

    Whitening of advantages and rewards as in PPO for language models (Ziegler et al., arXiv
    1909.08593; "The N+ implementation details of RLHF with PPO", arXiv 2403.17031).

    Args:
        values: [...].
        loss_mask: [...] bool: True counts. None: all.
        statistics: what to whiten by, such as Moments.merged over ranks; None: those of values.
        keep_mean: whether the mean is added again: whitened rewards keep theirs, advantages do not.
        ddof: 1 for a sample's variance, 0 for a population's.

    Returns:
        [...], float32, or float64 for float64 values; 0 outside loss_mask.

    Raises:
        ValueError: a counted value that is not finite.
    """
    checks.is_tensor("values", values)
    checks.is_not_negative("eps", eps)
    checks.is_integer("ddof", ddof)
    checks.at_least("ddof", ddof, 0)
    checks.require(
        statistics is None or isinstance(statistics, Moments),
        lambda: f"statistics must be Moments or None, got {checks.shown(statistics)}",
    )
    count, mean, squares = Moments.of(values, loss_mask) if statistics is None else statistics
    deviation = (squares / (count - ddof).clamp(min=1) + eps).sqrt()
    white = (values.double() - mean) / deviation + (mean if keep_mean else 0.0)
    counted = white if loss_mask is None else white.where(loss_mask.bool(), 0.0)
    return counted.to(acc_dtype(values))


def length_rewards(lengths: Tensor, correct: Tensor, group_size: int | Tensor) -> Tensor:
    """0.5 - (length - shortest) / (longest - shortest) within the group; at most 0 where wrong.

    Kimi k1.5 (arXiv 2501.12599, section 2.3.3): to be added to the reward, times a weight. Short
    and right gains, long loses, and a wrong answer gains nothing by being short. A group of one
    length gets 0.

    Args:
        lengths: [B] numbers.
        correct: [B] bool.
        group_size: samples of each prompt, next to each other; or [B] int64 or int32, the group of
            each sample.

    Raises:
        ValueError: lengths and correct that do not fit each other or the groups.
    """
    checks.is_tensor("lengths", lengths)
    checks.is_tensor("correct", correct)
    groups = Groups.of("lengths", lengths, group_size)
    checks.same_shape("correct", correct, "lengths", lengths)
    length = lengths.to(acc_dtype(lengths))
    shortest = groups.samples(groups.rows(length, torch.inf).amin(-1, keepdim=True))
    longest = groups.samples(groups.rows(length, -torch.inf).amax(-1, keepdim=True))
    spread = longest - shortest
    bonus = (0.5 - (length - shortest) / spread).where(spread > 0, 0.0)
    return bonus.where(correct.bool(), bonus.clamp(max=0.0))


def overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """0 up to max_length - cache tokens, then falling in a line to -1 at max_length and beyond.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the reward.

    Args:
        lengths: [B] numbers.

    Raises:
        ValueError: cache outside 1 to max_length.
    """
    checks.is_tensor("lengths", lengths)
    checks.is_integer("max_length", max_length)
    checks.is_integer("cache", cache)
    checks.require(
        0 < cache <= max_length,
        lambda: f"cache must be 1 to max_length = {max_length}, got {cache}",
    )
    return ((max_length - cache - lengths.to(acc_dtype(lengths))) / cache).clamp(-1.0, 0.0)
