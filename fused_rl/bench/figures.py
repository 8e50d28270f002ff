"""The benchmark's pictures: curves of time, memory and error, and bars for a single shape.

Ours is the one strong colour; lines carry their names at their ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from pathlib import Path

from fused_rl.bench.records import (
    BARE,
    MIB,
    OURS,
    PRODUCTS,
    Record,
    cases_of,
    error_of,
    of_case,
    of_first_shape,
    on_axis,
    shape_of,
)
from fused_rl.system.drawing import INK, MARKERS, MUTED, STRONG, frame, new_figure, save, title

LETTERS = {"tokens": "N tokens", "hidden": "H", "vocabulary": "V"}
PADDED = "padded"
# Below it, what the operating system says of memory is noise.
LEAST_MIB = 1.0
# Of write_ratios.
LONGEST_BAR = 5.0


class Through(Enum):
    """Whose line the guide goes through, that shows what growth in proportion looks like."""

    OURS = "ours"
    PEER = "peer"
    NOBODY = "nobody"


@dataclass(frozen=True)
class Metric:
    """A row of panels."""

    label: str
    value: Callable[[Record], float | None]
    guide: Through


def _mib(record: Record) -> float | None:
    count = record.get("peak_extra_bytes")
    return None if count is None else max(count / MIB, LEAST_MIB)


TIME = Metric("time, ms", lambda r: r["seconds_median"] * 1e3, Through.OURS)
MEMORY = Metric("peak extra memory, MiB", _mib, Through.PEER)
LOGPROB_ERROR = Metric("error of log-probs, nats", error_of, Through.NOBODY)
GRADIENT_ERROR = Metric("relative error of gradients", error_of, Through.NOBODY)


def write_figures(
    folder: Path, records: list[Record], prefix: str = "", suffix: str = "png"
) -> list[Path]:
    """The curves of every case that has some; returns their paths."""
    paths = []
    swept = {r["case"]: r["name"] for r in records if r.get("axis") in LETTERS}
    for case, name in swept.items():
        paths.append(folder / f"{prefix}{name}.{suffix}")
        write_curves(paths[-1], records, case)
    padded = [r["case"] for r in records if r.get("axis") == PADDED]
    if padded:
        paths.append(folder / f"{prefix}padding.{suffix}")
        write_padding(paths[-1], records, padded[0])
    return paths


def write_curves(path: Path, records: list[Record], case: str) -> None:
    """Time, memory and error (rows) against each axis that was swept (columns)."""
    swept = [r for r in of_case(records, case) if "axis" in r]
    columns = [axis for axis in LETTERS if any(r["axis"] == axis for r in swept)]
    error = GRADIENT_ERROR if any("gradient_error" in r for r in swept) else LOGPROB_ERROR
    looks = looks_of(of_case(records, case))
    figure = new_figure((1.6 + 3.1 * len(columns), 8.0))
    panels = figure.subplots(3, len(columns), sharey="row", squeeze=False)
    for row, metric in zip(panels, (TIME, MEMORY, error), strict=True):
        for panel, axis in zip(row, columns, strict=True):
            draw(panel, on_axis(records, case, axis), axis, metric, looks)
            panel.set_xlabel(LETTERS[axis])
        row[0].set_ylabel(metric.label)
        # Every column has had its say about the limits now.
        for panel in row:
            draw_guide(panel, metric, anchor=-1)
        name_lines(row[-1], looks)
    N, H, V, dtype = shape_of(of_first_shape(records)[0])
    title(figure, case, f"one of N, H, V varies, the others: N={N} H={H} V={V}, {dtype}")
    save(figure, path)


def write_padding(path: Path, records: list[Record], case: str) -> None:
    """Time and memory while padding grows around the same counted tokens."""
    chosen = on_axis(records, case, PADDED)
    looks = looks_of(chosen)
    figure = new_figure((9.0, 3.3))
    panels = figure.subplots(1, 2)
    for panel, metric in zip(panels, (TIME, MEMORY), strict=True):
        draw(panel, chosen, "tokens", metric, looks)
        panel.set(xlabel="B * T, tokens with padding", ylabel=metric.label)
        draw_guide(panel, metric, anchor=0)
        name_lines(panel, looks)
    counted = chosen[0]["counted_tokens"]
    _, H, V, dtype = shape_of(chosen[0])
    title(figure, case, f"{counted} tokens are under the loss throughout, H={H} V={V}, {dtype}")
    save(figure, path)


def looks_of(records: list[Record]) -> dict[str, dict]:
    """How the line of each provider is drawn."""
    names = list(dict.fromkeys(r["provider"] for r in records))
    ours = [n for n in names if n.startswith(OURS)]
    peers = [n for n in names if not n.startswith(OURS) and n not in BARE]
    looks = {n: {"color": INK, "lw": 1.0, "ls": "-", "zorder": 2} for n in names if n == PRODUCTS}
    for name, colour, marker in zip(peers, cycle(MUTED), cycle(MARKERS), strict=False):
        looks[name] = {"color": colour, "lw": 1.2, "marker": marker, "ms": 3.5, "zorder": 3}
    for name, dashes in zip(ours, cycle(("-", (0, (4, 1.5)))), strict=False):
        looks[name] = {"color": STRONG, "lw": 2.4, "ls": dashes, "marker": "o", "ms": 5}
        looks[name]["zorder"] = 5
    return looks


def draw(panel, records: list[Record], x: str, metric: Metric, looks: dict) -> None:
    """A line per provider, axes logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    frame(panel)
    panel.set(xscale="log", yscale="log")
    for name, look in looks.items():
        values = [(r[x], metric.value(r)) for r in records if r["provider"] == name]
        points = [p for p in values if p[1] is not None]
        if points and (name != PRODUCTS or metric is TIME):
            panel.plot(*zip(*points, strict=True), label=name, **look)
    ticks = sorted({r[x] for r in records})
    panel.set_xticks(ticks, labels=[str(t) for t in ticks])
    narrow = max(panel.get_ylim()) < 100 * min(panel.get_ylim())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())


def draw_guide(panel, metric: Metric, anchor: int) -> None:
    """Growth in proportion, through the first (0) or last (-1) point of the line it belongs to."""
    lines = [line for line in panel.get_lines() if line.get_label() != PRODUCTS]
    ours = [line for line in lines if line.get_label().startswith(OURS)]
    peers = [line for line in lines if line not in ours]
    through = {Through.OURS: ours, Through.PEER: peers or ours, Through.NOBODY: []}[metric.guide]
    if not through:
        return
    x, y = through[0].get_data()
    slope = y[anchor] / x[anchor]
    low, high = panel.get_ylim()
    ends = max(min(x), low / slope), min(max(x), high / slope)
    heights = [slope * end for end in ends]
    panel.plot(ends, heights, scalex=False, scaley=False, color=INK, lw=1.2, ls=(0, (1, 2)))
    far = -1 if anchor == 0 else 0
    beside = far == -1 or ends[0] > min(x)
    panel.annotate(
        "linear",
        (ends[far], heights[far]),
        textcoords="offset points",
        xytext=(-4, 3) if beside else (8, -1),
        ha="right" if beside else "left",
        va="bottom" if beside else "top",
        fontsize=7,
        color=INK,
    )


def name_lines(panel, looks: dict) -> None:
    """The names of the lines at their right ends, moved apart where they would touch."""
    ends = {}
    for line in panel.get_lines():
        if line.get_label() in looks:
            at = panel.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))
            ends[line.get_label()] = panel.transAxes.inverted().transform(at)[1]
    for name, height in spaced(ends, gap=0.075).items():
        panel.text(
            *(1.04, height, name),
            transform=panel.transAxes,
            color=looks[name]["color"],
            fontsize=8,
            fontweight="bold" if name.startswith(OURS) else "normal",
            va="center",
        )


def spaced(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights in rising order, at least `gap` apart, and the highest not over 1 if need be."""
    names = sorted(heights, key=heights.get)
    found: list[float] = []
    for name in names:
        found.append(max([heights[name], *(h + gap for h in found[-1:])]))
    for i in range(len(found) - 1, -1, -1):
        above = 1.0 if i == len(found) - 1 else found[i + 1] - gap
        found[i] = min(found[i], above)
    return dict(zip(names, found, strict=True))


def write_bars(path: Path, records: list[Record]) -> None:
    """The ratio to the bare products, and memory, of every provider in every case."""
    records = of_first_shape(records)
    cases, looks = cases_of(records), looks_of(records)
    figure = new_figure((11, 1.2 + 1.9 * len(cases)))
    panels = figure.subplots(len(cases), 2, squeeze=False)
    columns = (("time / bare products", lambda r: r["ratio_to_products"]), (MEMORY.label, _mib))
    for row, case in zip(panels, cases, strict=True):
        chosen = [r for r in of_case(records, case) if r["provider"] not in BARE][::-1]
        names = [r["provider"] for r in chosen]
        for panel, (label, value) in zip(row, columns, strict=True):
            frame(panel)
            values = [value(r) or 0.0 for r in chosen]
            colours = [looks[n]["color"] for n in names]
            bars = panel.barh(names, values, color=colours, height=0.65)
            panel.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8, color=INK)
            panel.set_xlabel(label)
            panel.set_title(case, loc="left", fontsize=10, fontweight="bold", color=INK)
            panel.margins(x=0.12)
        row[0].axvline(1, color=INK, lw=1)
        row[1].set_yticks([])
    save(figure, path)


def write_ratios(path: Path, records: list[Record]) -> None:
    """The ratio to the bare products of every provider, a panel for each case. A bar beyond the
    scale ends there, and its label says how long it is.
    """
    cases, looks = cases_of(records), looks_of(records)
    chosen = [of_case(records, case)[::-1] for case in cases]
    rows = (len(cases) + 1) // 2
    figure = new_figure((10, rows * (0.7 + 0.2 * max(map(len, chosen)))))
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for panel, case, here in zip(panels, cases, chosen, strict=False):
        frame(panel)
        ratios = {r["provider"]: r["ratio_to_products"] for r in here if r["provider"] != PRODUCTS}
        cut = [min(ratio, LONGEST_BAR) for ratio in ratios.values()]
        bars = panel.barh([*ratios], cut, color=[looks[n]["color"] for n in ratios], height=0.65)
        labels = [f"{ratio:.2f}" for ratio in ratios.values()]
        panel.bar_label(bars, labels, padding=3, fontsize=8, color=INK)
        panel.set_title(case, loc="left", fontsize=9, fontweight="bold", color=INK)
        panel.set_xlim(0, LONGEST_BAR * 1.1)
        panel.axvline(1, color=INK, lw=1)
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    figure.supxlabel("time / bare products", color=INK, fontsize=9)
    save(figure, path)
