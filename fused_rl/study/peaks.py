"""Where gold rewards peak along a curve, how well that is foreseen, and who would have stopped.

A curve is checkpoints in order, with lists under "kl" (nats of whole sequences), "proxy" and
"gold", rewards above the reference's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any

from fused_rl.rollouts.diagnosis import diagnose
from fused_rl.rollouts.overoptimisation import RewardCurve, RewardForm, fit_reward_curve
from fused_rl.study.flawed import T

Curve = Mapping[str, Sequence[float]]

FORMS = {"best of n": RewardForm.BEST_OF_N, "RL": RewardForm.RL}


def between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """y at x, on straight lines between points whose xs rise; where they fall, the last of them."""
    xs = list(accumulate(xs, max))
    i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    width = xs[i] - xs[i - 1]
    share = 0.0 if width == 0 else min(max((x - xs[i - 1]) / width, 0.0), 1.0)
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def at_kl(kl: float, curve: Curve, name: str = "gold") -> float:
    """What a curve has at a KL; straight lines over sqrt(KL)."""
    return between(math.sqrt(kl), [math.sqrt(x) for x in curve["kl"]], curve[name])


def highest(curve: Curve) -> dict[str, float]:
    """The checkpoint with the most gold, and how much of its gain a half and a quarter of its KL
    keep. A quarter of the KL is half of sqrt(KL)."""
    i = max(range(len(curve["gold"])), key=lambda i: curve["gold"][i])
    kl, gold = curve["kl"][i], curve["gold"][i]
    return {
        **{name: curve[name][i] for name in curve},
        "kept_half": at_kl(kl / 2, curve) / gold,
        "kept_quarter": at_kl(kl / 4, curve) / gold,
    }


def fitted(curve: Curve, form: RewardForm, first: int | None = None) -> dict[str, float | None]:
    """The library's fit to the first checkpoints, or to all, and its rms error there.

    kl_peak and reward_peak are None where the fit has no peak in reach.
    """
    found = fit(curve, form, first)
    pairs = zip(curve["kl"][:first], curve["gold"][:first], strict=True)
    errors = [found.reward(kl) - gold for kl, gold in pairs]
    peaks = (found.kl_peak, found.reward_peak)
    return {
        "alpha": found.alpha,
        "beta": found.beta,
        "rms": math.sqrt(fmean(e * e for e in errors)),
        **dict(zip(("kl_peak", "reward_peak"), (in_reach(x) for x in peaks), strict=True)),
    }


def fit(curve: Curve, form: RewardForm, first: int | None = None) -> RewardCurve:
    """fit_reward_curve, which knows the reference's reward: 0."""
    return fit_reward_curve(curve["kl"][:first], curve["gold"][:first], form=form, baseline=0.0)


def in_reach(x: float) -> float | None:
    """None for more than any policy of this world has: sequences have up to some 26 nats."""
    return x if x < 100 else None


def foreseen(curve: Curve) -> dict[str, Any]:
    """Both forms, fitted to all checkpoints, to those until the true peak, to the first third."""
    until = max(curve["gold"].index(max(curve["gold"])) + 1, 4)
    shares = {"all": None, "until the peak": until, "third": len(curve["kl"]) // 3}
    return {
        name: {share: fitted(curve, form, first) for share, first in shares.items()}
        for name, form in FORMS.items()
    }


def history(run: Curve, count: int) -> list[dict[str, float]]:
    """What the first checkpoints' samples say, as diagnose reads it; KL per token."""
    names = {"kl": "seen_kl", "reward": "seen_proxy", "gold_reward": "seen_gold"}
    names["entropy"] = "entropy"
    return [{key: run[name][i] for key, name in names.items()} for i in range(count)]


def stops(run: Curve, pilot: RewardCurve) -> dict[str, int | None]:
    """The first checkpoint at which a monitor stops the run, None if it never does.

    Monitors see samples alone: five gold rewards in a row that fall while the KL rises; diagnose,
    which also fits the curve to what it has seen; diagnose with the peak of a pilot run; and the
    pilot's budget, half its KL.
    """
    steps = range(1, len(run["kl"]) + 1)

    def first(**options: float) -> int | None:
        for count in steps:
            found = diagnose(history(run, count), **options)
            if any(finding.name == "over-optimisation" for finding in found):
                return count - 1
        return None

    budget = pilot.kl_budget() / T
    over = (i for i, kl in enumerate(run["seen_kl"]) if kl > budget)
    return {
        "five falls": first(kl_peak=math.inf),
        "diagnose": first(),
        "diagnose, pilot's peak": first(kl_peak=pilot.kl_peak / T),
        "pilot's budget": next(over, None),
    }


def ailments(run: Curve) -> list[str]:
    """What diagnose finds in the end."""
    return [finding.name for finding in diagnose(history(run, len(run["kl"])))]


def over_optimised(run: Curve) -> bool:
    """Whether gold has in truth lost a fifth of the most it was."""
    return run["gold"][-1] < 0.8 * max(run["gold"])


def spread(runs: Sequence[Curve], axis: str, points: int = 40) -> float:
    """How far runs lie apart where they agree in `axis`: the mean over it of the deviation of their
    gold rewards. "kl" is compared over its square root."""
    power = 0.5 if axis == "kl" else 1.0
    xs = [[max(x, 0.0) ** power for x in run[axis]] for run in runs]
    end = min(max(x) for x in xs)
    found = []
    for k in range(1, points + 1):
        x = end * k / points
        values = [between(x, at, run["gold"]) for at, run in zip(xs, runs, strict=True)]
        found.append(pstdev(values))
    return fmean(found)
