"""Schedules: each formula by hand, and that the controller holds its target."""

import math

import pytest

from fused_rl.schedules import AdaptiveBeta, Anneal, AnnealedBeta, FixedBeta


def test_fixed():
    schedule = FixedBeta(0.1)
    assert schedule.update(1e9, 5) == schedule.beta == 0.1


def test_adaptive_by_hand():
    schedule = AdaptiveBeta(0.1, target=6.0, horizon=100)
    assert schedule.update(6.6, 10) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    assert schedule.beta == pytest.approx(0.101)
    assert schedule.update(600.0, 10) == pytest.approx(0.101 * 1.02)
    assert schedule.update(-3.0, 100) == pytest.approx(0.101 * 1.02 * 0.8)
    assert schedule.update(6.0, 100) == schedule.beta


def test_adaptive_stays_within_its_limits():
    schedule = AdaptiveBeta(0.1, target=1.0, horizon=1, lowest=0.05, highest=0.2)
    assert [schedule.update(10.0) for _ in range(9)][-1] == 0.2
    assert [schedule.update(0.0) for _ in range(9)][-1] == 0.05


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_adaptive_holds_its_target_where_more_beta_means_less_kl(start):
    """With KL = 0.3 / beta the beta for a KL of 6 is 0.05."""
    schedule = AdaptiveBeta(start, target=6.0, horizon=5)
    for _ in range(400):
        schedule.update(0.3 / schedule.beta)
    assert schedule.beta == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        (Anneal.LINEAR, 0.775, 0.55),
        (Anneal.COSINE, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55),
        (Anneal.EXPONENTIAL, 10**-0.25, 10**-0.5),
    ],
)
def test_annealed_by_hand(shape, quarter, half):
    schedule = AnnealedBeta(1.0, 0.1, steps=20, shape=shape)
    assert schedule.beta == 1.0
    assert schedule.update(math.nan, 5) == pytest.approx(quarter)
    assert schedule.update(0.0, 5) == pytest.approx(half)
    assert schedule.update(0.0, 10) == pytest.approx(0.1)
    assert schedule.update(0.0) == pytest.approx(0.1)


def test_annealing_to_nothing_ends_at_nothing():
    assert AnnealedBeta(1.0, 0.0, steps=3).update(0.0, 3) == 0.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"target must be positive, got 0.0"):
        AdaptiveBeta(0.1, target=0.0)
    with pytest.raises(ValueError, match=r"horizon must be positive, got -1"):
        AdaptiveBeta(0.1, target=1.0, horizon=-1)
    with pytest.raises(ValueError, match="kl must be a number, got nan"):
        AdaptiveBeta(0.1, target=1.0).update(math.nan)
    with pytest.raises(ValueError, match="n must be 0 to horizon = 2, got 3"):
        AdaptiveBeta(0.1, target=1.0, horizon=2).update(1.0, 3)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        AnnealedBeta(1.0, 0.1, steps=0)
    with pytest.raises(ValueError, match=r"exponential way needs start, end > 0, got 1.0, 0.0"):
        AnnealedBeta(1.0, 0.0, steps=3, shape=Anneal.EXPONENTIAL)
