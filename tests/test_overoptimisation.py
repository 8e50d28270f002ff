"""Gold rewards against the KL: fits recover their curves, peaks are peaks, half is enough."""

import math

import pytest
import torch

from fused_rl.overoptimisation import RewardCurve, RewardForm, fit_reward_curve

KLS = [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 9.0, 16.0]


@pytest.mark.parametrize("form", list(RewardForm))
@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.4), (0.2, 0.3)])
def test_a_fit_recovers_the_curve(form, alpha, beta):
    for baseline in (0.0, -3.0):
        true = RewardCurve(form, alpha, beta, baseline)
        gold = [true.reward(kl) for kl in KLS]
        for given in (None, baseline):
            got = fit_reward_curve(KLS, gold, form=form, baseline=given)
            assert got.form is form
            assert got[1:] == pytest.approx((alpha, beta, baseline), rel=1e-9, abs=1e-12)


def test_a_kl_in_another_unit_moves_the_peak_by_the_same_factor():
    for form in RewardForm:
        gold = [RewardCurve(form, 1.5, 0.7).reward(kl) for kl in KLS]
        peak = fit_reward_curve([kl / 300 for kl in KLS], gold, form=form).kl_peak
        assert 300 * peak == pytest.approx(fit_reward_curve(KLS, gold, form=form).kl_peak)


def test_rewards_by_hand():
    assert RewardCurve(RewardForm.BEST_OF_N, 2.0, 0.5).reward(4.0) == 2 * (2 - 0.5 * 2)
    assert RewardCurve(RewardForm.RL, 2.0, 0.5).reward(math.e**2) == pytest.approx(math.e * 1.5)
    assert RewardCurve(RewardForm.RL, 2.0, 0.5).reward(0.0) == 0


@pytest.mark.parametrize(
    ("form", "kl_peak", "reward_peak", "kept"),
    [
        (RewardForm.BEST_OF_N, 4.0, 2.0, math.sqrt(2) - 0.5),
        (RewardForm.RL, math.exp(6), 0.5 * math.exp(3), (1 + math.log(2) / 2) / math.sqrt(2)),
    ],
)
def test_peaks_by_hand_and_what_half_the_kl_keeps(form, kl_peak, reward_peak, kept):
    curve = RewardCurve(form, 2.0, 0.5)
    assert curve.kl_peak == pytest.approx(kl_peak)
    assert curve.reward_peak == pytest.approx(reward_peak)
    assert curve.kl_budget() == pytest.approx(kl_peak / 2)
    assert curve.kl_budget(0.25) == pytest.approx(kl_peak / 4)
    assert curve.reward(curve.kl_budget()) / curve.reward_peak == pytest.approx(kept)
    for nearby in (0.9, 1.1):
        assert curve.reward(nearby * curve.kl_peak) < curve.reward_peak


@pytest.mark.parametrize("form", list(RewardForm))
def test_a_reward_that_never_falls_has_no_peak(form):
    curve = fit_reward_curve(KLS, [math.sqrt(kl) * (1 + kl) for kl in KLS], form=form, baseline=0)
    assert curve.kl_peak == curve.reward_peak == curve.kl_budget() == math.inf
    assert RewardCurve(RewardForm.RL, 1.0, 1e-6).kl_peak == math.inf


def test_a_reward_that_only_falls_peaks_at_the_reference():
    assert RewardCurve(RewardForm.BEST_OF_N, -1.0, 0.5).kl_peak == 0


@pytest.mark.parametrize("form", list(RewardForm))
def test_a_noisy_fit_is_the_least_of_squares(form):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(KLS), generator=generator).mul(0.1).tolist()
    true = RewardCurve(form, 1.5, 0.4, 2.0)
    gold = [true.reward(kl) + e for kl, e in zip(KLS, noise, strict=True)]
    got = fit_reward_curve(KLS, gold, form=form)

    def squares(curve: RewardCurve) -> float:
        return sum((curve.reward(kl) - y) ** 2 for kl, y in zip(KLS, gold, strict=True))

    for name in ("alpha", "beta", "baseline"):
        for step in (1e-3, -1e-3):
            assert squares(got) < squares(got._replace(**{name: getattr(got, name) + step}))


@pytest.mark.parametrize("form", list(RewardForm))
def test_a_fit_does_not_follow_the_default_device(form):
    gold = [RewardCurve(form, 1.5, 0.7, 2.0).reward(kl) for kl in KLS]
    expected = fit_reward_curve(KLS, gold, form=form)
    with torch.device("meta"):
        got = fit_reward_curve(KLS, gold, form=form)
    assert got[1:] == pytest.approx(expected[1:], rel=1e-9)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"3 numbers needs as many .* got \[0.0, 1.0, 2.0\]"):
        fit_reward_curve([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"2 numbers needs as many .* got \[1.0, 1.0\]"):
        fit_reward_curve([1.0, 1.0], [0.0, 1.0], baseline=0.0)
    with pytest.raises(ValueError, match=r"kl must be at least 0 .* got kl -1.0, reward 2.0"):
        fit_reward_curve([1.0, -1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"all be finite, got kl 1.0, reward nan"):
        fit_reward_curve([1.0], [math.nan])
    with pytest.raises(ValueError, match="must be as many, got 1 and 2"):
        fit_reward_curve([1.0], [1.0, 2.0])
