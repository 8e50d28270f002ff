"""Part of the study: how far a proxy reward may be followed.

In a world whose proxy has a flaw (flawed.py) policies are trained on the proxy (pursuit.py) and
judged by the gold reward. The frontier, which is the closed-form optimum for every beta, and the
best of n are exact; runs are sampled, and their checkpoints are judged exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from fused_rl.rollouts.overoptimisation import RewardForm
from fused_rl.rollouts.schedules import AdaptiveBeta, Anneal, AnnealedBeta, FixedBeta
from fused_rl.study import peaks, workers
from fused_rl.study.flawed import Point, World
from fused_rl.study.overoptimisation_tables import tables
from fused_rl.study.part import Numbers, Options
from fused_rl.study.pursuit import Case, Schedule, run
from fused_rl.study.readings import TUNED
from fused_rl.study.reward_pictures import PICTURES

__all__ = ["NEEDS", "PICTURES", "measure", "tables", "ticks"]

NEEDS = ()
RATE, OTHER_RATES = 0.002, (0.001, 0.004)
STEPS, EVERY = 240, 4
"""Of a run at RATE; as many the fewer as the rate is higher."""
SCALES = (1 / 3, 3.0)
"""What the proxy is multiplied by where beta is not tuned for it."""
COUNTS = sorted({round(2 ** (i / 4)) for i in range(49)})
BETAS = [30 * 600 ** (-i / 120) for i in range(121)]
LAST = 5
"""Checkpoints whose mean is the end of a run."""


class Size(NamedTuple):
    """How many worlds, runs at RATE, runs at each other rate, and runs with each beta."""

    worlds: int
    main: int
    rates: int
    betas: int
    steps: int  # of a run with a beta


def size(options: Options) -> Size:
    """Quick or full."""
    return Size(2, 2, 1, 1, 300) if options.quick else Size(5, 5, 3, 4, 500)


def ticks(options: Options) -> int:
    """One for each world and each run."""
    n = size(options)
    names = len(schedules(1.0, 1.0, 1)) + len(SCALES) * len(TUNED)
    return n.worlds + n.main + len(OTHER_RATES) * n.rates + names * n.betas


def measure(options: Options, tick: Callable[[], None]) -> Numbers:
    """Exact curves of several worlds, and runs in the first of them."""
    n = size(options)
    worlds = workers.each(exact, [world_seed(options, i) for i in range(n.worlds)], tick)
    top = worlds[0]["frontier"]["peak"]
    free, held = free_cases(options), held_cases(options, top["beta"], top["kl"])
    found = workers.each(run, [*free.values(), *held.values()], tick)
    runs = dict(zip([*free, *held], found, strict=True))
    for world in worlds[1:]:
        for kind in ("frontier", "best of n"):
            del world[kind]["curve"]
    return {
        "worlds": worlds,
        "free": judged_free({key: runs[key] for key in free}),
        "spread": spreads({key: runs[key] for key in free}),
        "beta": judged_held({key: runs[key] for key in held}, top["kl"]),
    }


def exact(seed: int) -> dict[str, Any]:
    """The frontier and the best of n of a world, with their peaks and the fits to them."""
    world = World(seed)
    frontier = curve([world.point(world.tilted(beta)) for beta in BETAS]) | {"beta": BETAS}
    best = curve(world.best_of(COUNTS)) | {"n": COUNTS}
    found = {"seed": seed}
    for kind, points in (("frontier", frontier), ("best of n", best)):
        found[kind] = {
            "peak": peaks.highest(points),
            "fits": {name: peaks.fitted(points, form) for name, form in peaks.FORMS.items()},
            "curve": points,
        }
    return found


def curve(points: list[Point]) -> dict[str, list[float]]:
    """Lists by name."""
    return {name: [getattr(point, name) for point in points] for name in Point._fields}


def free_cases(options: Options) -> dict[tuple[float, int], Case]:
    """Runs without a KL, by rate and seed."""
    n = size(options)
    found = {}
    for rate, count in ((RATE, n.main), *((rate, n.rates) for rate in OTHER_RATES)):
        slower = RATE / rate
        for i in range(count):
            steps, every = round(STEPS * slower), round(EVERY * slower)
            seeds = world_seed(options), run_seed(options, i)
            found[rate, i] = Case(*seeds, steps, every, rate)
    return found


def schedules(beta: float, kl: float, steps: int) -> dict[str, Schedule]:
    """By name. beta is that of the frontier's peak, kl the KL there, which the adaptive hold."""
    halfway, way = max(steps // 2, 1), Anneal.EXPONENTIAL
    return {
        "too small": FixedBeta(beta / 4),
        "fixed": FixedBeta(beta),
        "too large": FixedBeta(8 * beta),
        "annealed": AnnealedBeta(2 * beta, beta, halfway, way),
        "annealed too far": AnnealedBeta(2 * beta, beta / 4, halfway, way),
        "adaptive": AdaptiveBeta(2 * beta, kl, horizon=20),
        "adaptive, restless": AdaptiveBeta(2 * beta, kl, horizon=5),
    }


def held_cases(options: Options, beta: float, kl: float) -> dict[tuple[str, float, int], Case]:
    """Runs with a beta, by schedule, scale of the proxy, and seed."""
    n = size(options)
    named = schedules(beta, kl, n.steps)
    kinds = [(name, 1.0) for name in named]
    kinds += [(name, scale) for scale in SCALES for name in TUNED]
    return {
        (name, scale, i): Case(
            *(world_seed(options), run_seed(options, 100 + i)),
            *(n.steps, 20, RATE, named[name], scale),
        )
        for name, scale in kinds
        for i in range(n.betas)
    }


def world_seed(options: Options, i: int = 0) -> int:
    """Of a world; the first is the main one."""
    return (options.seed + 1000 * i) % 2**63


def run_seed(options: Options, i: int) -> int:
    """Of what a run samples."""
    return (1_000_003 * (options.seed + 1) + i) % 2**63


def judged_free(runs: dict[tuple[float, int], peaks.Curve]) -> list[dict[str, Any]]:
    """Each run's curve, peak and end; of those at RATE the fits, and where monitors stop.

    The pilot of a run is the run of the next seed, fitted as best of n.
    """
    main = [run for (rate, _), run in runs.items() if rate == RATE]
    pilots = [peaks.fit(run, RewardForm.BEST_OF_N) for run in main[1:] + main[:1]]
    found = []
    for (rate, i), of_run in runs.items():
        names = ("step", "kl", "proxy", "gold")
        points = {name: of_run[name] for name in names}
        judged = {"rate": rate, "seed": i, "peak": peaks.highest(points), "curve": points}
        judged["end"] = {name: of_run[name][-1] for name in (*names, "flattery")}
        if rate == RATE:
            judged["fits"] = peaks.foreseen(points)
            judged["pilot"] = {"kl_peak": peaks.in_reach(pilots[i].kl_peak)}
            judged["stops"] = {
                name: None if at is None else {key: of_run[key][at] for key in names}
                for name, at in peaks.stops(of_run, pilots[i]).items()
            }
            judged["ailments"] = peaks.ailments(of_run)
        found.append(judged)
    return found


def spreads(runs: dict[tuple[float, int], peaks.Curve]) -> dict[str, dict[str, float]]:
    """How far gold rewards lie apart where runs agree in KL, in steps, or in proxy.

    Over the learning rates at the same seed, and over seeds at the same rate.
    """
    seeds = [i for rate, i in runs if rate == OTHER_RATES[0]]
    over_rates = [[runs[rate, i] for rate in (RATE, *OTHER_RATES)] for i in seeds]
    over_seeds = [[run for (rate, _), run in runs.items() if rate == RATE]]
    gold = [x for group in over_rates for run in group for x in run["gold"]]
    return {
        "range": {"gold": max(gold) - min(gold)},
        **{
            name: {axis: fmean(peaks.spread(g, axis) for g in groups) for axis in AXES}
            for name, groups in (("rates", over_rates), ("seeds", over_seeds))
        },
    }


AXES = ("kl", "step", "proxy")


def judged_held(
    runs: dict[tuple[str, float, int], peaks.Curve], target: float
) -> list[dict[str, Any]]:
    """By schedule and scale: the ends of all seeds, and the course of the first."""
    found = []
    for name, scale in dict.fromkeys((name, scale) for name, scale, _ in runs):
        of_kind = [run for key, run in runs.items() if key[:2] == (name, scale)]
        first = {key: of_kind[0][key] for key in ("step", "beta", "kl", "proxy", "gold")}
        found.append(
            {
                "schedule": name,
                "scale": scale,
                "target": target,
                "ends": [end(run) for run in of_kind],
                "course": first,
                "ailments": [peaks.ailments(run) for run in of_kind],
                "over_optimised": [peaks.over_optimised(run) for run in of_kind],
            }
        )
    return found


def end(run: peaks.Curve) -> dict[str, float]:
    """Means over the last checkpoints; how much the KL of the last third of them deviates."""
    means = {name: fmean(run[name][-LAST:]) for name in ("beta", "kl", "proxy", "gold", "flattery")}
    last = run["kl"][-(len(run["kl"]) // 3) :]
    return means | {"kl_deviation": pstdev(last), "kl_most": max(run["kl"])}
