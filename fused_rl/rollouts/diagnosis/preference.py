"""What ails a policy that learns from preferences, by the metrics that a PreferenceLoss returns.

Sources: Razin et al., "Unintentional unalignment: likelihood displacement in direct preference
optimization" (arXiv 2410.08847); Pal et al., "Smaug" (arXiv 2402.13228), for both log-probs that
fall; Park et al., "Disentangling length from quality in direct preference optimization" (arXiv
2403.19159); Azar et al. (arXiv 2310.12036), for pairs that are separated without bound.
"""

import math
from itertools import pairwise

from fused_rl.rollouts.diagnosis.findings import Finding, Thresholds
from fused_rl.rollouts.diagnosis.history import Run, correlation, mean


def displacement(run: Run, limits: Thresholds) -> Finding | None:
    if not run.has("margin", "logprobs_chosen", "length_chosen") or run.gain("margin") <= 0:
        return None
    first, last = run.first("logprobs_chosen"), run.last("logprobs_chosen")
    # Per token: batches of longer answers have smaller log-probs, which says nothing.
    before, after = max(run.first("length_chosen"), 1.0), max(run.last("length_chosen"), 1.0)
    lost = first / before - last / after
    if lost <= limits.displaced:
        return None
    rejected = ""
    if run.has("logprobs_rejected"):
        of_rejected = run.first("logprobs_rejected"), run.last("logprobs_rejected")
        rejected = ", that of the rejected from {:.4g} to {:.4g}".format(*of_rejected)
    return Finding(
        "likelihood displacement",
        f"The margin rose from {run.first('margin'):.3g} to {run.last('margin'):.3g}, but the "
        f"log-prob of the chosen went from {first:.4g} to {last:.4g} nats, {lost:.2g} per token"
        f"{rejected}.",
        "Add a likelihood term (likelihood=1.0 of a PreferenceLoss, as rpo, cpo and orpo have it), "
        "drop pairs whose answers are nearly the same, or lower the learning rate.",
    )


def length_bias_of_pairs(run: Run, limits: Thresholds) -> Finding | None:
    if run.has("gold_reward") and run.gain("gold_reward") > 0:
        return None
    # Of untrained margins a correlation says nothing, and of a few pairs one step's says little.
    within = run["length_bias"][len(run["length_bias"]) // 2 :]
    among = mean(within) if run.has("length_bias") else 0.0
    over = _margins_with_lengths(run) if run.has("margin") else 0.0
    together = max(among, over, key=abs)
    if abs(together) < limits.pair_length_correlation:
        return None
    where = "the pairs of a step" if together == among else "steps, from one to the next"
    sign = "longer" if together > 0 else "shorter"
    return Finding(
        "length bias",
        f"Margins are larger where the chosen is {sign}: over {where}, their correlation with the "
        f"difference in length is {together:.2f}.",
        "Score by the mean over tokens (simpo, dpo_norm), or by ld_dpo; choose pairs of equal "
        "length.",
    )


def _margins_with_lengths(run: Run) -> float:
    """The correlation of changes from step to step, in which a common trend has no part.

    It speaks where steps have a pair each, or two, whose own correlation is none.
    """
    both = zip(run["length_chosen"], run["length_rejected"], strict=False)
    lengths = [chosen - rejected for chosen, rejected in both]
    return correlation(*([b - a for a, b in pairwise(x)] for x in (run["margin"], lengths)))


def saturated_pairs(run: Run, limits: Thresholds) -> Finding | None:
    if not run.has("accuracy", "margin"):
        return None
    accuracy, margin = run.halfway("accuracy"), run.halfway("margin")
    # A loss may have a likelihood term, which does not vanish; then the margin says it.
    loss = min(_logistic(margin), run.halfway("loss") if run.has("loss") else math.inf)
    if accuracy < limits.saturated_accuracy or loss > limits.saturated_loss:
        return None
    return Finding(
        "saturated pairs",
        f"Halfway through, the accuracy was {accuracy:.3g} and the margin {margin:.3g}, where the "
        f"loss is {loss:.2g}: there is nothing more to learn from these pairs but their noise.",
        "Stop earlier, take fewer epochs or harder pairs, hold margins by ipo or label smoothing, "
        "and watch the accuracy on pairs that training does not see.",
    )


def _logistic(margin: float) -> float:
    """-log sigmoid(margin)."""
    return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)


def unknown_reference(run: Run, limits: Thresholds) -> Finding | None:
    unknown = run.last("unknown_fraction")
    if not run.of_preferences or not unknown > limits.unknown_tokens:
        return None
    return Finding(
        "unknown reference",
        f"{unknown:.1%} of the reference's log-probs are NaN.",
        "Look for NaN in what the reference model reports; they count with a log-ratio of 0, as if "
        "training had moved nothing there.",
    )


def empty_completions(run: Run, limits: Thresholds) -> Finding | None:
    empty = run.last("empty_fraction")
    if not empty > limits.empty_sequences:
        return None
    return Finding(
        "empty completions",
        f"{empty:.1%} of the sequences have no counted token, and score 0.",
        "Look at loss masks, and whether truncation leaves a prompt without its answer; drop such "
        "pairs.",
    )


def nothing_learnt(run: Run, limits: Thresholds) -> Finding | None:
    if not run.has("accuracy", "margin"):
        return None
    accuracy, gain = run.last("accuracy"), run.gain("margin")
    if accuracy > limits.chance_accuracy or gain > limits.idle_margin:
        return None
    return Finding(
        "nothing learnt",
        f"The accuracy is {accuracy:.3g} in the end, and the margin went from "
        f"{run.first('margin'):.2g} to {run.last('margin'):.2g}.",
        "Raise the learning rate, or lower beta; check which of a pair is the chosen one.",
    )
