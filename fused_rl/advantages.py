"""Advantages from the rewards of groups of samples that answer the same prompt.

Rewards are [B] with the `group_size` samples of a prompt next to each other. A group without
differences, or of one sample, says nothing: its advantages are 0.
"""

from torch import Tensor

from fused_rl import checks


def group_zscore_advantages(
    rewards: Tensor, group_size: int, *, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """(reward - mean of the group) / (standard deviation of the group + eps).

    GRPO (arXiv 2402.03300, section 4.1.2). ddof: 1 for a sample's deviation, 0 for a population's.

    Raises:
        ValueError: rewards that are not [B] floats with B a multiple of group_size.
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    degrees = max(group_size - ddof, 1)
    deviation = (centred.square().sum(-1, keepdim=True) / degrees).sqrt()
    return _without_rounding(groups, centred / (deviation + eps)).reshape(-1)


def group_mean_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """reward - mean of the group: no bias by difficulty (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: rewards that are not [B] floats with B a multiple of group_size.
    """
    groups = _groups(rewards, group_size)
    return _without_rounding(groups, groups - groups.mean(-1, keepdim=True)).reshape(-1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    checks.is_floating("rewards", rewards)
    checks.require(
        rewards.dim() == 1 and group_size > 0 and len(rewards) % group_size == 0,
        lambda: (
            f"rewards must be [B] with B a multiple of group_size = {group_size}, "
            f"got {list(rewards.shape)}"
        ),
    )
    return rewards.reshape(-1, group_size)


def _without_rounding(groups: Tensor, advantages: Tensor) -> Tensor:
    """0.1 + 0.1 + 0.1 divided by 3 is not 0.1: equal rewards still have advantages of exactly 0."""
    equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)
