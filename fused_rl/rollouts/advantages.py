"""Advantages: how much better a sample, or one of its tokens, was than expected.

Groups: rewards are [B] with the `group_size` samples of a prompt next to each other; or, for groups
of several sizes or in another order, a tensor [B] in the place of group_size says which group each
sample is of (groups.py). A group without differences, or of one sample, says nothing: its
advantages are exactly 0.

Tokens: rewards and values are [B, T], or packed [N] with cu_seqlens. Tokens outside loss_mask are
no steps: a counted token is followed by the next counted token of its sequence, and after the last
one the value is 0. Everything is detached.

Results are float32, or float64 for float64 inputs. Half precision is computed with in float32: it
has too few digits for a difference of rewards, and float16 no room for their squares.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.sequences import has_next, sequence_ids, suffix_scan
from fused_rl.reference import acc_dtype, promoted
from fused_rl.rollouts.groups import Groups
from fused_rl.rollouts.rewards import Moments, is_finite, whiten

__all__ = [
    "GAEOutput",
    "clipped_value_loss",
    "discounted_returns",
    "gae",
    "group_mean_advantages",
    "group_zscore_advantages",
    "leave_one_out_advantages",
    "length_weighted_advantages",
    "pass_at_k_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
]


def group_zscore_advantages(
    rewards: Tensor, group_size: int | Tensor, *, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """(reward - mean of the group) / (standard deviation of the group + eps).

    GRPO (arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: [B].
        group_size: samples of each prompt, next to each other; or [B] int64 or int32, the group of
            each sample, for groups of any size in any order.
        ddof: 1 for a sample's deviation, 0 for a population's.

    Raises:
        ValueError: rewards that are not finite, or not [B] floats with B a multiple of group_size;
            a tensor of groups that is not [B] integers.
    """
    checks.is_not_negative("eps", eps)
    checks.is_integer("ddof", ddof)
    checks.at_least("ddof", ddof, 0)
    groups, rows = _groups(rewards, group_size)
    centred = _centred(groups, rows)
    degrees = (groups.sizes - ddof).clamp(min=1)
    deviation = (centred.square().sum(-1, keepdim=True) / degrees).sqrt()
    return groups.samples(centred / (deviation + eps))


def group_mean_advantages(rewards: Tensor, group_size: int | Tensor) -> Tensor:
    """reward - mean of the group: no bias by difficulty (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: as group_zscore_advantages.
    """
    groups, rows = _groups(rewards, group_size)
    return groups.samples(_centred(groups, rows))


def leave_one_out_advantages(rewards: Tensor, group_size: int | Tensor) -> Tensor:
    """reward - mean of the others in the group: RLOO (arXiv 2402.14740).

    It is G / (G - 1) times group_mean_advantages: a baseline that the sample itself has no part in.

    Raises:
        ValueError: as group_zscore_advantages.
    """
    groups, rows = _groups(rewards, group_size)
    size = groups.sizes.to(rows.dtype)
    return groups.samples(_centred(groups, rows) * (size / (size - 1).clamp(min=1)))


def length_weighted_advantages(
    rewards: Tensor, lengths: Tensor, group_size: int | Tensor
) -> Tensor:
    """reward - sum(length * reward) / sum(length) over the group: OPO (arXiv 2505.23585).

    The baseline of least variance if a sample's squared gradient grows with its length.

    Args:
        rewards: [B].
        lengths: [B] numbers: tokens of each sample.

    Raises:
        ValueError: as group_zscore_advantages; lengths that are not [B].
    """
    groups, rows = _groups(rewards, group_size)
    checks.is_tensor("lengths", lengths)
    checks.same_shape("lengths", lengths, "rewards", rewards)
    weight = groups.rows(lengths.to(rows.dtype))
    total = weight.sum(-1, keepdim=True)
    baseline = (weight * rows).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    return groups.samples(_without_rounding(groups, rows, rows - baseline))


def pass_at_k_advantages(rewards: Tensor, group_size: int | Tensor, k: int) -> Tensor:
    """sum over the subsets S of k samples that hold this one of max(S) - max(S without it),
    divided by the number C(G, k) of subsets, G being the size of the sample's group.

    The sum over a group of advantage * grad log-probability is an unbiased gradient of E[max of k
    rewards], which for rewards of 0 and 1 is pass@k (PKPO, arXiv 2505.15201, with each subset's own
    leave-one-out baseline). With k = group_size only the best sample gets any: its lead over the
    second (arXiv 2503.19595). Sorted upwards and counted from 0, sample i gets

        sum over j < i of C(j, k - 2) / C(G, k) * (r[i] - r[j])

    Raises:
        ValueError: as group_zscore_advantages; k outside 2 to group_size, or to the size
            of the smallest group.
    """
    groups, rows = _groups(rewards, group_size)
    checks.is_integer("k", k)
    sizes, which = groups.sizes[:, 0].unique(return_inverse=True)
    every, G = sizes.tolist(), groups.shape[1]
    whose, least = "group_size", group_size
    if isinstance(group_size, Tensor):
        whose, least = "the smallest group", min(every, default=k)
    checks.require(2 <= k <= least, lambda: f"k must be 2 to {whose} = {least}, got {k}")
    shares = [[_share(j, size, k) for j in range(G)] for size in every]
    order = groups.rows(rewards.to(rows.dtype), torch.inf).argsort(-1)
    ordered = rows.gather(-1, order)
    lead = (ordered[:, :, None] - ordered[:, None, :]).tril()
    weights = lead.new_tensor(shares).reshape(len(every), 1, G)[which]
    return groups.samples(torch.zeros_like(rows).scatter(-1, order, (lead * weights).sum(-1)))


def _share(j: int, size: int, k: int) -> float:
    """C(j, k - 2) / C(size, k); 0 where there is no j-th sample."""
    return math.comb(j, k - 2) / math.comb(size, k) if j < size else 0.0


@torch.no_grad()
def discounted_returns(
    rewards: Tensor, loss_mask: Tensor, *, gamma: float = 1.0, cu_seqlens: Tensor | None = None
) -> Tensor:
    """return[t] = reward[t] + gamma * return[t + 1], the reward to go of each token.

    Args:
        rewards: [B, T] or [N]: per token, as of shape_rewards.
        loss_mask: the same shape, bool: True counts.
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Raises:
        ValueError: shapes that do not fit; a counted reward that is not finite.
    """
    checks.is_not_negative("gamma", gamma)
    rows, follows, (counted,) = _steps(loss_mask, cu_seqlens, rewards=rewards)
    return _placed(suffix_scan(counted, gamma * follows), rows, rewards)


class GAEOutput(NamedTuple):
    """In the shape of the rewards; 0 outside loss_mask. returns are what values should become."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> GAEOutput:
    """advantage[t] = delta[t] + gamma lam advantage[t + 1],
    delta[t] = reward[t] + gamma value[t + 1] - value[t];  returns = advantages + values.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16). All tokens at once: a scan of
    log2 N rounds, which divides by nothing and so knows no limit to lengths or discounts.

    Args:
        rewards: [B, T] or [N]: per token, as of shape_rewards.
        values: the same shape: the critic's, of the state before each token.
        loss_mask: the same shape, bool: True counts.
        gamma, lam: the discount, and the weight of longer returns, 0 to 1.
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Raises:
        ValueError: shapes that do not fit; a counted reward or value that is not finite.
    """
    checks.is_not_negative("gamma", gamma)
    checks.is_not_negative("lam", lam)
    rows, follows, (r, v) = _steps(loss_mask, cu_seqlens, rewards=rewards, values=values)
    delta = r + gamma * follows * v.roll(-1) - v
    advantages = suffix_scan(delta, gamma * lam * follows)
    return GAEOutput(*(_placed(x, rows, rewards) for x in (advantages, advantages + v)))


def reinforce_plus_plus_advantages(
    rewards: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float = 1.0,
    statistics: Moments | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns of every token, whitened over all tokens of all prompts: REINFORCE++ (2501.03262).

    Args:
        rewards: [B, T] or [N]: per token, with the KL inside (shape_rewards).
        loss_mask: the same shape, bool: True counts.
        statistics: moments of discounted_returns over all ranks; None: of these.
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Raises:
        ValueError: as discounted_returns.
    """
    returns = discounted_returns(rewards, loss_mask, gamma=gamma, cu_seqlens=cu_seqlens)
    return whiten(returns, loss_mask, statistics=statistics)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor,
    group_size: int | Tensor,
    loss_mask: Tensor,
    *,
    statistics: Moments | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """reward - mean of the group, at every token, whitened over all tokens of all prompts.

    REINFORCE++-baseline (arXiv 2501.03262): groups set the baseline, all of the batch
    the scale.

    Args:
        rewards: [B].
        loss_mask: [B, T] or [N], bool: True counts.
        statistics: moments of the centred rewards at the tokens of all ranks; None: of these.
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Raises:
        ValueError: as group_zscore_advantages; rewards that are not one per sequence.
    """
    checks.is_tensor("loss_mask", loss_mask)
    sequence, B = sequence_ids(loss_mask.shape, cu_seqlens, loss_mask.device)
    centred = group_mean_advantages(rewards, group_size)
    checks.require(
        centred.shape == (B,),
        lambda: f"rewards must be one per sequence, [{B}], got {list(rewards.shape)}",
    )
    return whiten(centred[sequence].reshape(loss_mask.shape), loss_mask, statistics=statistics)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2
) -> Tensor:
    """0.5 max((v - returns)^2, (clip(v, old - clip, old + clip) - returns)^2), per token.

    PPO's loss of the critic, as in "Implementation matters" (arXiv 2005.12729); its mean
    over the counted tokens is yours to take.

    Args:
        values: [...]: with gradient.
        old_values: [...]: of the critic that the advantages were formed with.
        returns: [...]: as of gae.

    Returns:
        [...], float32, or float64 for float64 inputs.

    Raises:
        ValueError: values that are not floating; shapes that differ; a clip that is not positive.
    """
    for name, tensor in (("values", values), ("old_values", old_values), ("returns", returns)):
        checks.is_floating(name, tensor)
        checks.same_shape(name, tensor, "values", values)
    checks.is_bound("clip", clip)
    checks.require(clip > 0, lambda: f"clip must be positive, got {clip}")
    values, old, target = promoted(values, old_values.detach(), returns.detach())
    near = torch.maximum(torch.minimum(values, old + clip), old - clip)
    return 0.5 * torch.maximum((values - target).square(), (near - target).square())


def _groups(rewards: Tensor, group_size: int | Tensor) -> tuple[Groups, Tensor]:
    """The groups, and rewards as their rows [P, G]."""
    checks.is_floating("rewards", rewards)
    groups = Groups.of("rewards", rewards, group_size)
    is_finite("rewards", rewards)
    return groups, groups.rows(rewards.to(acc_dtype(rewards)))


def _centred(groups: Groups, rows: Tensor) -> Tensor:
    """rows - mean of the group: [P, G], 0 where filled up."""
    mean = rows.sum(-1, keepdim=True) / groups.sizes
    return _without_rounding(groups, rows, rows - mean)


def _without_rounding(groups: Groups, rows: Tensor, advantages: Tensor) -> Tensor:
    """0.1 + 0.1 + 0.1 divided by 3 is not 0.1: equal rewards still have advantages of exactly 0."""
    filled = ~groups.counted
    equal = ((rows == rows[:, :1]) | filled).all(-1, keepdim=True)
    return advantages.masked_fill(equal | filled, 0.0)


def _steps(
    loss_mask: Tensor, cu_seqlens: Tensor | None, **tensors: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Counted tokens alone: their rows [M]; 1 where the next is of the same sequence; values."""
    checks.is_tensor("loss_mask", loss_mask)
    sequence, _ = sequence_ids(loss_mask.shape, cu_seqlens, loss_mask.device)
    rows = loss_mask.reshape(-1).nonzero()[:, 0]
    for name, tensor in tensors.items():
        checks.is_floating(name, tensor)
        checks.same_shape(name, tensor, "loss_mask", loss_mask)
    wide = acc_dtype(*tensors.values())
    counted = []
    for name, tensor in tensors.items():
        is_finite(name, tensor.where(loss_mask.bool(), 0.0))
        counted.append(tensor.reshape(-1)[rows].to(wide))
    return rows, has_next(sequence[rows]).to(wide), counted


def _placed(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """values [M] at their rows in the shape of like, 0 elsewhere."""
    flat = values.new_zeros(like.numel())
    return flat.index_copy(0, rows, values).reshape(like.shape)
