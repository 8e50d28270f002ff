"""Pictures of the study's part on gradients, of its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fused_rl.study.moments import batch_error
from fused_rl.study.part import Numbers
from fused_rl.system.drawing import INK, MARKERS, MUTED, STRONG, frame, new_figure

DISTANCE = "distance of the policy from its reference, nats (KL of whole sequences)"
OPTIONS = ("k1 in reward", "k3 in loss", "k2 in loss", "k1 in loss", "k3 in reward", "k3 in both")
OPTIONS += ("exact in loss", "k2 of")
BATCH = 1024
FLOOR = 0.005
"""Where a bias of 0 is drawn on a logarithmic axis."""
PRODUCT = "k1 in reward, product ratio"
AGED = {
    "k3 in loss": "k3 in loss",
    "k1 in loss": "k1 in loss",
    "k2 in loss": "k2 in loss",
    "kept k1 in reward, token ratio": "kept k1 in reward,\ntoken ratio",
}
"""Ways whose staleness is drawn, and their labels."""


def bias(numbers: Numbers):
    """The bias against the distance, on-policy."""
    labels = {
        "k3 in reward": "k3 in reward",
        "k1 in loss": "k1 in loss",
        "k3 in loss": "k3 in loss",
        "k2 in loss": "k2 in loss, or exact",
        "k1 in reward": "0: k1 in reward; k3 in both;\nexact in loss, later in reward",
    }
    lines = numbers["path"]["lines"]
    curves = {label: [max(v, FLOOR) for v in lines[name]["bias"]] for name, label in labels.items()}
    figure, panel = new_panel(DISTANCE, "bias / length of the true gradient")
    panel.set(xscale="log", yscale="log", ylim=(FLOOR, 2))
    panel.set_yticks([FLOOR, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    panel.set_yticks([], minor=True)
    draw(panel, numbers["path"]["distance"], curves)
    return figure


def variance(numbers: Numbers):
    """The noise of one sequence against the distance, on-policy."""
    lines = numbers["path"]["lines"]
    curves = {name.replace(", later", ",\nlater"): line["noise"] for name, line in lines.items()}
    figure, panel = new_panel(DISTANCE, "noise of one sequence / length of the true gradient")
    panel.set(xscale="log", yscale="log", ylim=(0.05, 200))
    draw(panel, numbers["path"]["distance"], curves)
    return figure


def staleness(numbers: Numbers):
    """The bias against the age of the samples."""
    labels = {
        **AGED,
        "k1 in reward, token ratio": "k1 in reward, token ratio",
        "k2 in loss, token ratio": "token ratio: k2 in loss,\nk3 in loss attached; exact",
        PRODUCT: "0, product ratio: k1 in reward,\nk3 in loss attached, k2 of sum",
    }
    return against_age(numbers, labels, "bias", "bias / length of the true gradient")


def direction(numbers: Numbers):
    """The cosine with the true gradient against the age of the samples."""
    labels = {**AGED, "k3 in reward": "k3 in reward", PRODUCT: "1: product ratio"}
    return against_age(numbers, labels, "cosine", "cosine of mean and true gradient")


def ratios(numbers: Numbers):
    """The error of a batch against the KL to the policy that sampled."""
    found = numbers["ratios"]
    curves = {}
    for name, line in found["lines"].items():
        moments = zip(line["bias"], line["noise"], strict=True)
        label = name.replace(", product", ",\nproduct").replace(", later", ",\nlater")
        curves[label] = [batch_error(*m, BATCH) for m in moments]
    figure, panel = new_panel(
        "KL of whole sequences to the policy that sampled, nats",
        f"error of {BATCH} sequences / length of the true gradient",
    )
    panel.set(xscale="log", yscale="log")
    draw(panel, found["distance"], curves)
    return figure


def against_age(numbers: Numbers, labels: dict[str, str], quantity: str, named: str):
    """Ages are in steps; below each is the KL to the policy that sampled."""
    found = numbers["staleness"]
    curves = {label: found["lines"][name][quantity] for name, label in labels.items()}
    figure, panel = new_panel(
        "age of the samples, steps; below it the KL to the policy that sampled, nats", named
    )
    ages = range(len(found["kl_to_old"]))
    draw(panel, list(ages), curves)
    panel.set_xticks(ages[::2], [f"{age}\n{found['kl_to_old'][age]:.2g}" for age in ages[::2]])
    return figure


def new_panel(x: str, y: str):
    """A figure and its only panel, with room for labels at the right."""
    figure = new_figure((7.5, 4.2))
    panel = figure.add_subplot()
    frame(panel)
    panel.tick_params(which="minor", colors=INK)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    return figure, panel


def draw(panel, x: list[float], curves: dict[str, list[float]]) -> None:
    """Curves, named where they end; the panel has its scales."""
    looks = looks_of(curves)
    for y, look in zip(curves.values(), looks, strict=True):
        panel.plot(x, y, lw=1.6, ms=4, clip_on=False, **look)
    panel.set_xlim(min(x), max(x))
    panel.set_ylim(panel.get_ylim())
    ends = panel.transData.transform([(x[-1], y[-1]) for y in curves.values()])
    heights = panel.transAxes.inverted().transform(ends)[:, 1].tolist()
    sizes = [0.02 + 0.037 * (name.count("\n") + 1) for name in curves]
    for name, look, height, place in zip(
        curves, looks, heights, places(heights, sizes), strict=True
    ):
        options = {"transform": panel.transAxes, "color": look["color"]}
        panel.plot((1.01, 1.04), (height, place), lw=0.8, clip_on=False, **options)
        panel.text(1.05, place, name, va="center", fontsize=8, **options)


def looks_of(labels: Iterable[str]) -> list[dict[str, str]]:
    """A colour and a marker for each option, the same in every picture; dashes tell those of one
    picture apart. A label is of the option that it names first."""
    looks, seen = [], Counter()
    for label in labels:
        text = label.replace("\n", " ")
        option = min((o for o in OPTIONS if o in text), key=text.index, default=None)
        i = OPTIONS.index(option) if option else len(OPTIONS)
        colour = (STRONG, *MUTED, INK)[i]
        dashes = ("-", "--", ":")[seen[option]] if seen[option] else ("-", "--", "-.", ":")[i % 4]
        seen[option] += 1
        looks.append({"color": colour, "marker": (*MARKERS, "*", "h")[i], "ls": dashes})
    return looks


def places(heights: list[float], sizes: list[float]) -> list[float]:
    """Where labels of these sizes go, as near to these heights as they can without overlapping.

    Those that would overlap stand together, around the mean of their heights.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], heights, sizes):
            last = groups.pop()
            groups[-1] += last
    found = [0.0] * len(heights)
    for group in groups:
        low, _ = _span(group, heights, sizes)
        for i in group:
            found[i] = low + sizes[i] / 2
            low += sizes[i]
    return found


def _span(group: list[int], heights: list[float], sizes: list[float]) -> tuple[float, float]:
    middle = sum(heights[i] for i in group) / len(group)
    half = sum(sizes[i] for i in group) / 2
    return middle - half, middle + half


def _overlap(below: list[int], above: list[int], heights: list[float], sizes: list[float]) -> bool:
    return _span(below, heights, sizes)[1] > _span(above, heights, sizes)[0]
