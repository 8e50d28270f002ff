"""Pictures of what each KL option trains: means over the seeds, and from lowest to highest."""

from __future__ import annotations

import statistics

from fused_rl.study.findings import REFERENCE, found, options, stalenesses
from fused_rl.study.part import Numbers
from fused_rl.system.drawing import INK, MUTED, STRONG, frame, new_figure

# Colour, line, marker.
LOOKS = {
    "k1 in reward": (STRONG, "-", "o"),
    "k3 in loss": (MUTED[0], "--", "s"),
    "no KL": (INK, ":", "D"),
    "k1 in loss": (MUTED[3], "-.", "^"),
    "k3 in reward": (MUTED[1], (0, (5, 1, 1, 1, 1, 1)), "v"),
    "k2 in loss": (MUTED[2], (0, (7, 2)), "P"),
    "k2 in loss, weighted": (MUTED[2], (0, (7, 2)), "P"),
    "k3, gradient of k2": (MUTED[2], "-", "X"),
    "k3 in reward and loss": (MUTED[4], "-", "h"),
    "exact in loss": (MUTED[5], "-", "*"),
    "exact JSD in loss": (MUTED[2], ":", ""),
}
ENTROPY = ("k3 in loss", "k1 in reward", "k2 in loss", "no KL", "k3 in reward")
STALE = ("no KL", "k1 in loss", "k3 in loss", "k1 in reward", "k2 in loss, weighted")
# Of the picture of modes: what is drawn, how it is named, where the name stands, and of which
# place of the curve it speaks.
MODES = (
    ("k1 in reward", "reverse KL: k1 in reward,\nk2 in loss, exact", (1.75, 0.085), 1.5),
    ("k3 in loss", "forward KL: k3 in loss, exact", (-2.9, 0.061), -0.75),
    ("exact JSD in loss", "JSD, exact", (-3.1, 0.03), -2.6),
    ("k1 in loss", "start, and k1 in loss:\nit does not move", (-1.9, 0.085), -0.2),
)


def by_seed(numbers: Numbers, option: str, what: str, staleness: int = 0) -> list[list[float]]:
    """The curve of every seed."""
    key = (option, staleness)
    return [run[what] for run in numbers["runs"] if (run["option"], run["staleness"]) == key]


def mean(series: list[list[float]]) -> list[float]:
    """Over the seeds."""
    return [statistics.fmean(at) for at in zip(*series, strict=True)]


def curve(panel, numbers: Numbers, option: str, what: str, staleness: int = 0) -> float:
    """Draws an option; returns where it ends."""
    steps, series = numbers["steps"], by_seed(numbers, option, what, staleness)
    colour, line, _ = look(option)
    at = list(zip(*series, strict=True))
    panel.fill_between(steps, [*map(min, at)], [*map(max, at)], color=colour, alpha=0.12, lw=0)
    panel.plot(steps, mean(series), color=colour, ls=line, lw=1.8)
    return mean(series)[-1]


def apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The same in their order and about where they were, gap apart at least."""
    groups: list[list[str]] = []
    for name in sorted(heights, key=heights.get):
        groups.append([name])
        # What would overlap stands around its own middle.
        while len(groups) > 1:
            (low, bottom), (high, top) = ((middle(g, heights), len(g)) for g in groups[-2:])
            if high - low >= gap * (bottom + top) / 2:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    return {
        name: middle(group, heights) + gap * (i - (len(group) - 1) / 2)
        for group in groups
        for i, name in enumerate(group)
    }


def middle(group: list[str], heights: dict[str, float]) -> float:
    """Of the heights of a group."""
    return statistics.fmean(heights[name] for name in group)


def name_beside(panel, x: float, points: dict[str, tuple[float, float]], gap: float) -> None:
    """Names in a column at x, each with a line to its point; gap in shares of the height."""
    low, high = panel.get_ylim()
    heights = apart({name: y for name, (_, y) in points.items()}, gap * (high - low))
    for name, height in heights.items():
        colour = look(name)[0]
        panel.annotate(
            name,
            points[name],
            (x, height),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "lw": 0.7},
        )


def look(option: str) -> tuple[str, object, str]:
    """Colour, line, marker."""
    return LOOKS.get(option, (INK, "-", "X"))


def reward(numbers: Numbers):
    """One panel per option; dotted: the mean without a KL."""
    figure = new_figure((8.5, 6.6))
    names = options(numbers)[:9]
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for name, panel in zip(names, panels.flat, strict=True):
        frame(panel)
        panel.locator_params(axis="x", nbins=4)
        panel.locator_params(axis="y", nbins=3)
        free = by_seed(numbers, "no KL", "reward")
        panel.plot(numbers["steps"], mean(free), color=INK, ls=":", lw=1.4)
        series = by_seed(numbers, name, "reward")
        at = list(zip(*series, strict=True))
        lowest, highest = [*map(min, at)], [*map(max, at)]
        panel.fill_between(numbers["steps"], lowest, highest, color=STRONG, alpha=0.15, lw=0)
        panel.plot(numbers["steps"], mean(series), color=STRONG, lw=2)
        also = " (dotted beside the others)" if name == "no KL" else ""
        heading = f"{name}{also}: {mean(series)[-1]:.2f}"
        panel.set_title(heading, loc="left", fontsize=9.5, color=INK)
    for panel in panels[-1]:
        panel.set_xlabel("updates")
    for panel in panels[:, 0]:
        panel.set_ylabel("reward")
    return figure


def divergence(numbers: Numbers):
    """Reward against the exact KL, at the end; small: the seeds."""
    figure = new_figure((8.5, 4.8))
    panel = figure.subplots()
    frame(panel)
    points, furthest = {}, 0.0
    for name in (REFERENCE, *options(numbers)):
        colour, _, marker = look(name)
        x, y = (found(numbers, name, what) for what in ("kl", "reward"))
        points[name] = statistics.fmean(x), statistics.fmean(y)
        furthest = max(furthest, *x)
        panel.scatter(x, y, s=10, color=colour, marker=marker, alpha=0.5, lw=0)
        panel.scatter(*points[name], s=60, color=colour, marker=marker)
    panel.set_xlabel("KL(policy, reference) at the end, exact, nats per token")
    panel.set_ylabel("reward at the end")
    name_beside(panel, 1.06 * furthest, points, 0.055)
    return figure


def entropy(numbers: Numbers):
    """Entropies of some options."""
    figure = new_figure((8, 4.2))
    panel = figure.subplots()
    frame(panel)
    last = numbers["steps"][-1]
    ends = {name: (last, curve(panel, numbers, name, "entropy")) for name in ENTROPY}
    panel.set_ylim(bottom=0)
    panel.set_xlabel("updates")
    panel.set_ylabel("entropy of the policy, nats per token")
    name_beside(panel, 1.05 * last, ends, 0.06)
    return figure


def staleness(numbers: Numbers):
    """Rewards of the policy, one panel per age of its samples."""
    figure = new_figure((9, 3.6))
    ages, last = stalenesses(numbers), numbers["steps"][-1]
    panels = figure.subplots(1, len(ages), sharey=True)
    for age, panel in zip(ages, panels, strict=True):
        frame(panel)
        ends = {name: (last, curve(panel, numbers, name, "reward", age)) for name in STALE}
        panel.set_ylim(0, 1)
        panel.set_xlabel("updates")
        title = f"samples {age} updates old" if age else "fresh samples"
        panel.set_title(title, loc="left", fontsize=9.5, color=INK)
    panels[0].set_ylabel("reward of the policy")
    name_beside(panels[-1], 1.12 * last, ends, 0.075)
    return figure


def of_modes(numbers: Numbers):
    """The reference, and where Gaussians end that start between its bumps."""
    figure = new_figure((8, 4))
    panel = figure.subplots()
    frame(panel)
    x, reference = numbers["modes"]["x"], numbers["modes"]["reference"]
    panel.fill_between(x, reference, color=INK, alpha=0.25, lw=0)
    panel.plot(x, reference, color=INK, lw=0.8)
    panel.annotate("reference", (-1.7, 0.0325), color=INK, fontsize=8.5, ha="center")
    for way, name, where, place in MODES:
        colour, line, _ = look(way)
        p = numbers["modes"]["starts"]["narrow"][way]["probabilities"]
        panel.plot(x, p, color=colour, ls=line, lw=2)
        at = min(range(len(x)), key=lambda i, place=place: abs(x[i] - place))
        leader = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "lw": 0.7}
        panel.annotate(name, (x[at], p[at]), where, color=colour, fontsize=8.5, arrowprops=leader)
    panel.set_xlabel("place")
    panel.set_ylabel("probability of a place")
    panel.set_ylim(bottom=0)
    return figure


PICTURES = {
    "reward": reward,
    "divergence": divergence,
    "entropy": entropy,
    "modes": of_modes,
    "staleness": staleness,
}
