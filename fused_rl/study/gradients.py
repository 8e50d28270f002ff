"""Part of the study: bias and noise of the gradient of every way to use a KL. All of it is exact.

Random worlds of 4 tokens (quick: 3) and sequences of at most T; a number is the median over worlds.
A policy is `distance` nats from its reference, the KL of whole sequences. There is no baseline.

    path        on-policy, at reference + s * direction, for s that lead farther and farther
    staleness   the policy is STEPS steps of exact gradient ascent on reward - beta KL away from the
                reference, and what sampled is one of 0 to 10 steps ago
    ratios      the same policy, on samples of policies from which it is farther and farther
    ways        all of them at two distances of such a policy, on-policy and OLD steps off-policy
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from fused_rl.study import bias_pictures, gradient_claims, ways, workers
from fused_rl.study.exact_enumeration import ExactWorld
from fused_rl.study.moments import ROUNDING, Way, batch_error, behind, drawn, kl, on_line, run_to
from fused_rl.study.part import Numbers, Options, Table, derived_seed

NEEDS: tuple[str, ...] = ()
T = 4
DISTANCES = (0.1, 1.0)
STEPS, OLDEST, OLD = 12, 10, 4
FARTHEST = 10**0.5
BATCHES = (64, 1024)
QUANTITIES = ("bias", "bias_token", "cosine", "noise")


def ticks(options: Options) -> int:
    return len(cases(options))


def cases(options: Options) -> list[tuple[int, bool]]:
    """A seed for each world, and whether it is a quick one."""
    return [
        (derived_seed(options.seed, i), options.quick) for i in range(3 if options.quick else 8)
    ]


def tokens(quick: bool) -> int:
    """The vocabulary of a world."""
    return 3 if quick else 4


def path_of(quick: bool) -> list[float]:
    """Distances in nats, evenly spaced on a logarithmic scale, up to FARTHEST."""
    steps = 2 if quick else 4
    return [FARTHEST * 10 ** (i / steps - 3.5) for i in range(7 * steps // 2 + 1)]


def measure(options: Options, tick: Callable[[], None]) -> Numbers:
    """Lines as `lines` says; named and ways as `joined` says, a way after its three columns."""
    worlds = workers.each(of_world, cases(options), tick)
    entries = [ways.columns(way) for way in ways.every()]
    return {
        "world": {
            "tokens": tokens(options.quick),
            "length": T,
            "worlds": len(worlds),
            "steps": STEPS,
            "old": OLD,
        },
        "path": {
            "distance": [rounded(d) for d in path_of(options.quick)],
            "lines": lines([w["path"] for w in worlds]),
        },
        "staleness": {
            "distance": DISTANCES[-1],
            "kl_to_old": [
                spread([w["kl_to_old"][age] for w in worlds])[0] for age in range(OLDEST + 1)
            ],
            "lines": lines([w["staleness"] for w in worlds]),
        },
        "ratios": {
            "distance": [rounded(d) for d in path_of(options.quick)],
            "lines": lines([w["ratios"] for w in worlds]),
        },
        "same": {name: rounded(max(w["same"][name] for w in worlds)) for name in ways.SAME},
        "named": {n: joined([w["named"][n] for w in worlds]) for n in ways.NAMED},
        "ways": [
            [*entry, *joined([w["ways"][i] for w in worlds])] for i, entry in enumerate(entries)
        ],
    }


def of_world(case: tuple[int, bool]) -> Numbers:
    """Everything that is measured in one world."""
    seed, quick = case
    world = ExactWorld(seed, V=tokens(quick), T=T)
    direction, reward = drawn(world, torch.Generator().manual_seed(seed), FARTHEST)
    runs = [run_to(world, reward, distance, steps=STEPS) for distance in DISTANCES]
    return {
        **on_path(world, direction, path_of(quick)),
        **off_policy(world, runs[-1]),
        **sampled_elsewhere(world.at(current=runs[-1][-1]), direction, path_of(quick)),
        **everywhere(world, runs),
    }


def on_path(world: ExactWorld, direction: Tensor, distances: list[float]) -> Numbers:
    """On-policy, at policies on a straight line from the reference."""
    points = []
    for distance in distances:
        here = world.at(current=on_line(world, direction, distance))
        points.append(of_ways(ways.ON_PATH, here, here.current))
    same = {}
    for name, pair in ways.SAME.items():
        a, b = (way.gradients(here, here.current) for way in pair)
        same[name] = ((a - b).abs().max() / a.abs().max()).item()
    return {"path": points, "same": same}


def off_policy(world: ExactWorld, policies: list[Tensor]) -> Numbers:
    """At the last policy of a run, on samples of the last, the one before, and so on."""
    olds = [policies[-1 - age] for age in range(OLDEST + 1)]
    here = world.at(current=policies[-1])
    return {
        "staleness": [of_ways(ways.STALE, here.at(old=old), old) for old in olds],
        "kl_to_old": [kl(world, here.current, old) for old in olds],
    }


def sampled_elsewhere(world: ExactWorld, direction: Tensor, distances: list[float]) -> Numbers:
    """On samples of policies on a straight line from the current one."""
    olds = [behind(world, direction, distance) for distance in distances]
    return {"ratios": [of_ways(ways.RATIOS, world.at(old=old), old) for old in olds]}


def everywhere(world: ExactWorld, runs: list[list[Tensor]]) -> Numbers:
    """Every way at the last policies of runs, on-policy and OLD steps off-policy."""
    pairs = []
    for policies in runs:
        here = world.at(current=policies[-1], old=policies[-1 - OLD])
        pairs += [(here, here.current), (here, here.old)]
    return {
        "named": {name: [way.moments(*p) for p in pairs] for name, way in ways.NAMED.items()},
        "ways": [[way.moments(*p) for p in pairs] for way in ways.every()],
    }


def of_ways(named: dict[str, Way], world: ExactWorld, sampler: Tensor) -> dict[str, dict]:
    return {name: way.moments(world, sampler) for name, way in named.items()}


def lines(worlds: list[list[dict[str, dict]]]) -> Numbers:
    """Name of a way -> along the line the medians of each quantity, and the least and the most bias
    and noise of any world.
    """

    def along(name: str, quantity: str) -> list[tuple[float, float, float]]:
        return [
            spread([world[i][name][quantity] for world in worlds]) for i in range(len(worlds[0]))
        ]

    found = {}
    for name in worlds[0][0]:
        found[name] = {q: [s[0] for s in along(name, q)] for q in QUANTITIES}
        for quantity in ("bias", "noise"):
            low, high = ([s[i] for s in along(name, quantity)] for i in (1, 2))
            found[name] |= {f"{quantity}_least": low, f"{quantity}_most": high}
    return found


def joined(worlds: list[list[dict]]) -> list[list]:
    """For each distance, on-policy and off-policy: target, bias, cosine, noise."""
    found = []
    for moments in zip(*worlds, strict=True):
        targets = {m["target"] for m in moments}
        middle = [spread([m[q] for m in moments])[0] for q in ("bias", "cosine", "noise")]
        found.append([targets.pop() if len(targets) == 1 else "biased", *middle])
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return rounded(median(values)), rounded(min(values)), rounded(max(values))


def rounded(value: float) -> float:
    return float(f"{value:.7g}") if abs(value) > ROUNDING else 0.0


def tables(numbers: Numbers) -> list[Table]:
    return [used(numbers), ranking(numbers), gradient_claims.claims(numbers)]


def used(numbers: Numbers) -> Table:
    """What people use, at the farther distance."""
    old, distance = numbers["world"]["old"], numbers["staleness"]["distance"]
    header = ("option", "gradient of", "bias, %", "sequences for 10% noise")
    header += tuple(f"{old} steps old: {what}" for what in ("bias, %", "cosine", "sequences"))
    rows = []
    for name in ways.USED:
        now, then = numbers["named"][name][-2:]
        on_policy = (now[0], percent(now[1]), sequences(now[3]))
        rows.append((name, *on_policy, percent(then[1]), f"{then[2]:.2f}", sequences(then[3])))
    title = (
        f"Gradients {distance:g} nat from the reference, beside that of the KL of whole sequences; "
        f"on-policy and {old} steps old"
    )
    return Table(title, header, rows)


def everything(numbers: Numbers) -> Table:
    """Every way, at the farther distance: too long for a terminal."""
    old, distance = numbers["world"]["old"], numbers["staleness"]["distance"]
    header = ("KL in", "importance ratio", "estimator")
    for when in ("", f"{old} steps old: "):
        header += tuple(f"{when}{what}" for what in ("gradient of", "bias, %", "noise, %"))
    rows = []
    for where, ratio, estimator, *found in numbers["ways"]:
        moments = [(m[0], percent(m[1]), percent(m[3])) for m in found[-2:]]
        rows.append((where, ratio, estimator, *moments[0], *moments[1]))
    title = f"Every way to use a KL, {distance:g} nat from the reference; noise of one sequence"
    return Table(title, header, rows)


def ranking(numbers: Numbers) -> Table:
    """By how far the gradient of a batch is from the true one."""
    old, distance = numbers["world"]["old"], numbers["staleness"]["distance"]
    found = []
    for name, who in ways.USED.items():
        errors = [batch_error(m[1], m[3], n) for m in numbers["named"][name][-2:] for n in BATCHES]
        found.append((errors[-1], (name, who, *map(percent, errors))))
    found.sort(key=lambda row: row[0])
    header = ["option", "used by"]
    for when in ("", f"{old} steps old: "):
        header += [f"{when}{n} sequences" for n in BATCHES]
    title = (
        f"Error of a batch's gradient, root mean square, % of the true one, {distance:g} nat from "
        "the reference"
    )
    return Table(title, tuple(header), [row for _, row in found])


def sequences(noise: float) -> str:
    """How many bring the noise down to a tenth of the true gradient."""
    return f"{(noise / 0.1) ** 2:.0f}"


def percent(value: float) -> str:
    """Two digits, or as many as stand before the point."""
    return f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.2g}"


PICTURES = {
    "bias": bias_pictures.bias,
    "variance": bias_pictures.variance,
    "staleness": bias_pictures.staleness,
    "direction": bias_pictures.direction,
    "ratios": bias_pictures.ratios,
}
