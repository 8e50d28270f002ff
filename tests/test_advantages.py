"""Advantages: of groups and of tokens, by hand, against loops, and where nothing is to be said."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rl.advantages import (
    clipped_value_loss,
    discounted_returns,
    gae,
    group_mean_advantages,
    group_zscore_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)
from fused_rl.rewards import Moments, length_rewards, whiten


def length_weighted(rewards, group_size):
    return length_weighted_advantages(rewards, torch.arange(len(rewards)), group_size)


OF_GROUPS = [
    group_zscore_advantages,
    group_mean_advantages,
    leave_one_out_advantages,
    length_weighted,
]


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


def test_leave_one_out_by_hand_and_against_a_loop():
    got = leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0]), 3)
    torch.testing.assert_close(got, torch.tensor([-3.0, -1.5, 4.5]))
    rewards = torch.randn(20, dtype=torch.float64)
    expected = [
        rewards[i]
        - torch.stack([rewards[j] for j in range(i // 5 * 5, i // 5 * 5 + 5) if j != i]).mean()
        for i in range(20)
    ]
    torch.testing.assert_close(leave_one_out_advantages(rewards, 5), torch.stack(expected))


def test_length_weighted_by_hand():
    rewards, lengths = torch.tensor([1.0, 4.0, 2.0, 2.0]), torch.tensor([30, 10, 5, 9])
    got = length_weighted_advantages(rewards, lengths, 2)
    torch.testing.assert_close(got, torch.tensor([-0.75, 2.25, 0.0, 0.0]))
    assert length_weighted_advantages(rewards, lengths * 0, 2).tolist() == [1, 4, 0, 0]


@pytest.mark.parametrize("k", [2, 3, 5, 6])
def test_pass_at_k_against_all_subsets(k):
    rewards = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.0, 3.5], dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for subset in combinations(range(6), k):
        for i in subset:
            rest = [rewards[j] for j in subset if j != i]
            best = max(rewards[j] for j in subset)
            expected[i] += (best - max(rest)) / math.comb(6, k)
    torch.testing.assert_close(pass_at_k_advantages(rewards, 6, k), expected)


def test_pass_at_all_of_them_is_the_lead_of_the_best():
    got = pass_at_k_advantages(torch.tensor([1.0, 5.0, 3.0, 0.0, 2.0, 2.0]), 3, 3)
    assert got.tolist() == [0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("advantages", [*OF_GROUPS, partial(pass_at_k_advantages, k=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_and_single_members_give_exactly_zero(advantages, dtype):
    assert (advantages(torch.full((6,), 0.1, dtype=dtype), 3) == 0).all()
    if advantages in OF_GROUPS:
        assert (advantages(torch.tensor([0.3, 0.7], dtype=dtype), 1) == 0).all()
    assert advantages(torch.zeros(0, dtype=dtype), 4).shape == (0,)


@pytest.mark.parametrize("advantages", OF_GROUPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(advantages, bad):
    with pytest.raises(ValueError, match=rf"rewards must be finite, got {bad} at index \[2\]"):
        advantages(torch.tensor([0.0, 1.0, bad, bad]), 2)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"multiple of group_size = 4, got \[6\]"):
        group_zscore_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match=r"rewards must be float16.*got torch.int64"):
        group_mean_advantages(torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"lengths \[2\] and rewards \[4\]"):
        length_weighted_advantages(torch.zeros(4), torch.zeros(2), 2)
    for k in (1, 5):
        with pytest.raises(ValueError, match=f"k must be 2 to group_size = 4, got {k}"):
            pass_at_k_advantages(torch.zeros(4), 4, k)


OF_ANY_GROUPS = [
    *OF_GROUPS,
    partial(pass_at_k_advantages, k=2),
    partial(group_zscore_advantages, eps=1e-6, ddof=0),
    lambda rewards, group_size: length_rewards(rewards.abs(), rewards > 0, group_size),
]


def weighted_by(lengths):
    return lambda rewards, groups: length_weighted_advantages(rewards, lengths, groups)


@pytest.mark.parametrize("advantages", OF_ANY_GROUPS)
def test_groups_of_one_size_are_the_same_numbers_by_their_names(advantages):
    rewards = torch.randn(12)
    expected = advantages(rewards, 4)
    names = torch.tensor([7, -3, 7000]).repeat_interleave(4)
    assert torch.equal(advantages(rewards, names), expected)
    assert torch.equal(advantages(rewards, names.int()), expected)


@pytest.mark.parametrize("advantages", [a for a in OF_ANY_GROUPS if a is not length_weighted])
def test_groups_of_several_sizes_in_any_order(advantages):
    """Each group has what it has alone, wherever its samples stand."""
    names = torch.tensor([5, 2, 9, 5, 5, 2, 9, 5, 2, 5])
    rewards = torch.randn(10, dtype=torch.float64)
    got = advantages(rewards, names)
    assert got.dtype == torch.float64
    for name in (2, 5, 9):
        mine = names == name
        torch.testing.assert_close(got[mine], advantages(rewards[mine], int(mine.sum())))


def test_lengths_of_groups_of_several_sizes():
    names = torch.tensor([1, 0, 1, 1, 0])
    rewards, lengths = torch.randn(5), torch.tensor([10, 20, 30, 7, 5])
    got = weighted_by(lengths)(rewards, names)
    for name, size in ((0, 2), (1, 3)):
        mine = names == name
        expected = weighted_by(lengths[mine])(rewards[mine], size)
        torch.testing.assert_close(got[mine], expected)


@pytest.mark.parametrize("advantages", OF_GROUPS)
def test_a_sample_alone_and_equal_rewards_among_larger_groups_say_nothing(advantages):
    got = advantages(torch.tensor([0.3, 0.1, 5.0, 0.1, 0.1, 7.0]), torch.tensor([4, 1, 2, 1, 1, 2]))
    assert (got[[0, 1, 3, 4]] == 0).all()
    assert (got[[2, 5]] != 0).all()


@pytest.mark.parametrize("advantages", OF_ANY_GROUPS)
def test_no_samples_in_no_groups(advantages):
    assert advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_baseline_of_groups_of_several_sizes():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    rewards, names = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, 1, 0])
    got = reinforce_plus_plus_baseline_advantages(rewards, names, mask)
    centred = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(got, whiten(centred, mask))


def test_mistakes_in_groups_are_named():
    said = r"which group each of rewards \[4\] is of, got a tensor \[2\] of torch.int64"
    with pytest.raises(ValueError, match=said):
        group_mean_advantages(torch.zeros(4), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="group_size must be an int64 or int32 tensor"):
        leave_one_out_advantages(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="k must be 2 to the smallest group = 1, got 2"):
        pass_at_k_advantages(torch.zeros(4), torch.tensor([1, 1, 1, 2]), 2)


def naive_gae(rewards, values, mask, gamma, lam):
    """The recursion, backwards over each sequence's counted tokens."""
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        following, next_value = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[b, t]:
                delta = rewards[b, t] + gamma * next_value - values[b, t]
                following = delta + gamma * lam * following
                next_value = values[b, t]
                out[b, t] = following
    return out


def test_gae_by_hand():
    """Deltas -0.5, 0.25, 0.5 with gamma = lam = 0.5; the token between does not count."""
    rewards = torch.tensor([[0.0, 9.0, 0.5, 1.0]])
    values = torch.tensor([[0.75, 9.0, 0.5, 0.5]])
    mask = torch.tensor([[True, False, True, True]])
    got = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(got.advantages, torch.tensor([[-0.40625, 0.0, 0.375, 0.5]]))
    torch.testing.assert_close(got.returns, torch.tensor([[0.34375, 0.0, 0.875, 1.0]]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    st.integers(0, 99),
)
def test_gae_against_the_recursion_padded_and_packed(B, T, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.7
    expected = naive_gae(rewards, values, mask, gamma, lam)
    dirty = [t.masked_fill(~mask, math.nan) for t in (rewards, values)]
    got = gae(*dirty, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(got.advantages, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.returns, (expected + values).where(mask, 0.0))
    packed = gae(
        rewards[mask],
        values[mask],
        mask[mask],
        gamma=gamma,
        lam=lam,
        cu_seqlens=torch.cat([torch.zeros(1), mask.sum(-1).cumsum(0)]).long(),
    )
    assert torch.equal(packed.advantages, got.advantages[mask])
    assert torch.equal(packed.returns, got.returns[mask])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1e-3, 1e-3)])
def test_gae_of_four_thousand_tokens_is_exact(gamma, lam):
    """Dividing by powers of gamma lam would overflow here; nothing is divided."""
    rewards, values = torch.randn(2, 2, 4096, dtype=torch.float64)
    mask = torch.ones(2, 4096).bool()
    expected = naive_gae(rewards, values, mask, gamma, lam)
    got = gae(rewards, values, mask, gamma=gamma, lam=lam).advantages
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-12)


def test_gae_with_lam_one_is_return_minus_value_and_with_lam_zero_the_td_error():
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64)
    mask = torch.ones(3, 6).bool()
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(gae(rewards, values, mask, lam=1.0).advantages, to_go - values)
    torch.testing.assert_close(gae(rewards, values, mask, lam=1.0).returns, to_go)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(
        gae(rewards, values, mask, lam=0.0).advantages, rewards + following - values
    )


def test_returns_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    got = discounted_returns(rewards, mask, gamma=0.5)
    torch.testing.assert_close(got, torch.tensor([[3.0, 4.0, 4.0], [16.0, 16.0, 0.0]]))
    packed = discounted_returns(
        rewards[mask], torch.ones(5).bool(), gamma=0.5, cu_seqlens=torch.tensor([0, 3, 5])
    )
    assert torch.equal(packed, got[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_come_back_wide_and_without_gradient(dtype):
    values = torch.randn(2, 3).to(dtype).requires_grad_()
    got = gae(torch.randn(2, 3).to(dtype), values, torch.ones(2, 3).bool())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.advantages.dtype == got.returns.dtype == wide
    assert not got.returns.requires_grad


def test_nothing_counted_gives_nothing():
    for shape in ((2, 3), (0, 3), (2, 0)):
        zeros, mask = torch.zeros(shape), torch.zeros(shape).bool()
        assert torch.equal(gae(zeros, zeros, mask).advantages, zeros)
        assert torch.equal(discounted_returns(zeros, mask), zeros)
        assert torch.equal(reinforce_plus_plus_advantages(zeros, mask), zeros)


def test_reinforce_plus_plus_by_hand():
    """Returns 1, 1, 3: mean 5/3, variance 4/3."""
    rewards = torch.tensor([[0.0, 1.0], [3.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    got = reinforce_plus_plus_advantages(rewards, mask)
    expected = torch.tensor([[-2.0, -2.0], [4.0, 0.0]]) / 3 / math.sqrt(4 / 3)
    torch.testing.assert_close(got, expected)


def test_reinforce_plus_plus_baseline_by_hand():
    """Centred rewards -1, 1 with one and three tokens: mean 0.5, variance 1."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    got = reinforce_plus_plus_baseline_advantages(torch.tensor([1.0, 3.0]), 2, mask)
    torch.testing.assert_close(got, torch.tensor([[-1.5, 0, 0], [0.5, 0.5, 0.5]]))
    packed = reinforce_plus_plus_baseline_advantages(
        torch.tensor([1.0, 3.0]), 2, torch.ones(4).bool(), cu_seqlens=torch.tensor([0, 1, 4])
    )
    assert torch.equal(packed, got[mask])
    equal = reinforce_plus_plus_baseline_advantages(torch.full((2,), 0.1), 2, mask)
    assert (equal == 0).all()
    with pytest.raises(ValueError, match=r"one per sequence, \[2\], got \[4\]"):
        reinforce_plus_plus_baseline_advantages(torch.zeros(4), 2, mask)


def test_ranks_with_common_statistics_agree_with_one_that_sees_all():
    rewards, mask = torch.randn(4, 5, dtype=torch.float64), torch.ones(4, 5).bool()
    whole = reinforce_plus_plus_advantages(rewards, mask)
    halves = [slice(0, 2), slice(2, 4)]
    common = Moments.merged([Moments.of(discounted_returns(rewards[h], mask[h])) for h in halves])
    parts = [reinforce_plus_plus_advantages(rewards[h], mask[h], statistics=common) for h in halves]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),
        (2.0, 1.0, 1.5, 0.125, 0.5),
        (0.0, 1.0, 3.0, 4.5, -3.0),
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, slope):
    leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, target = (torch.tensor([x], dtype=torch.float64) for x in (old, target))
    got = clipped_value_loss(leaf, old, target)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert leaf.grad.item() == pytest.approx(slope)


def test_value_loss_is_never_below_the_plain_one_and_equals_it_without_clipping():
    values, old, target = torch.randn(3, 99, dtype=torch.float64)
    plain = 0.5 * (values - target).square()
    assert (clipped_value_loss(values, old, target) >= plain).all()
    torch.testing.assert_close(clipped_value_loss(values, old, target, clip=1e9), plain)


def test_mistakes_over_tokens_are_named():
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"values \[3\] and loss_mask \[2, 3\]"):
        gae(zeros, zeros[0], mask)
    with pytest.raises(ValueError, match=r"values must be finite, got nan at index \[1, 2\]"):
        gae(
            zeros, zeros.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), mask
        )
    with pytest.raises(ValueError, match=r"packed tokens must be \[N\], got \[2, 3\]"):
        discounted_returns(zeros, mask, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"clip must be positive, got 0.0"):
        clipped_value_loss(zeros, zeros, zeros, clip=0.0)
    with pytest.raises(ValueError, match=r"returns \[3\] and values \[2, 3\]"):
        clipped_value_loss(zeros, zeros, zeros[0])
