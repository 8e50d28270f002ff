"""Group advantages: by hand, and where a group says nothing."""

import pytest
import torch

from fused_rl import group_mean_advantages, group_zscore_advantages


def test_zscore_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 0.0, 0.0])
    deviation = (4 / 12) ** 0.5
    expected = [0.5 / (deviation + 1e-4)] * 4 + [1.5 / (3 * deviation + 1e-4)] * 4
    signs = torch.tensor([1, -1, -1, 1, 1, 1, -1, -1])
    got = group_zscore_advantages(rewards, 4)
    torch.testing.assert_close(got, torch.tensor(expected) * signs)


def test_zscore_of_a_population_and_another_eps():
    got = group_zscore_advantages(torch.tensor([0.0, 2.0]), 2, eps=1.0, ddof=0)
    torch.testing.assert_close(got, torch.tensor([-0.5, 0.5]))


def test_mean_only_by_hand():
    got = group_mean_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 3.0]), 2)
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, -0.5, 0.5, 1.0, -1.0]))


@pytest.mark.parametrize("advantages", [group_zscore_advantages, group_mean_advantages])
def test_equal_rewards_and_single_members_give_exactly_zero(advantages):
    assert (advantages(torch.full((6,), 0.1), 3) == 0).all()
    assert (advantages(torch.tensor([0.3, 0.7]), 1) == 0).all()
    assert advantages(torch.zeros(0), 4).shape == (0,)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"multiple of group_size = 4, got \[6\]"):
        group_zscore_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match=r"rewards must be float16.*got torch.int64"):
        group_mean_advantages(torch.zeros(4, dtype=torch.int64), 2)
