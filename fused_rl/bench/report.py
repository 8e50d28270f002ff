"""What the benchmark leaves behind: tables, JSON and CSV, and comparisons of two results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fused_rl.bench.figures import write_bars, write_figures
from fused_rl.bench.records import (
    BARE,
    ERRORS,
    MIB,
    OURS,
    Content,
    Record,
    error_of,
    of_first_shape,
    ratio_to_full,
    read_result,
    shape_of,
)
from fused_rl.system import outputs

if TYPE_CHECKING:
    from rich.console import Console

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
# How a case's title begins -> kernel_name, kernel_operation_mode.
KERNELS = {
    "log-probs": ("linear_logprobs", "forward"),
    "GRPO": ("grpo_step", "full"),
    "divergence,": ("linear_divergence", "forward"),
    "distillation": ("distillation_step", "full"),
    "DPO": ("dpo_step", "full"),
    "SimPO": ("simpo_step", "full"),
}


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
        cells = [cells_of(records, r) for r in rows]
        # What nobody has, as the processor's time on a GPU, has no column.
        names = [name for name in cells[0] if name in ALWAYS or any(c[name] for c in cells)]
        for name in names:
            justify = "left" if name == "provider" else "right"
            # A note of what failed stands where times have their spread.
            table.add_column(name, justify=justify, no_wrap=name != SPREAD)
        for record, cell in zip(rows, cells, strict=True):
            style = None if record["verdict"] == "right" else "red"
            table.add_row(*(cell[name] for name in names), style=style)
        console.print(table)


SPREAD, PEAK = "p20 .. p80", "peak\nextra\nMiB"
ALWAYS = ("provider", "ms", SPREAD, "x bare\nproducts", PEAK, "error")


def cells_of(records: list[Record], record: Record) -> dict[str, str]:
    """column -> cell, of one provider; a verdict instead of times where it is wrong or failed."""

    def cell(name: str, digits: int, unit: float = 1.0) -> str:
        return "" if record.get(name) is None else f"{record[name] / unit:.{digits}f}"

    def ms(name: str) -> str:
        return cell(name, 1 if record.get(name, 1) < 0.1 else 0, 1e-3)

    error, full = error_of(record), ratio_to_full(records, record)
    span = "..".join(ms(f"seconds_{p}") for p in ("p20", "p80"))
    right = record["verdict"] == "right"
    return {
        "provider": record["provider"],
        "ms": ms("seconds_median") if right else record["verdict"],
        SPREAD: span if right else record.get("note", ""),
        "user\nCPU ms": ms("user_seconds_median"),
        "x bare\nproducts": cell("ratio_to_products", 2),
        "x those\nallocating": cell("ratio_to_allocating_products", 2),
        "x full\nstep": f"{full:.2f}" if right and full else "",
        PEAK: cell("peak_extra_bytes", 0, MIB),
        "error": "" if error is None else f"{error:.1e}",
    }


# Of every run; a sweep adds pictures.
FILES = ("bench.json", "bench.csv", "bench.png")


def write(folder: Path, content: Content) -> list[Path]:
    """bench.json, bench.csv and the pictures; returns their paths."""
    paths = [*write_data(folder / "bench", content), folder / "bench.png"]
    write_bars(paths[-1], content["records"])
    return paths + write_figures(folder, content["records"])


def write_data(stem: Path, content: Content) -> list[Path]:
    """JSON and CSV at `stem` with their suffixes; returns their paths."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("json", "csv")]
    outputs.write_json(paths[0], content)
    with outputs.replacing(paths[1]) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(content))
    return paths


# axis -> x_name, x_label.
X_OF = {
    "tokens": ("N", "tokens"),
    "hidden": ("H", "hidden size"),
    "vocabulary": ("V", "vocabulary size"),
}


def csv_rows(content: Content) -> list[Record]:
    """Liger's rows: one per record and metric, over what varies on the record's axis, else N."""
    where, records = content["environment"], content["records"]
    common = {
        "gpu_name": where.get("gpu", where["cpu"]),
        "timestamp": where["time"],
        "liger_version": where["liger"],
    }
    rows = []
    for record in (r for r in records if r["verdict"] == "right" and r["provider"] not in BARE):
        kernel, mode = KERNELS[record["case"].split()[0]]
        axis = record.get("axis", "tokens")
        axis = axis if axis in X_OF else "tokens"
        x = (*X_OF[axis], record[axis])
        fixed = {letter: record[key] for key, (letter, _) in X_OF.items() if key != axis}
        fixed |= {"dtype": record["dtype"], "case": record["case"]}
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
    kind = next(said for name, said in ERRORS.items() if name in record)
    return [*found, (kind, "1", (error_of(record),) * 3)]


def compare(before: Content, after: Content) -> list[Record]:
    """What became of every provider, by its ratio to the bare products; to those that allocate,
    where one of the two results knows no others.

    "slower" and "faster" are changes beyond the noise: 5 %, and half of each result's spread
    between its 20 % and 80 % points.
    """
    old, new = ({key_of(r, c): r for r in c["records"]} for c in (before, after))
    return [
        {"case": key[0], "provider": key[1], "shape": key[2:], **change(old.get(key), new.get(key))}
        for key in {**old, **new}
        if key[1] not in BARE
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
    a, b = alike(old, new)
    noise = LEAST_CHANGE + (relative_spread(old) + relative_spread(new)) / 2
    verdict = "slower" if b > a * (1 + noise) else "faster" if a > b * (1 + noise) else "same"
    return {"verdict": verdict, "before": a, "after": b, "noise": noise}


def alike(old: Record, new: Record) -> tuple[float, float]:
    """The ratios of both to the same products: to those that allocate where one is of a CPU and
    older, and has no other ratio under the name of the one that judges.
    """
    name = "ratio_to_allocating_products"
    if (name in old) == (name in new):
        return old["ratio_to_products"], new["ratio_to_products"]
    return old.get(name, old["ratio_to_products"]), new.get(name, new["ratio_to_products"])


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

    OSError or ValueError if one is no result, or they have no shape in common.
    """
    from rich.console import Console

    changes = compare(read_result(before), read_result(after))
    if all(c["verdict"] in ("new", "gone") for c in changes):
        raise ValueError(f"{before} and {after} measured no provider at the same shape")
    show_changes(Console(width=140, markup=False), changes)
    return int(bool(regressions(changes)))
