"""Diagnosis: each ailment alone is named with its numbers, and a healthy run is left in peace."""

import math
import re
from itertools import pairwise

import pytest
import torch

from fused_rl import diagnose
from fused_rl.diagnosis import Finding, Thresholds
from fused_rl.overoptimisation import RewardCurve, RewardForm

STEPS = 40


def run(**metrics) -> list[dict[str, float]]:
    """A healthy run, with some metrics replaced; each is a function of the step from 0 to 1."""
    healthy = {
        "kl": lambda x: 0.02 + 0.06 * x,
        "entropy": lambda x: 1.2 - 0.5 * x,
        "ratio_max": lambda x: 1.5 + x,
        "clip_fraction_low": lambda x: 0.01,
        "clip_fraction_high": lambda x: 0.05,
        "zero_gradient_fraction": lambda x: 0.3,
        "reward": lambda x: math.sqrt(x),
        "gold_reward": lambda x: math.sqrt(x),
        "length": lambda x: 300 + 20 * x,
    }
    curves = {**healthy, **metrics}
    steps = [i / (STEPS - 1) for i in range(STEPS)]
    return [{name: of(x) for name, of in curves.items() if of} for x in steps]


def test_a_healthy_run_is_left_in_peace():
    assert diagnose(run()) == []


def test_a_short_or_empty_history_says_nothing():
    assert diagnose([]) == []
    assert diagnose([{}] * 99) == []
    assert diagnose(run(entropy=lambda x: 1 - x, kl=lambda x: math.exp(9 * x))[-9:]) == []


def gold(x: float) -> float:
    """Of the fitted form, with its peak halfway: at a KL of 0.05."""
    return RewardCurve(RewardForm.BEST_OF_N, 2 * math.sqrt(0.05), 1.0).reward(0.02 + 0.06 * x)


@pytest.mark.parametrize(
    ("name", "metrics", "evidence"),
    [
        (
            "collapse",
            {"entropy": lambda x: 1.5 * math.exp(-6 * x)},
            r"entropy fell from 1.13 to 0.00518 nats",
        ),
        (
            "runaway",
            {"kl": lambda x: 0.001 * math.exp(6 * x)},
            r"KL went from 0.00139 to 0.0222 to 0.304 nats",
        ),
        ("runaway", {"ratio_max": lambda x: 1 + 4000 * x}, r"largest ratio is 4e\+03"),
        (
            "over-optimisation",
            {"gold_reward": lambda x: 1 - (x - 0.5) ** 2},
            r"Gold reward fell from 0.842 to 0.75 over the last 5 steps, while the KL rose to 0.0",
        ),
        (
            "length bias",
            {"length": lambda x: 300 + 400 * math.sqrt(x), "gold_reward": lambda x: 0.5},
            r"Length went from 378.7 to 689.5 tokens, .* correlation is 1.00",
        ),
        ("dead gradient", {"zero_gradient_fraction": lambda x: 0.97}, r"97.0% of the tokens"),
        (
            "clip saturation",
            {"clip_fraction_high": lambda x: 0.4 * x},
            r"1.0% of the tokens are clipped below and 37.9% above",
        ),
        (
            "unknown log-probs",
            {"unknown_fraction": lambda x: 0.02},
            r"2.0% of the tokens have a NaN",
        ),
        (
            "stuck",
            {"kl": lambda x: -1e-5 * x, "reward": lambda x: 0.2, "gold_reward": None},
            r"KL never exceeded 1e-05 nats, and reward went from 0.2 to 0.2",
        ),
    ],
)
def test_each_ailment_alone(name, metrics, evidence):
    (finding,) = diagnose(run(**metrics))
    assert isinstance(finding, Finding)
    assert finding.name == name
    assert re.search(evidence, finding.evidence), finding.evidence
    assert finding.advice.endswith(".")


def test_a_fit_finds_the_peak_that_the_kl_has_passed():
    """Though the last steps happen to rise."""
    history = run(gold_reward=gold)
    for a, b in pairwise(history[-5:]):
        b["gold_reward"] = a["gold_reward"] + 1e-9
    (finding,) = diagnose(history)
    assert finding.name == "over-optimisation"
    assert "past the peak of gold rewards" in finding.evidence


def test_a_known_peak_needs_no_gold_rewards():
    history = run(gold_reward=None)
    assert diagnose(history, kl_peak=0.1) == []
    (finding,) = diagnose(history, kl_peak=0.05)
    assert finding.evidence == "The KL is 0.0769, past the peak of gold rewards at 0.05."
    assert "half the KL of the peak, 0.025" in finding.advice
    assert diagnose(run(gold_reward=None, reward=lambda x: -x), kl_peak=0.05) == []


def test_length_that_gold_rewards_pay_for_is_no_bias():
    longer = {"length": lambda x: 300 + 400 * math.sqrt(x)}
    assert diagnose(run(**longer)) == []
    assert [f.name for f in diagnose(run(**longer, gold_reward=None))] == ["length bias"]
    unrelated = {"length": lambda x: 300 + 400 * x, "reward": lambda x: math.sin(40 * x)}
    assert diagnose(run(**unrelated, gold_reward=None)) == []
    assert diagnose(run(**longer, reward=lambda x: 0.5, gold_reward=None)) == []


def test_a_number_that_is_none_comes_before_everything():
    history = run(entropy=lambda x: math.exp(-20 * x))
    history[7]["kl"] = math.nan
    (finding,) = diagnose(history)
    assert (finding.name, finding.evidence) == ("not finite", "kl is nan at step 7.")


def test_several_ailments_come_gravest_first():
    history = run(
        entropy=lambda x: math.exp(-9 * x),
        kl=lambda x: 0.001 * math.exp(6 * x),
        zero_gradient_fraction=lambda x: 1.0,
        gold_reward=None,
    )
    assert [f.name for f in diagnose(history)] == ["collapse", "runaway", "dead gradient"]


def test_tensors_and_gaps_are_welcome():
    history = [{k: torch.tensor(v) for k, v in step.items()} for step in run()]
    for step in history[::2]:
        del step["gold_reward"]
    assert diagnose(history) == []


def test_thresholds_decide():
    history = run(zero_gradient_fraction=lambda x: 0.5)
    assert diagnose(history) == []
    (finding,) = diagnose(history, thresholds=Thresholds(idle_tokens=0.4))
    assert finding.name == "dead gradient"
    with pytest.raises(ValueError, match="window must be at least 2, got 1"):
        diagnose([], thresholds=Thresholds(window=1))
