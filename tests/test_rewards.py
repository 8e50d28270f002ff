"""Rewards: the KL inside them, whitening, and what lengths add; by hand and against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rl import KL, Level
from fused_rl.rewards import Moments, length_rewards, overlong_penalty, shape_rewards, whiten

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
LOGPROBS = torch.tensor([[-1.0, -2.0, 9.0, 9.0], [9.0, -0.5, 9.0, -1.0], [9.0, 9.0, 9.0, 9.0]])
REF = torch.tensor([[-1.5, -1.0, -9.0, 0.0], [0.0, -1.5, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
REWARDS = torch.tensor([1.0, -3.0, 7.0])


def test_shaped_by_hand():
    """d is 0.5, -1 in the first sequence and 1, 0 in the second; the third has no token."""
    got = shape_rewards(REWARDS, LOGPROBS, REF, MASK, beta=0.1)
    expected = [[-0.05, 1.1, 0, 0], [0, -0.1, 0, -3.0], [0, 0, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_clamped_at_zero_by_hand():
    got = shape_rewards(REWARDS, LOGPROBS, REF, MASK, beta=0.1, clamp_min=0.0)
    expected = [[-0.05, 1.0, 0, 0], [0, -0.1, 0, -3.0], [0, 0, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_of_the_sum_by_hand():
    """k2 of -0.5 and of 1."""
    got = shape_rewards(REWARDS, LOGPROBS, REF, MASK, beta=0.1, kind=KL.K2, level=Level.PRODUCT)
    expected = [[0, 1 - 0.0125, 0, 0], [0, 0, 0, -3.05], [0, 0, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("kind", list(KL))
@pytest.mark.parametrize("level", [Level.TOKEN, Level.PRODUCT])
def test_packed_equals_padded(kind, level):
    options = {"beta": torch.tensor(0.3), "kind": kind, "level": level}
    padded = shape_rewards(REWARDS, LOGPROBS, REF, MASK, **options)
    packed = shape_rewards(
        REWARDS,
        LOGPROBS[MASK],
        REF[MASK],
        torch.ones(4).bool(),
        cu_seqlens=torch.tensor([0, 2, 4, 4]),
        **options,
    )
    assert torch.equal(packed, padded[MASK])
    assert (padded[~MASK] == 0).all()


def test_rewards_have_no_gradient_and_inputs_stay():
    leaf = LOGPROBS.clone().requires_grad_()
    rewards = REWARDS.clone()
    assert not shape_rewards(rewards, leaf, REF, MASK, beta=0.1).requires_grad
    assert torch.equal(rewards, REWARDS)
    assert torch.equal(leaf.detach(), LOGPROBS)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_reaches_nothing(garbage):
    expected = shape_rewards(REWARDS, LOGPROBS, REF, MASK, beta=0.1, kind=KL.K3)
    dirty = LOGPROBS.where(MASK, garbage)
    assert torch.equal(shape_rewards(REWARDS, dirty, REF, MASK, beta=0.1, kind=KL.K3), expected)


def test_mistakes_in_shaping_are_named():
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan at index \[1\]"):
        shape_rewards(torch.tensor([0.0, math.nan, 0.0]), LOGPROBS, REF, MASK, beta=0.1)
    with pytest.raises(ValueError, match=r"one per sequence, \[3\], got \[2\]"):
        shape_rewards(REWARDS[:2], LOGPROBS, REF, MASK, beta=0.1)
    with pytest.raises(ValueError, match=r"ref_logprobs \[4\] and logprobs \[3, 4\]"):
        shape_rewards(REWARDS, LOGPROBS, REF[0], MASK, beta=0.1)
    with pytest.raises(ValueError, match=r"level must be .* got <Level.GEOMETRIC"):
        shape_rewards(REWARDS, LOGPROBS, REF, MASK, beta=0.1, level=Level.GEOMETRIC)


def test_whitening_by_hand():
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, math.nan, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    deviation = math.sqrt(20 / 3)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / deviation
    torch.testing.assert_close(whiten(values, mask), expected)
    torch.testing.assert_close(
        whiten(values, mask, keep_mean=True), (expected + 4).where(mask, 0.0)
    )
    torch.testing.assert_close(whiten(values, mask, ddof=0), expected * deviation / math.sqrt(5))


floats = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(floats, st.integers(0, 40), st.booleans())
def test_merged_moments_are_those_of_everything(values, cut, single):
    x = torch.tensor(values, dtype=torch.float64)
    parts = [Moments.of(p) for p in (x.split(1) if single else (x[:cut], x[cut:]))]
    whole, merged = Moments.of(x), Moments.merged(parts)
    assert merged.count == len(values)
    assert merged.mean.item() == pytest.approx(x.mean().item(), abs=1e-10)
    variance = x.var(correction=0).item()
    for m in (whole, merged):
        assert (m.squares / m.count).item() == pytest.approx(variance, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(floats, st.booleans())
def test_whitened_values_have_mean_zero_and_variance_one(values, keep_mean):
    x = torch.tensor(values, dtype=torch.float64)
    white = whiten(x, eps=0.0 if x.std() > 1e-3 else 1e-8, keep_mean=keep_mean)
    assert white.mean().item() == pytest.approx(x.mean().item() if keep_mean else 0, abs=1e-8)
    if x.std() > 1e-3:
        assert white.var().item() == pytest.approx(1, rel=1e-8)


def test_ranks_with_common_statistics_whiten_as_one():
    x = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.7
    common = Moments.merged([Moments.of(x[b], mask[b]) for b in range(3)])
    got = torch.stack([whiten(x[b], mask[b], statistics=common) for b in range(3)])
    torch.testing.assert_close(got, whiten(x, mask), atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_values_whiten_to_exactly_zero(n, dtype):
    x = torch.full((n,), 0.1, dtype=dtype)
    assert (whiten(x) == 0).all()
    assert whiten(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    parts = Moments.merged([Moments.of(x[:1]), Moments.of(x), Moments.of(x[:0])])
    assert (whiten(x, statistics=parts) == 0).all()


def test_mistakes_in_whitening_are_named():
    with pytest.raises(ValueError, match=r"values must be finite, got inf at index \[1, 0\]"):
        whiten(torch.tensor([[0.0], [math.inf]]))
    with pytest.raises(ValueError, match=r"loss_mask \[2\] and values \[2, 1\]"):
        Moments.of(torch.zeros(2, 1), torch.ones(2).bool())
    assert isinstance(Moments.of(torch.zeros(2)), Moments)


def test_length_rewards_by_hand():
    lengths = torch.tensor([100, 200, 150, 100, 70, 70])
    correct = torch.tensor([True, True, False, True, False, True])
    got = length_rewards(lengths, correct, 3)
    expected = [0.5, -0.5, 0.0, 0.5 - 30 / 30, 0.0, 0.5]
    torch.testing.assert_close(got, torch.tensor(expected))
    wrong = length_rewards(lengths, torch.zeros(6).bool(), 3)
    torch.testing.assert_close(wrong, torch.tensor([0.0, -0.5, 0.0, -0.5, 0.0, 0.0]))


def test_equal_lengths_earn_nothing():
    assert (length_rewards(torch.full((4,), 9), torch.ones(4).bool(), 2) == 0).all()
    assert (length_rewards(torch.tensor([3, 5]), torch.ones(2).bool(), 1) == 0).all()


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 80, 90, 95, 100, 500])
    got = overlong_penalty(lengths, max_length=100, cache=20)
    torch.testing.assert_close(got, torch.tensor([0, 0, -0.5, -0.75, -1, -1]))


def test_mistakes_in_lengths_are_named():
    with pytest.raises(ValueError, match=r"cache must be 1 to max_length = 100, got 0"):
        overlong_penalty(torch.zeros(1), max_length=100, cache=0)
    with pytest.raises(ValueError, match=r"multiple of group_size = 2, got \[3\]"):
        length_rewards(torch.zeros(3), torch.zeros(3).bool(), 2)
    with pytest.raises(ValueError, match=r"correct \[2\] and lengths \[3\]"):
        length_rewards(torch.zeros(3), torch.zeros(2).bool(), 3)
