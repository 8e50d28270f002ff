"""What gpu.py prints at its end: errors, ceilings, what the choices cost, and the cases last."""

from __future__ import annotations

from collections.abc import Iterable

import forwards

from fused_rl.bench.records import MIB, Record, error_of


def show(content: Record) -> None:
    """Everything that a person wants to see of a result."""
    for dtype, by_size in content["correctness"].items():
        for size, errors in by_size.items():
            print(f"{dtype:10}{size:25}" + " ".join(f"{e:.1e}" for e in errors))
    wrong = [r for r in content["small cases"] if r["verdict"] != "right"]
    print(f"{len(content['small cases'])} small cases, {len(wrong)} of them not right")
    for record in wrong:
        print(f"  {record}")
    if "ceilings" in content:
        print(", ".join(f"{k} {v:.1f}" for k, v in content["ceilings"].items()))
    for name in ("forwards", "products", "row kernels", "chunks", "graph"):
        table(name, map(choice, content[name]))
    for record in best_forwards(content["forwards"]):
        print(record)
    print(f"\nkernels: {content['kernels']}; launches: {content['launches']}")
    for name in ("missing", "left out", "peers failed", "wrong", "failed", "never launched"):
        if content[name]:
            print(f"{name}: {content[name]}")
    table("cases", map(case, content["records"]))


def table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell."""
    rows = list(rows)
    if not rows:
        return
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def choice(record: Record) -> tuple[str, ...]:
    """A row of what decisions.py tried."""
    detail = f"N={record['tokens']}" if "tokens" in record else ""
    detail += " frozen" if record.get("frozen") else ""
    if "failed" in record:
        why = f"failed: {record['failed'][:60]}"
        return (record["shape"], detail, record["way"], why, "", "", "")
    if "equal" in record:
        graph = "captured" if record["captured"] else "no GPU: not captured"
        close = "a rounding" if record["within_an_ulp"] else "too much"
        same = "same bits" if record["equal"] else f"{record['difference']:.1e}: {close}"
        return (record["shape"], detail, record["way"], graph, same, "", "")
    error = record.get("logprob_error", record.get("difference"))
    last = f"{record['GB_per_s']:.0f} GB/s" if "GB_per_s" in record else ""
    last = f"{record['TFLOP_per_s']:.0f} TFLOP/s" if "TFLOP_per_s" in record else last
    last = f"{error:.1e}" if error is not None else last
    if "logprob_error" in record and not forwards.is_right(record):
        last += f", the products {record['logprob_error_of_products']:.1e}: too far"
    host = f"host {record['host_ms']:.3f} ms"
    cells = (f"{record['ms_median']:.3f} ms", host, f"x {record['ratio']:.2f}", last)
    return (record["shape"], detail, record["way"], *cells)


def best_forwards(records: list[Record]) -> list[str]:
    """The fastest way for each number of tokens."""
    timed = [r for r in records if "ms_median" in r and "logprob_error" in r]
    lines = []
    for key in dict.fromkeys((r["shape"], r["tokens"]) for r in timed):
        here = [r for r in timed if (r["shape"], r["tokens"]) == key]
        best = min(here, key=lambda r: r["ms_median"])
        lines.append(f"{key[0]}, {key[1]} tokens: {best['way']}, {best['ratio']:.2f} x products")
    return lines


def case(record: Record) -> tuple[str, ...]:
    """A provider in a case."""
    names = (record["shape"], record["case"], record["provider"])
    if record["verdict"] != "right":
        return (*names, record["verdict"], "", "", "", record.get("note", "")[:60])
    memory = record.get("peak_extra_bytes")
    error = error_of(record)
    return (
        *names,
        f"{record['seconds_median'] * 1e3:.2f} ms",
        f"host {record['host_ms']:.2f} ms",
        f"x {record['ratio_to_products']:.2f}",
        "" if memory is None else f"{memory / MIB:.0f} MiB",
        "" if error is None else f"{error:.1e}",
    )
