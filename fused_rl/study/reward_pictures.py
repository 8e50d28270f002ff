"""Pictures of overoptimisation.py: rewards against sqrt(KL), and against steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fused_rl.rollouts.overoptimisation import RewardCurve
from fused_rl.study import peaks
from fused_rl.study.part import Numbers
from fused_rl.study.readings import TUNED, kind_of, main_runs
from fused_rl.system.drawing import INK, MARKERS, MUTED, STRONG, frame, new_figure, title

STYLES = {"adaptive": "-", "annealed": (0, (6, 2)), "fixed": (0, (1.5, 1.5))}
COLOURS = {"adaptive": STRONG, "annealed": MUTED[0], "fixed": MUTED[2]}
SCALES = (1 / 3, 1.0, 3.0)


def rewards_over_kl(figure, case: str, where: str):
    """A low panel for the proxy over a high one for gold, with one axis of sqrt(KL)."""
    proxy, gold = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    for panel, name in ((proxy, "proxy reward"), (gold, "gold reward")):
        frame(panel)
        panel.set_ylabel(name)
    gold.set_xlabel("\N{SQUARE ROOT} KL(policy, reference) of whole sequences, root of nats")
    gold.axhline(0.0, color=INK, lw=0.8)
    title(figure, case, where)
    return proxy, gold


def roots(kls: Sequence[float]) -> list[float]:
    """Where they lie on the axis."""
    return [math.sqrt(kl) for kl in kls]


def label(panel, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str):
    """Words beside a point, in points away from it."""
    side = "left" if offset[0] >= 0 else "right"
    panel.annotate(
        text, at, offset, textcoords="offset points", color=colour, fontsize=8, ha=side, va="center"
    )


def gold(numbers: Numbers):
    """Runs without a KL: proxy and gold, the fits to one, its peak, and where monitors stop it."""
    figure = new_figure((7.5, 5.6))
    proxy, panel = rewards_over_kl(
        figure, "A proxy reward that is followed too far", "RL without a KL, a line for each seed"
    )
    runs = main_runs(numbers)
    for i, run in enumerate(runs):
        x, width = roots(run["curve"]["kl"]), 2.0 if i == 0 else 0.8
        proxy.plot(x, run["curve"]["proxy"], color=INK, lw=width)
        panel.plot(x, run["curve"]["gold"], color=STRONG, lw=width)
    run = runs[0]
    end = math.sqrt(run["curve"]["kl"][-1])
    label(panel, "gold", (end, run["curve"]["gold"][-1]), (6, 0), STRONG)
    label(proxy, "proxy", (end, run["curve"]["proxy"][-1]), (6, 0), INK)
    fit_lines(panel, run["fits"], end)
    if run["pilot"]["kl_peak"] is not None:
        budget = math.sqrt(run["pilot"]["kl_peak"] / 2)
        for each in (proxy, panel):
            each.axvline(budget, color=INK, ls="--", lw=0.9)
        label(
            panel,
            "budget: half the KL\nof a pilot's peak",
            (budget, 0.7 * run["end"]["gold"]),
            (6, 0),
            INK,
        )
    at = {"peak": run["peak"], **run["stops"]}
    words = {
        "peak": "peak",
        "five falls": "five falls",
        "diagnose": "diagnose",
        "diagnose, pilot's peak": "diagnose, with a pilot's peak",
        "pilot's budget": "",
    }
    for marker, (name, text) in zip("*" + MARKERS, words.items(), strict=False):
        if at[name] is not None:
            point = (math.sqrt(at[name]["kl"]), at[name]["gold"])
            size = 11 if marker == "*" else 6
            panel.plot(*point, marker=marker, ms=size, color=STRONG, mec=INK, ls="none", zorder=5)
            offset = {"peak": (0, 10), "five falls": (-9, -5)}.get(name, (9, 4))
            label(panel, text, point, offset, INK)
    return figure


def fit_lines(panel, fits: dict[str, Any], end: float) -> None:
    """Both forms, fitted to all checkpoints of a run, until sqrt(KL) = end."""
    grid = [end * k / 100 for k in range(101)]
    looks = {"best of n": ((0, (6, 2)), MUTED[0], 87, (6, 5)), "RL": (":", MUTED[1], 20, (-1, 14))}
    for name, (style, colour, place, offset) in looks.items():
        fit = fits[name]["all"]
        curve = RewardCurve(peaks.FORMS[name], fit["alpha"], fit["beta"])
        y = [curve.reward(d * d) for d in grid]
        panel.plot(grid, y, color=colour, ls=style, lw=1.3)
        text = "fit: d (\N{GREEK SMALL LETTER ALPHA} \N{MINUS SIGN} \N{GREEK SMALL LETTER BETA} "
        text += "d)" if name == "best of n" else "log d)"
        label(panel, text, (grid[place], y[place]), offset, colour)


def beta(numbers: Numbers):
    """Gold and KL by step, for the three tuned schedules at three scales of the proxy."""
    figure = new_figure((9.0, 6.4))
    panels = figure.subplots(3, 3, sharex=True, sharey="row")
    rows = {
        "gold": ("gold reward", lambda values: values),
        "kl": ("\N{SQUARE ROOT} KL, root of nats", roots),
        "beta": ("\N{GREEK SMALL LETTER BETA}", lambda values: values),
    }
    target = math.sqrt(numbers["beta"][0]["target"])
    for column, scale in zip(panels.T, SCALES, strict=True):
        for panel, (name, (_, shown)) in zip(column, rows.items(), strict=True):
            frame(panel)
            for schedule in TUNED:
                course = kind_of(numbers, schedule, scale)["course"]
                style = {"color": COLOURS[schedule], "ls": STYLES[schedule]}
                panel.plot(course["step"], shown(course[name]), lw=2.0, label=schedule, **style)
        column[0].set_title(f"proxy times {words_of(scale)}", color=INK, fontsize=9, loc="left")
        column[1].axhline(target, color=INK, lw=0.9, ls="--")
        column[2].set_yscale("log")
        column[2].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
        column[2].minorticks_off()
        column[2].set_xlabel("step")
        column[2].locator_params(axis="x", nbins=4)
    for panel, (text, _) in zip(panels[:, 0], rows.values(), strict=True):
        panel.set_ylabel(text)
    for panel in panels[:2, 0]:
        panel.locator_params(axis="y", nbins=5)
    label(panels[1, 0], "target of the adaptive beta", (0, target), (4, 7), INK)
    panels[0, 0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left")
    title(figure, "A beta that holds a KL, and two that do not", "tuned for the proxy times 1")
    return figure


def words_of(scale: float) -> str:
    """A third, or a whole number."""
    return f"{scale:.0f}" if scale >= 1 else f"1/{1 / scale:.0f}"


def frontier(numbers: Numbers):
    """Exact: closed-form optima for every beta, and the best of n; beside them, where runs end."""
    figure = new_figure((7.5, 5.6))
    proxy, panel = rewards_over_kl(
        figure,
        "What is best for the proxy at each KL",
        "lines: exact, but for the run; marks: where runs end",
    )
    world = numbers["worlds"][0]
    shown = {"frontier": ("closed form", "-", INK), "best of n": ("best of n", (0, (6, 2)), INK)}
    for kind, (text, style, colour) in shown.items():
        curve = world[kind]["curve"]
        x = roots(curve["kl"])
        for each, name in ((proxy, "proxy"), (panel, "gold")):
            each.plot(x, curve[name], color=colour, ls=style, lw=1.6)
        if kind == "best of n":
            label(panel, text, beside(curve, 1.45), (-6, 7), colour)
        else:
            label(panel, text, beside(curve, 3.6), (-8, -6), colour)
    best = main_runs(numbers)[0]["curve"]
    for each, name in ((proxy, "proxy"), (panel, "gold")):
        each.plot(roots(best["kl"]), best[name], color=STRONG, lw=1.6, ls=":")
    label(panel, "RL, \N{GREEK SMALL LETTER BETA} = 0", beside(best, 2.9), (6, 4), STRONG)
    betas_along(panel, world["frontier"]["curve"])
    names = dict.fromkeys(kind["schedule"] for kind in numbers["beta"] if kind["scale"] == 1)
    for marker, colour, name in zip(MARKERS, MUTED, names, strict=False):
        ends = kind_of(numbers, name)["ends"]
        x = roots([end["kl"] for end in ends])
        style = {"color": colour, "marker": marker, "ms": 6, "ls": "none", "mec": INK}
        proxy.plot(x, [end["proxy"] for end in ends], **style)
        panel.plot(x, [end["gold"] for end in ends], label=name, **style)
    panel.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    return figure


def betas_along(panel, curve: dict[str, Any]) -> None:
    """Ticks on the frontier with their beta."""
    top = curve["gold"].index(max(curve["gold"]))
    for wanted in (4.0, 1.0, 0.3, 0.25):
        i = nearest(curve["beta"], wanted)
        point = (math.sqrt(curve["kl"][i]), curve["gold"][i])
        panel.plot(*point, marker="|", ms=9, color=INK, ls="none")
        offset = (5, -8) if i < top else (-5, -7)
        label(panel, f"\N{GREEK SMALL LETTER BETA} = {wanted:g}", point, offset, INK)


def beside(curve: peaks.Curve, root: float) -> tuple[float, float]:
    """The point of gold whose sqrt(KL) is nearest to it."""
    at = nearest(roots(curve["kl"]), root)
    return math.sqrt(curve["kl"][at]), curve["gold"][at]


def nearest(values: Sequence[float], wanted: float) -> int:
    """The place of the value nearest to it."""
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


PICTURES: dict[str, Callable[[Numbers], Any]] = {"gold": gold, "beta": beta, "frontier": frontier}
