"""Diagnosis: each ailment alone is named with its numbers, and a healthy run is left in peace."""

import math
import random
import re
import statistics
from itertools import pairwise

import pytest
import torch

from fused_rl import diagnose
from fused_rl.diagnosis import Finding, Thresholds
from fused_rl.overoptimisation import RewardCurve, RewardForm
from fused_rl.rollouts.diagnosis.history import Run

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


def test_chance_is_no_fall():
    """Of a curve that is flat but for noise, an earlier window is nearly always the best one."""

    def fell(drop: float, seed: int) -> bool:
        noise = random.Random(seed)
        steps = [{"gold_reward": noise.gauss(-drop * (i > 25), 1.0)} for i in range(STEPS)]
        return Run(steps, window=5, kl_peak=None).fell("gold_reward")

    assert sum(fell(0.0, seed) for seed in range(200)) <= 10
    assert all(fell(4.0, seed) for seed in range(200))


def test_a_known_peak_needs_no_more_than_a_better_window():
    """It says itself that gold rewards fall beyond it."""
    noise = random.Random(1)
    history = run(gold_reward=lambda x: 1.0 + 0.1 * noise.gauss(0.0, 1.0))
    assert diagnose(history) == []
    (finding,) = diagnose(history, kl_peak=0.05)
    assert "past the peak of gold rewards at 0.05" in finding.evidence


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


# Preferences


def preferences(**metrics) -> list[dict[str, float]]:
    """A healthy run of a PreferenceLoss, with some metrics replaced or left out."""
    healthy = {
        "reward_chosen": lambda x: 0.5 * x,
        "reward_rejected": lambda x: -1.5 * x,
        "margin": lambda x: 2 * x,
        "accuracy": lambda x: 0.5 + 0.3 * math.sqrt(x),
        "log_ratio": lambda x: -5 * x,
        "logprobs_chosen": lambda x: -200 - 20 * x,
        "logprobs_rejected": lambda x: -210 - 40 * x,
        "length_chosen": lambda x: 200 + 3 * math.sin(50 * x),
        "length_rejected": lambda x: 195 + 3 * math.cos(90 * x),
        "length_bias": lambda x: 0.4 * math.sin(70 * x),
        "entropy": lambda x: 1.2 - 0.3 * x,
        "empty_fraction": lambda x: 0.0,
        "unknown_fraction": lambda x: 0.0,
        "loss": lambda x: 0.7 - 0.4 * x,
    }
    curves = {**healthy, **metrics}
    steps = [i / (STEPS - 1) for i in range(STEPS)]
    return [{name: of(x) for name, of in curves.items() if of} for x in steps]


def longer(x: float) -> float:
    """Steps whose chosen is the longer one by up to 30 tokens, and no trend."""
    return 30 * math.sin(1e4 * x)


def test_healthy_preferences_are_left_in_peace():
    assert diagnose(preferences()) == []


@pytest.mark.parametrize(
    ("name", "metrics", "evidence"),
    [
        (
            "likelihood displacement",
            {"logprobs_chosen": lambda x: -200 - 100 * x},
            r"margin rose from 0.103 to 1.9, .* chosen went from -205.1 to -294.9 nats, 0.45 per "
            r"token, that of the rejected from -212.1 to -247.9",
        ),
        (
            "likelihood displacement",
            {"logprobs_chosen": lambda x: -200 - 100 * x, "logprobs_rejected": None},
            r"-294.9 nats, 0.45 per token\.",
        ),
        (
            "length bias",
            {"length_bias": lambda x: 0.7 if x > 0.3 else 0.0},
            r"chosen is longer: over the pairs of a step, .* is 0.70",
        ),
        (
            "length bias",
            {"length_bias": lambda x: -0.65},
            r"chosen is shorter: over the pairs of a step, .* is -0.65",
        ),
        (
            "length bias",
            {
                "length_bias": None,
                "length_chosen": lambda x: 200 + longer(x),
                "length_rejected": lambda x: 200,
                "margin": lambda x: 2 * x + 0.05 * longer(x),
            },
            r"chosen is longer: over steps, from one to the next, .* is 1.00",
        ),
        (
            "saturated pairs",
            {
                "accuracy": lambda x: 1.0,
                "loss": None,
                "margin": lambda x: 20 * x,
            },
            r"accuracy was 1 and the margin 10.*, where the loss is 3.\de-05",
        ),
        (
            "saturated pairs",
            {"accuracy": lambda x: 1.0, "loss": lambda x: 0.0},
            r"accuracy was 1 and the margin 1.*, where the loss is 0:",
        ),
        (
            "unknown reference",
            {"unknown_fraction": lambda x: 0.02},
            r"2.0% of the reference's log-probs are NaN",
        ),
        ("empty completions", {"empty_fraction": lambda x: 0.03}, r"3.0% of the sequences"),
        (
            "nothing learnt",
            {"accuracy": lambda x: 0.52 - 0.01 * x, "margin": lambda x: 1e-3 * x},
            r"accuracy is 0.511 in the end, and the margin went from 5.1e-05 to 0.00095",
        ),
    ],
)
def test_each_ailment_of_preferences_alone(name, metrics, evidence):
    (finding,) = diagnose(preferences(**metrics))
    assert finding.name == name
    assert re.search(evidence, finding.evidence), finding.evidence
    assert finding.advice.endswith(".")


def test_displacement_is_per_token_and_of_growing_margins():
    """Of answers that get longer, or where the pairs are not told apart, a fall is none."""
    falling = {"logprobs_chosen": lambda x: -200 - 100 * x}
    assert diagnose(preferences(**falling, length_chosen=lambda x: 200 + 100 * x)) == []
    unlearnt = {"margin": lambda x: 0.1 - 0.1 * x}
    assert diagnose(preferences(**falling, **unlearnt)) == []
    assert diagnose(preferences(**falling, length_chosen=None)) == []
    none = preferences(length_chosen=lambda x: 0.0, logprobs_chosen=lambda x: 0.0)
    assert diagnose(none) == []


def test_margins_and_lengths_that_only_share_a_trend_are_no_bias():
    trend = preferences(
        length_bias=None, length_chosen=lambda x: 200 + 40 * x + math.sin(300 * x**2)
    )
    assert diagnose(trend) == []
    both = [(s["length_chosen"] - s["length_rejected"], s["margin"]) for s in trend]
    assert statistics.correlation(*zip(*both, strict=True)) > 0.9


def test_length_bias_is_of_trained_margins_and_not_of_what_gold_rewards_pay_for():
    assert diagnose(preferences(length_bias=lambda x: 0.9 * (x < 0.4))) == []
    biased = {"length_bias": lambda x: 0.9}
    assert diagnose(preferences(**biased, gold_reward=lambda x: x)) == []
    (finding,) = diagnose(preferences(**biased, gold_reward=lambda x: 1 - x))
    assert finding.name == "length bias"


def test_correlations_of_two_pairs_each_say_nothing():
    """They are 1 or -1, as it comes: here as -1 in three steps of four."""
    signs = {"length_bias": lambda x: 1.0 if round(x * (STEPS - 1)) % 4 == 0 else -1.0}
    assert diagnose(preferences(**signs)) == []


def test_pairs_that_are_told_apart_at_the_end_are_not_saturated():
    late = {"accuracy": lambda x: 1.0 if x > 0.8 else 0.9, "loss": lambda x: 0.7 * (x < 0.8)}
    assert diagnose(preferences(**late)) == []
    assert diagnose(preferences(accuracy=late["accuracy"], margin=lambda x: 20 * x)) == []
    assert diagnose(preferences(accuracy=lambda x: 1.0)) == []


def test_a_margin_says_what_a_loss_with_a_likelihood_term_hides():
    history = preferences(accuracy=lambda x: 1.0, margin=lambda x: 20 * x, loss=lambda x: 1.0)
    assert [finding.name for finding in diagnose(history)] == ["saturated pairs"]


def test_a_margin_that_grows_is_something_learnt():
    """Whatever the accuracy is: of hard pairs it may stay low."""
    low = {"accuracy": lambda x: 0.5}
    assert diagnose(preferences(**low, margin=lambda x: 0.3 * x)) == []
    (finding,) = diagnose(preferences(**low, margin=lambda x: -0.3 * x))
    assert finding.name == "nothing learnt"


def test_policy_metrics_beside_those_of_preferences_are_judged_too():
    both = run(kl=lambda x: 0.001 * math.exp(6 * x), gold_reward=None)
    history = [a | b for a, b in zip(both, preferences(), strict=True)]
    assert [finding.name for finding in diagnose(history)] == ["runaway"]


def test_several_ailments_of_preferences_come_gravest_first():
    history = preferences(
        entropy=lambda x: math.exp(-9 * x),
        logprobs_chosen=lambda x: -200 - 100 * x,
        length_bias=lambda x: 0.9,
        accuracy=lambda x: 1.0,
        margin=lambda x: 20 * x,
        unknown_fraction=lambda x: 0.5,
        empty_fraction=lambda x: 0.5,
    )
    assert [finding.name for finding in diagnose(history)] == [
        *("collapse", "likelihood displacement", "length bias", "saturated pairs"),
        *("unknown reference", "empty completions"),
    ]


def test_thresholds_of_preferences_decide():
    history = preferences()
    for name, limits in {
        "likelihood displacement": {"displaced": 0.05},
        "length bias": {"pair_length_correlation": 0.0},
        "saturated pairs": {"saturated_accuracy": 0.7, "saturated_loss": 0.6},
        "nothing learnt": {"chance_accuracy": 0.9, "idle_margin": 2.0},
    }.items():
        (finding,) = diagnose(history, thresholds=Thresholds(**limits))
        assert finding.name == name
    empty = preferences(empty_fraction=lambda x: 0.03)
    assert diagnose(empty, thresholds=Thresholds(empty_sequences=0.05)) == []
