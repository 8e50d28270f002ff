"""Diagnosis: what ails a run, from what it logged, with the numbers that say so.

    stuck               KL near 0 and no gain in reward: beta is too large, or steps too small
    collapse            the entropy has all but gone: one answer, whatever is sampled
    runaway             the KL, or the largest ratio, grows without bound: beta is too small
    over-optimisation   the proxy reward rises while the gold reward falls, or the KL is past its
                        peak
    length bias         answers grow, and reward follows their length; or margins follow that of
                        the chosen
    dead gradient       hardly a token has a gradient
    clip saturation     the clip decides, not the advantages
    unknown log-probs   the engine or the reference reports NaN, and those tokens count as unchanged

Of preferences:

    likelihood displacement   margins grow, but the chosen become less likely, as the rejected do
    saturated pairs           all pairs are told apart by far, and half of the run is still to come
    unknown reference         the reference reports NaN, and those tokens count as unchanged
    empty completions         sequences without a token, which score 0
    nothing learnt            pairs are told apart no better than by chance: beta is too large, or
                              steps too small

Sources: J. Schulman et al., "Proximal policy optimization" (arXiv 1707.06347), for clip and KL; Gao
et al. (arXiv 2210.10760) for over-optimisation; Singhal et al., "A long way to go" (arXiv
2310.03716), for length; Cui et al., "The entropy mechanism" (arXiv 2505.22617), for collapse; Razin
et al. (arXiv 2410.08847) for displacement; Park et al. (arXiv 2403.19159) for the length of pairs.
"""

import math
from collections.abc import Callable

from fused_rl import checks
from fused_rl.rollouts.diagnosis import policy, preference
from fused_rl.rollouts.diagnosis.findings import Finding, Severity, Thresholds
from fused_rl.rollouts.diagnosis.history import History, Run

__all__ = [
    "Finding",
    "Severity",
    "Thresholds",
    "diagnose",
]

# Gravest first.
_JUDGES: tuple[Callable[[Run, Thresholds], Finding | None], ...] = (
    policy.collapse,
    policy.runaway,
    preference.displacement,
    policy.over_optimisation,
    policy.length_bias,
    preference.length_bias_of_pairs,
    preference.saturated_pairs,
    policy.dead_gradient,
    policy.clip_saturation,
    policy.unknown,
    preference.unknown_reference,
    preference.empty_completions,
    policy.stuck,
    preference.nothing_learnt,
)


def diagnose(
    history: History, *, kl_peak: float | None = None, thresholds: Thresholds | None = None
) -> list[Finding]:
    """What ails the run, gravest first; an empty list where nothing does.

    Args:
        history: one mapping per step, oldest first, of the metrics that a PolicyLoss returns (kl,
            entropy, ratio_max, clip_fraction_low, clip_fraction_high, zero_gradient_fraction,
            unknown_fraction) or a PreferenceLoss (margin, accuracy, logprobs_chosen,
            length_chosen, length_bias, empty_fraction and the others), and where there are any,
            reward, length, gold_reward (of a judge that training does not see) and loss. What is
            not logged is not judged, nor is a metric that was logged for fewer than two windows.
        kl_peak: the KL at which gold rewards are known to be highest (fit_reward_curve), in the
            unit of kl; None: fitted, where there are gold rewards.
        thresholds: from where on something counts; None: Thresholds().

    Raises:
        ValueError: a window below 2.
    """
    limits = thresholds or Thresholds()
    checks.require(
        isinstance(limits, Thresholds),
        lambda: f"thresholds must be Thresholds(), got {checks.shown(limits)}",
    )
    if kl_peak is not None:
        checks.is_bound("kl_peak", kl_peak)
        checks.at_least("kl_peak", kl_peak, 0)
    checks.require(limits.window >= 2, lambda: f"window must be at least 2, got {limits.window}")
    broken = _not_finite(history)
    if broken is not None:
        return [broken]
    run = Run(history, limits.window, kl_peak)
    findings = (judge(run, limits) for judge in _JUDGES)
    return [finding for finding in findings if finding is not None]


def _not_finite(history: History) -> Finding | None:
    for step, metrics in enumerate(history):
        for name, value in metrics.items():
            if not math.isfinite(value):
                return Finding(
                    "not finite",
                    f"{name} is {float(value)} at step {step}.",
                    "Return to a checkpoint before it; look for log-probs of -inf.",
                )
    return None
