"""`make bench`: what `fused-rl bench` does, with its options; and the README's table.

python bench/run.py [--preset Qwen3-0.6B] [--tokens 1024] [--sweep] [--out DIR] ...
python bench/run.py --readme bench/results/NAME.json      the README's table from a result
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fused_rl import cli
from fused_rl.bench_report import MIB, PRODUCTS, cases_of, error_of, of_first_shape

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main() -> int:
    if sys.argv[1:2] != ["--readme"]:
        return cli.main(["bench", *sys.argv[1:]])
    source = Path(sys.argv[2])
    readme = Path("README.md")
    before, rest = readme.read_text().split(BEGIN)
    block = "\n".join(table(json.loads(source.read_text()), source))
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}")
    return 0


def table(content: dict, source: Path) -> list[str]:
    """The lines between the README's markers."""
    shape, where = content["shape"], content["environment"]
    records = [{**shape, **record} for record in content["records"]]
    lines = [
        f"N = {shape['tokens']} tokens, H = {shape['hidden']}, V = {shape['vocabulary']}, "
        f"{shape['dtype']}, on {where['cores']} cores of an {where['cpu']} "
        f"({where['backend']['note']}), torch {where['torch']}: [{source.name}]({source}), "
        "or `make bench` on your machine.",
        "",
        "| | time, ms | x bare products | extra memory, MiB | error |",
        "|---|---|---|---|---|",
    ]
    for case in cases_of(records):
        lines += [row(r) for r in of_first_shape(records) if r["case"] == case]
    return [
        *lines,
        "",
        "Medians of interleaved runs; below 1 is less time than torch's own products take. The "
        "error is the largest of the log-probs against float64 in the first case, and in the "
        "others the relative error of the gradients against float32 or better.",
    ]


def row(record: dict) -> str:
    """One provider."""
    if (verdict := record.get("verdict", "right")) != "right":
        return f"| {record['provider']} | {verdict} | | | |"
    ms = f"{record['seconds_median'] * 1e3:.0f}"
    if record["provider"] == PRODUCTS:
        return f"| **{record['case']}** ({record['nhv']} NHV) | {ms} | 1 | | |"
    peak = record["peak_extra_bytes"]
    memory = "" if peak is None else f"{peak / MIB:.0f}"
    ratio = f"{record['ratio_to_products']:.2f}"
    return f"| {record['provider']} | {ms} | {ratio} | {memory} | {error_of(record):.0e} |"


if __name__ == "__main__":
    sys.exit(main())
