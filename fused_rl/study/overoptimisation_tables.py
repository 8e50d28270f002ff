"""What the numbers of overoptimisation.py say: where gold peaks, what foresees it, what beta does,
and which claims hold here."""

from __future__ import annotations

from typing import Any

from fused_rl.study import peaks
from fused_rl.study.part import Numbers, Table
from fused_rl.study.proxy_claims import CLAIMS, HEADER
from fused_rl.study.readings import ends, main_runs, number, percent, ratio


def tables(numbers: Numbers) -> list[Table]:
    """All of them."""
    return [
        peak_table(numbers),
        fit_table(numbers),
        stop_table(numbers),
        beta_table(numbers),
        Table("Claims", HEADER, [claim(numbers).cells for claim in CLAIMS]),
    ]


def peak_table(numbers: Numbers) -> Table:
    """Exact curves of the main world and of the others, and all runs without a KL."""
    main, *others = numbers["worlds"]
    of = {
        "closed-form optima (exact)": [main["frontier"]["peak"]],
        "best of n (exact)": [main["best of n"]["peak"]],
        "RL, beta = 0": [run["peak"] for run in numbers["free"]],
        "closed-form optima, other worlds": [world["frontier"]["peak"] for world in others],
        "best of n, other worlds": [world["best of n"]["peak"] for world in others],
    }
    columns = ("kl", "proxy", "gold", "kept_half", "kept_quarter")
    rows = []
    for name, found in of.items():
        of_column = {column: [peak[column] for peak in found] for column in columns}
        cells = [percent(v) if "kept" in c else number(v) for c, v in of_column.items()]
        rows.append((name, *cells))
    header = ("curve", "KL at gold's peak, nats", "proxy there", "gold there")
    return Table(
        "Where the gold reward peaks",
        (*header, "gain kept at half that KL", "at a quarter"),
        rows,
    )


def fit_table(numbers: Numbers) -> Table:
    """The fits of both forms to the main world's curves, and to runs."""
    rows = []
    for form in peaks.FORMS:
        for kind in ("frontier", "best of n"):
            found = numbers["worlds"][0][kind]
            fit = found["fits"][form]
            name = {"frontier": "closed-form optima"}.get(kind, kind)
            rows.append((name, form, number(fit["rms"]), ratio([(found, fit)]), "", ""))
        runs = main_runs(numbers)
        cells = [
            ratio([(run, run["fits"][form][share]) for run in runs])
            for share in ("all", "until the peak", "third")
        ]
        errors = [run["fits"][form]["all"]["rms"] for run in runs]
        rows.append(("RL, beta = 0", form, number(errors), *cells))
    header = ("curve", "form of the fit", "rms error of gold", "fitted / true KL of the peak")
    return Table(
        "What a fit of two numbers foresees",
        (*header, "from those until the peak", "from the first third"),
        sorted(rows),
    )


def stop_table(numbers: Numbers) -> Table:
    """Monitors, on what samples say of each checkpoint."""
    runs = main_runs(numbers)
    rows = [("gold's peak", *stop_cells([run["peak"] for run in runs], runs))]
    for name in runs[0]["stops"]:
        stopped = [run for run in runs if run["stops"][name] is not None]
        rows.append((name, *stop_cells([run["stops"][name] for run in stopped], stopped)))
    rows.append(("never", *stop_cells([run["end"] for run in runs], runs)))
    header = ("stopped by", "step", "KL, nats", "proxy", "gold", "of the peak's gain")
    return Table("Where a monitor stops a run without a KL", header, rows)


def stop_cells(points: list[dict[str, float]], runs: list[dict[str, Any]]) -> tuple[str, ...]:
    if not points:
        return ("never", *[""] * 4)
    kept = [point["gold"] / run["peak"]["gold"] for point, run in zip(points, runs, strict=True)]
    cells = [number([point[name] for point in points]) for name in ("kl", "proxy", "gold")]
    return (number([point["step"] for point in points], ".0f"), *cells, percent(kept))


def beta_table(numbers: Numbers) -> Table:
    """The ends of runs, over seeds."""
    rows = []
    for kind in numbers["beta"]:
        cells = [ends(kind, name) for name in ("beta", "kl", "kl_deviation", "proxy", "gold")]
        said = ", ".join(sorted({x for found in kind["ailments"] for x in found})) or "nothing"
        rows.append((kind["schedule"], f"{kind['scale']:.2g}", *map(number, cells), said))
    target = numbers["beta"][0]["target"]
    header = ("beta", "proxy times", "beta at the end", "KL, nats", "KL's deviation", "proxy")
    return Table(
        f"Schedules of beta, tuned for the proxy times 1 and a KL of {number(target)} nats",
        (*header, "gold", "diagnose says"),
        rows,
    )
