"""Which claims about over-optimisation the numbers of overoptimisation.py bear out.

Sources of claims: 2210.10760, on arXiv, is Gao, Schulman and Hilton; "advice" is what is commonly
made of it, and said of schedules of beta; "our docs" are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from fused_rl.study import peaks
from fused_rl.study.part import Numbers
from fused_rl.study.readings import TUNED, ends, kind_of, main_runs, number, percent, ratio

HEADER = ("claim", "from", "here", "verdict")


class Claim(NamedTuple):
    """A claim in our words, our number, and whether that bears it out.

    depends: what it depends on, where it is true of a part.
    """

    claim: str
    source: str
    here: str
    holds: bool
    depends: str = ""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row."""
        verdict = "confirmed" if self.holds else "not confirmed"
        return (self.claim, self.source, self.here, self.depends or verdict)


def gold_peaks(numbers: Numbers) -> Claim:
    peak, end = ([run[at] for run in numbers["free"]] for at in ("peak", "end"))
    golds = [p["gold"] > e["gold"] + 0.1 * abs(p["gold"]) for p, e in zip(peak, end, strict=True)]
    rises = [e["proxy"] > p["proxy"] for p, e in zip(peak, end, strict=True)]
    return Claim(
        "trained on a proxy, gold rises, peaks and falls, and the proxy goes on rising",
        "2210.10760; advice",
        f"gold {number([p['gold'] for p in peak])} at the peak, "
        f"{number([e['gold'] for e in end])} in the end; proxy {number([p['proxy'] for p in peak])}"
        f", then {number([e['proxy'] for e in end])}",
        all(golds) and all(rises),
    )


def kl_is_the_axis(numbers: Numbers) -> Claim:
    over, gold = numbers["spread"]["rates"], numbers["spread"]["range"]["gold"]
    return Claim(
        "KL is the axis of over-optimisation: gold against its root is one curve, whatever the "
        "learning rate",
        "2210.10760; advice",
        f"learning rates that differ by 4 spread gold by {percent(over['kl'] / gold)} of its range "
        f"at equal KL, {percent(over['step'] / gold)} at equal steps, "
        f"{percent(over['proxy'] / gold)} at equal proxy",
        over["kl"] < 0.05 * gold and over["kl"] < 0.2 * over["step"],
    )


def rl_needs_more_kl(numbers: Numbers) -> Claim:
    best = numbers["worlds"][0]["best of n"]["curve"]
    at = best["n"].index(64)
    needed = []
    for run in main_runs(numbers):
        curve = run["curve"]
        needed.append(peaks.between(best["proxy"][at], curve["proxy"], curve["kl"]))
    return Claim(
        "RL spends more KL than best of n on the same proxy reward, so that KLs of two methods do "
        "not compare",
        "2210.10760",
        f"the proxy of the best of 64 costs {number(best['kl'][at])} nats; by RL {number(needed)}",
        min(needed) > 1.05 * best["kl"][at],
    )


def rl_form(numbers: Numbers) -> Claim:
    errors = {}
    for form in ("RL", "best of n"):
        for share in ("all", "until the peak"):
            errors[form, share] = [run["fits"][form][share]["rms"] for run in main_runs(numbers)]
    rl, other, rl_before, other_before = (
        *(errors["RL", "all"], errors["best of n", "all"]),
        *(errors["RL", "until the peak"], errors["best of n", "until the peak"]),
    )
    return Claim(
        "for RL, d (alpha - beta log d) fits better than d (alpha - beta d)",
        "2210.10760",
        f"rms error {number(rl)}, the other {number(other)}; until the peak {number(rl_before)} "
        f"and {number(other_before)}",
        all(a < b for a, b in zip(rl + rl_before, other + other_before, strict=True)),
    )


def best_of_n_form(numbers: Numbers) -> Claim:
    fits = [world["best of n"]["fits"] for world in numbers["worlds"]]
    rl, other = ([fit[form]["rms"] for fit in fits] for form in ("RL", "best of n"))
    return Claim(
        "for best of n, d (alpha - beta d) fits better",
        "2210.10760",
        f"rms error {number(other)}, the other {number(rl)} ({len(fits)} worlds)",
        all(b < a for a, b in zip(rl, other, strict=True)),
    )


def best_of_n_kl(numbers: Numbers) -> Claim:
    curve = numbers["worlds"][0]["best of n"]["curve"]
    pairs = zip(curve["n"], curve["kl"], strict=True)
    gap = max(math.log(n) - (n - 1) / n - kl for n, kl in pairs)
    return Claim(
        "the KL of best of n is log n - (n - 1) / n",
        "2210.10760",
        f"a bound that exceeds the exact KL by at most {gap:.1g} nats, n up to {curve['n'][-1]}",
        gap < 1e-2,
    )


def half_is_enough(numbers: Numbers) -> Claim:
    best = [world["best of n"]["peak"]["kept_half"] for world in numbers["worlds"]]
    rl = [run["peak"]["kept_half"] for run in numbers["free"]]
    kept = [fmean(best) > 0.91 - 0.05, fmean(rl) > 0.95 - 0.05]
    return Claim(
        "half the KL of the peak keeps 91 % (best of n) and 95 % (RL) of the gain",
        "our docs; advice",
        f"{percent(fmean(best))} and {percent(fmean(rl))} on average, {percent(best)} (best of n, "
        f"{len(best)} worlds) and {percent(rl)} (RL)",
        all(kept),
        "depends: best of n does, RL does not" if kept == [True, False] else "",
    )


def half_of_the_root(numbers: Numbers) -> Claim:
    kept = [run["peak"]["kept_quarter"] for run in numbers["free"]]
    half = [run["peak"]["kept_half"] for run in numbers["free"]]
    return Claim(
        "to stop at half of sqrt(KL) is to stop at half the KL",
        "advice",
        f"it is a quarter of the KL: RL keeps {percent(kept)} of the gain, not {percent(half)}",
        max(abs(a - b) for a, b in zip(kept, half, strict=True)) < 0.02,
    )


def five_falls(numbers: Numbers) -> Claim:
    runs = [run for run in main_runs(numbers) if run["stops"]["five falls"]]
    kept = [run["stops"]["five falls"]["gold"] / run["peak"]["gold"] for run in runs]
    missed = len(main_runs(numbers)) - len(runs)
    here = f"the stop keeps {percent(kept)} of the peak's gain" if kept else "it never stops"
    return Claim(
        "five gold rewards in a row that fall while the KL rises say in time that a run over-"
        "optimises",
        "advice",
        here + (f"; {missed} runs are never stopped" if missed and kept else ""),
        not missed and min(kept, default=0.0) > 0.8,
    )


def penalty_is_early_stopping(numbers: Numbers) -> Claim:
    more = {"proxy": [], "gold": []}
    for name in TUNED:
        for end in kind_of(numbers, name)["ends"]:
            for reward, found in more.items():
                curves = [run["curve"] for run in main_runs(numbers)]
                found.append(end[reward] - fmean(peaks.at_kl(end["kl"], c, reward) for c in curves))
    return Claim(
        "at the same KL a penalty earns more proxy than early stopping, and no more gold",
        "2210.10760",
        f"proxy {number(more['proxy'])} higher, gold {number(more['gold'])}",
        min(more["proxy"]) > 0 and fmean(more["gold"]) < 0.02,
    )


def too_large_or_small(numbers: Numbers) -> Claim:
    small, large, fixed = (kind_of(numbers, s) for s in ("too small", "too large", "fixed"))
    return Claim(
        "a beta too large leaves the policy at the reference; one too small lets it run away",
        "advice",
        f"8 times: KL {number(ends(large, 'kl'))}, proxy {number(ends(large, 'proxy'))}; a quarter:"
        f" KL {number(ends(small, 'kl'))}, {number(ends(small, 'flattery'))} of 6 tokens flatter",
        max(ends(large, "kl")) < 0.1 * min(ends(fixed, "kl"))
        and min(ends(small, "kl")) > 3 * max(ends(fixed, "kl")),
    )


def adaptive_is_robust(numbers: Numbers) -> Claim:
    worst = {name: min(worst_golds(numbers, name)) for name in TUNED}
    return Claim(
        "an adaptive beta is more robust than a schedule",
        "advice",
        "least gold over three scales of the proxy: "
        + ", ".join(f"{name} {number(gold)}" for name, gold in worst.items()),
        worst["adaptive"] > max(worst["annealed"], worst["fixed"]) + 0.1,
    )


def worst_golds(numbers: Numbers, schedule: str) -> list[float]:
    """The mean gold at each scale."""
    kinds = [kind for kind in numbers["beta"] if kind["schedule"] == schedule]
    return [fmean(ends(kind, "gold")) for kind in kinds]


def adaptive_holds(numbers: Numbers) -> Claim:
    kinds = [kind for kind in numbers["beta"] if kind["schedule"] == "adaptive"]
    target = kinds[0]["target"]
    most = max(x for kind in kinds for x in ends(kind, "kl_most"))
    off = [abs(fmean(ends(kind, "kl")) / target - 1) for kind in kinds]
    return Claim(
        "an adaptive beta holds the KL at its target",
        "our docs",
        f"the KL ends {percent(off)} off {number(target)} nats, at three scales of the proxy, "
        f"after {number(most)} at the most",
        max(off) < 0.1,
    )


def beta_scales(numbers: Numbers) -> Claim:
    one, three = (fmean(ends(kind_of(numbers, "adaptive", s), "beta")) for s in (1.0, 3.0))
    return Claim(
        "beta is in the unit of the reward: for the same KL it grows with the reward's scale",
        "advice",
        f"the adaptive beta ends {number(three / one)} times as high for 3 times the proxy",
        abs(three / one / 3 - 1) < 0.15,
    )


def restless(numbers: Numbers) -> Claim:
    calm, hasty = (kind_of(numbers, s) for s in ("adaptive", "adaptive, restless"))
    deviations = [ends(kind, "kl_deviation") for kind in (calm, hasty)]
    return Claim(
        "a beta that adapts too often makes training jump",
        "advice",
        f"the KL's deviation is {number(deviations[0])} nats, with 4 times the pace "
        f"{number(deviations[1])}, and it reaches {number(ends(hasty, 'kl_most'))}",
        min(deviations[1]) > 3 * max(deviations[0]),
    )


def early_fits(numbers: Numbers) -> Claim:
    fits = [run["fits"]["best of n"]["until the peak"] for run in main_runs(numbers)]
    pairs = list(zip(main_runs(numbers), fits, strict=True))
    good = [
        fit["kl_peak"] is not None and 0.5 < fit["kl_peak"] / run["peak"]["kl"] < 2
        for run, fit in pairs
    ]
    return Claim(
        "a fit to a few early checkpoints foresees the peak",
        "advice",
        f"fitted to all checkpoints until the peak it puts it at {ratio(pairs)} times its KL",
        all(good),
    )


def alarms(numbers: Numbers) -> Claim:
    kinds = numbers["beta"]
    said = ["over-optimisation" in found for kind in kinds for found in kind["ailments"]]
    true = [x for kind in kinds for x in kind["over_optimised"]]
    both = sum(a and b for a, b in zip(said, true, strict=True))
    return Claim(
        "diagnose finds over-optimisation where it is, and nowhere else",
        "our docs",
        f"of {sum(true)} runs with a beta that lost a fifth of their gold it finds {both}, and "
        f"raises {sum(said) - both} false alarms in the {len(true) - sum(true)} others",
        both == sum(true) and sum(said) == both,
        "depends: what it finds is there, not all is found"
        if 0 < both == sum(said) < sum(true)
        else "",
    )


CLAIMS: tuple[Callable[[Numbers], Claim], ...] = (
    *(gold_peaks, kl_is_the_axis, rl_needs_more_kl, rl_form, best_of_n_form, best_of_n_kl),
    *(early_fits, half_is_enough, half_of_the_root, five_falls, alarms),
    penalty_is_early_stopping,
    *(too_large_or_small, adaptive_is_robust, adaptive_holds, beta_scales, restless),
)
