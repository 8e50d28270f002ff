"""What the benchmark leaves behind: tables, JSON, CSV, pictures, and comparisons of two results."""

from __future__ import annotations

import csv
import json
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PRODUCTS = "bare products"
# The titles of our ways begin with it.
OURS = "fused_rl"
MIB = 2**20

# Below this, a change of a ratio is noise whatever the spreads say.
LEAST_CHANGE = 0.05

# The columns of Liger-Kernel's benchmark files, so that both can be read by the same tools.
LIGER_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
# The first words of a case's title -> kernel_name, kernel_operation_mode.
KERNELS = {"log-probs": ("linear_logprobs", "forward"), "GRPO": ("grpo_step", "full")}

Record = dict[str, Any]
Content = dict[str, Any]


def error_of(record: Record) -> float | None:
    """Of log-probs, or of gradients: whichever the record has."""
    return record.get("logprob_error", record.get("gradient_error"))


def show(console: Console, content: Content) -> None:
    """A table per case, at the shape asked for; a sweep's other shapes are in the CSV."""
    from rich.table import Table

    records = of_first_shape(content["records"])
    for group in dict.fromkeys((r["case"], r["nhv"], *shape_of(r)) for r in records):
        title, nhv, N, H, V, dtype = group
        rows = [r for r in records if (r["case"], r["nhv"], *shape_of(r)) == group]
        table = Table(
            title=f"{title} (products: {nhv} NHV), N={N} H={H} V={V} {dtype}", title_justify="left"
        )
        table.add_column("provider")
        for name in ("ms", "p20 .. p80", "x products", "peak extra MiB", "error"):
            table.add_column(name, justify="right")
        for record in rows:
            table.add_row(*row_of(record), style=None if record["verdict"] == "right" else "red")
        console.print(table)


def of_first_shape(records: list[Record]) -> list[Record]:
    return [r for r in records if shape_of(r) == shape_of(records[0])]


def shape_of(record: Record) -> tuple[int, int, int, str]:
    return tuple(record[key] for key in ("tokens", "hidden", "vocabulary", "dtype"))


def row_of(record: Record) -> tuple[str, ...]:
    """The cells of one provider; a verdict instead of times where it is wrong or failed."""
    error = error_of(record)
    last = "" if error is None else f"{error:.1e}"
    if record["verdict"] != "right":
        return record["provider"], record["verdict"], record.get("note", ""), "", "", last
    peak = record.get("peak_extra_bytes")
    return (
        record["provider"],
        f"{record['seconds_median'] * 1e3:.1f}",
        f"{record['seconds_p20'] * 1e3:.1f} .. {record['seconds_p80'] * 1e3:.1f}",
        f"{record['ratio_to_products']:.2f}",
        "" if peak is None else f"{peak / MIB:.0f}",
        last,
    )


def write(folder: Path, content: Content) -> list[Path]:
    """bench.json, bench.csv and the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.json", folder / "bench.csv"]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(content))
    return paths + write_figures(folder, content["records"])


def csv_rows(content: Content) -> list[Record]:
    """Liger's rows: one per record and metric, over V where the vocabulary varies, else over N."""
    where, records = content["environment"], content["records"]
    common = {
        "gpu_name": where.get("gpu", where["cpu"]),
        "timestamp": where["time"],
        "liger_version": where["liger"],
    }
    usual = records[0]["vocabulary"]
    rows = []
    for record in (r for r in records if r["verdict"] == "right" and r["provider"] != PRODUCTS):
        kernel, mode = KERNELS[record["case"].split()[0]]
        N, H, V, dtype = shape_of(record)
        x, other = ("V", "vocabulary size", V), {"N": N}
        if usual == V:
            x, other = ("N", "tokens", N), {"V": V}
        fixed = {"H": H, "dtype": dtype, "case": record["case"], **other}
        for metric, unit, values in metrics(record):
            row = (kernel, record["provider"], mode, metric, unit, *x, *values, json.dumps(fixed))
            rows.append({**dict(zip(LIGER_COLUMNS, row, strict=False)), **common})
    return rows


def metrics(record: Record) -> list[tuple[str, str, tuple[float, float, float]]]:
    """Name, unit, and the 50 %, 20 % and 80 % points of what a record says."""
    times = (record[f"seconds_{p}"] * 1e3 for p in ("median", "p20", "p80"))
    found = [("speed", "ms", tuple(times))]
    if (peak := record.get("peak_extra_bytes")) is not None:
        found.append(("memory", "MB", (peak / MIB,) * 3))
    kind = "log-prob" if "logprob_error" in record else "relative gradient"
    return [*found, (f"{kind} error", "1", (error_of(record),) * 3)]


BLUES = ("#2a6fbb", "#1b3f6e", "#7fb2e5")
OTHERS = ("#c8553d", "#d9a441", "#7a5ba8", "#3a8f5c", "#b0679b")
GREY = "#8c8c8c"
AXES = (
    ("time", "ms", lambda r: r["seconds_median"] * 1e3),
    ("time / bare products", "", lambda r: r["ratio_to_products"]),
    ("extra memory at the peak", "MiB", lambda r: _per_mib(r.get("peak_extra_bytes"))),
    ("error", "", error_of),
)


def _per_mib(count: int | None) -> float | None:
    return None if count is None else max(count, 1) / MIB


def write_figures(folder: Path, records: list[Record]) -> list[Path]:
    """A picture of lines per case that was measured at several shapes; one of bars for all."""
    swept = [c for c in cases_of(records) if len({shape_of(r) for r in of_case(records, c)}) > 1]
    paths, colours = [], colours_of(records)
    for case in swept:
        kernel, _ = KERNELS[case.split()[0]]
        paths.append(folder / f"{kernel}.png")
        write_sweep(paths[-1], case, of_case(records, case), colours)
    write_bars(folder / "bench.png", of_first_shape(records), colours)
    return [*paths, folder / "bench.png"]


def cases_of(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in records))


def of_case(records: list[Record], case: str) -> list[Record]:
    return [r for r in records if r["case"] == case and r["verdict"] == "right"]


def colours_of(records: list[Record]) -> dict[str, str]:
    """One per provider: blue for our ways, grey for the bare products."""
    names = [n for n in dict.fromkeys(r["provider"] for r in records) if n != PRODUCTS]
    ours = [n for n in names if n.startswith(OURS)]
    peers = [n for n in names if not n.startswith(OURS)]
    pairs = [*zip(ours, cycle(BLUES), strict=False), *zip(peers, cycle(OTHERS), strict=False)]
    return {**dict(pairs), PRODUCTS: GREY}


def new_figure(size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_sweep(path: Path, case: str, records: list[Record], colours: dict[str, str]) -> None:
    """Time, memory and error over N (above) and V (below), both axes logarithmic."""
    figure = new_figure((15, 7))
    N, _, V, _ = shape_of(records[0])
    panels = figure.subplots(2, len(AXES))
    lines = (("tokens", "N", "vocabulary", "V", V), ("vocabulary", "V", "tokens", "N", N))
    for row, (x, label, fixed, letter, value) in zip(panels, lines, strict=True):
        chosen = sorted((r for r in records if r[fixed] == value), key=lambda r: r[x])
        for axes, (title, unit, y) in zip(row, AXES, strict=True):
            for name, colour in colours.items():
                points = [(r[x], y(r)) for r in chosen if r["provider"] == name]
                points = [p for p in points if p[1] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, ms=4)
            style(axes, f"{title}, {letter}={value}", label, unit)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(sorted({r[x] for r in chosen}), labels=sorted({r[x] for r in chosen}))
            axes.minorticks_off()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(case, fontweight="bold")
    figure.savefig(path, dpi=130)


def write_bars(path: Path, records: list[Record], colours: dict[str, str]) -> None:
    """The ratio to the bare products, and memory, of every provider in every case."""
    cases = cases_of(records)
    figure = new_figure((11, 1.2 + 1.9 * len(cases)))
    panels = figure.subplots(len(cases), 2, squeeze=False)
    columns = (
        ("time / bare products", lambda r: r["ratio_to_products"]),
        ("extra memory at the peak, MiB", lambda r: _per_mib(r.get("peak_extra_bytes"))),
    )
    for row, case in zip(panels, cases, strict=True):
        chosen = [r for r in of_case(records, case) if r["provider"] != PRODUCTS][::-1]
        names = [r["provider"] for r in chosen]
        for axes, (label, y) in zip(row, columns, strict=True):
            values = [y(r) or 0.0 for r in chosen]
            bars = axes.barh(names, values, color=[colours[n] for n in names], height=0.65)
            axes.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8)
            style(axes, case, label, "")
            axes.margins(x=0.12)
        row[0].axvline(1, color=GREY, linewidth=1)
        row[1].set_yticks([])
    figure.savefig(path, dpi=130)


def style(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def compare(before: Content, after: Content) -> list[Record]:
    """What became of every provider, by its ratio to the bare products.

    "slower" and "faster" are changes beyond the noise: 5 %, and half of each result's spread
    between its 20 % and 80 % points.
    """
    old, new = ({key_of(r, c): r for r in c["records"]} for c in (before, after))
    return [
        {"case": key[0], "provider": key[1], "shape": key[2:], **change(old.get(key), new.get(key))}
        for key in {**old, **new}
        if key[1] != PRODUCTS
    ]


def key_of(record: Record, content: Content) -> tuple:
    """Case, provider, N, H, V, dtype; results from before the sweep have one shape for all."""
    merged = {**content["shape"], **record}
    return (record["case"], record["provider"], *shape_of(merged))


def change(old: Record | None, new: Record | None) -> Record:
    """The verdict on one provider, with both ratios and the noise that the verdict allows."""
    right = [r is not None and r.get("verdict", "right") == "right" for r in (old, new)]
    a, b = (r["ratio_to_products"] if ok else None for r, ok in zip((old, new), right, strict=True))
    if old is None or new is None:
        return {"verdict": "new" if old is None else "gone", "before": a, "after": b, "noise": None}
    if not all(right):
        verdict = new["verdict"] if right[0] else "mended" if right[1] else "same"
        return {"verdict": verdict, "before": a, "after": b, "noise": None}
    noise = LEAST_CHANGE + (relative_spread(old) + relative_spread(new)) / 2
    verdict = "slower" if b > a * (1 + noise) else "faster" if a > b * (1 + noise) else "same"
    return {"verdict": verdict, "before": a, "after": b, "noise": noise}


def relative_spread(record: Record) -> float:
    middle = record["ratio_to_products"]
    low, high = (record.get(f"ratio_{p}", middle) for p in ("p20", "p80"))
    return (high - low) / middle


def regressions(changes: list[Record]) -> list[Record]:
    """Our ways that are slower, wrong or failing now."""
    bad = ("slower", "wrong", "failed")
    return [c for c in changes if c["provider"].startswith(OURS) and c["verdict"] in bad]


def show_changes(console: Console, changes: list[Record]) -> None:
    """The comparison as a table."""
    from rich.table import Table

    colours = {"slower": "red", "wrong": "red", "failed": "red", "faster": "green"}
    table = Table(title="ratio to the bare products", title_justify="left")
    for name in ("case", "N, H, V, dtype", "provider", "verdict"):
        table.add_column(name)
    for name in ("before", "after", "noise"):
        table.add_column(name, justify="right")
    for c in changes:
        ratios = ("" if c[k] is None else f"{c[k]:.2f}" for k in ("before", "after"))
        noise = "" if c["noise"] is None else f"{c['noise']:.0%}"
        shape = ", ".join(str(x) for x in c["shape"])
        cells = (c["case"], shape, c["provider"], c["verdict"], *ratios, noise)
        table.add_row(*cells, style=colours.get(c["verdict"]))
    console.print(table)


def compare_files(before: Path, after: Path) -> int:
    """Prints what changed between two bench.json; 1 if one of our ways is slower or wrong.

    ValueError if they have no shape in common.
    """
    from rich.console import Console

    changes = compare(*(json.loads(Path(p).read_text()) for p in (before, after)))
    if all(c["verdict"] in ("new", "gone") for c in changes):
        raise ValueError(f"{before} and {after} measured no provider at the same shape")
    show_changes(Console(width=140), changes)
    return int(bool(regressions(changes)))
