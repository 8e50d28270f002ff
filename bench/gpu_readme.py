"""The table of a GPU in docs/benchmarks.md, from a result of bench/gpu.py.

    python bench/gpu_readme.py bench/results/h200-bfloat16.json

It is written between gpu:begin and gpu:end: every case of the first shape beside the peers, of the
other shapes ours alone, and by name what was wrong, failed, or did not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from errors import LOGPROB_ERROR
from run import PAGE, replace_block, row

from fused_rl.bench.records import OURS, PRODUCTS, Content, Record
from fused_rl.bench.tasks import KINDS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write into")
    arguments = parser.parse_args(argv)
    content = json.loads(arguments.result.read_text())
    link = os.path.relpath(arguments.result.resolve(), arguments.page.resolve().parent)
    replace_block(arguments.page, "gpu", lines(content, link))
    return 0


def lines(content: Content, link: str) -> list[str]:
    """The block: where, the first shape in full, the others in short, what is missing."""
    where, records = content["environment"], content["records"]
    first = of_first_shape(records)
    shape = first[0]
    return [
        f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}: "
        f"[{Path(link).name}]({link}), by `python bench/gpu.py` (commit {content['commit'][:7]}). "
        f"{shape['shape']}'s head, N = {shape['tokens']}, H = {shape['hidden']}, "
        f"V = {shape['vocabulary']}, {shape['dtype']}; medians of interleaved runs.",
        "",
        "| | time, ms | x bare products | extra memory, MiB | error |",
        "|---|---|---|---|---|",
        *map(row, first),
        "",
        "| ours at other heads, x bare products | " + " | ".join(k.title for k in KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
        *short_rows(records),
        "",
        *faults(content),
    ]


def first_shape(records: list[Record]) -> str:
    """The one with the most records: that is measured beside all of the peers."""
    return Counter(r["shape"] for r in records).most_common(1)[0][0]


def of_first_shape(records: list[Record]) -> list[Record]:
    """Case by case, in the order of KINDS."""
    here = [r for r in records if r["shape"] == first_shape(records)]
    return [r for kind in KINDS for r in here if r["case"] == kind.title]


def short_rows(records: list[Record]) -> list[str]:
    """A line for each other shape: the ratios of linear_policy_loss / linear_logprobs."""
    first = first_shape(records)
    rows = []
    for shape in dict.fromkeys(r["shape"] for r in records if r["shape"] != first):
        here = [r for r in records if r["shape"] == shape]
        cells = []
        for kind in KINDS:
            ours = [r for r in here if r["case"] == kind.title and r["provider"].startswith(OURS)]
            ratios = [f"{r['ratio_to_products']:.2f}" for r in ours if r["verdict"] == "right"]
            cells.append(" / ".join(ratios) or "-")
        size = next(r for r in here if r["provider"] == PRODUCTS)
        title = f"{shape}, {size['tokens']} x {size['hidden']} x {size['vocabulary']}"
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return rows


def faults(content: Content) -> list[str]:
    """What was wrong, failed or left out, each with its name; one line where nothing was."""
    found = [f"- wrong: {name}: {why}" for name, why in content["wrong"].items()]
    found += [f"- failed: {name}: {why}" for name, why in content["failed"].items()]
    found += [f"- a CUDA graph: {r['failed']}" for r in content["graph"] if "failed" in r]
    reasons = Counter(r["failed"] for r in content["forwards"] if "failed" in r)
    found += [f"- {n} of the forwards that were tried: {why}" for why, n in reasons.items()]
    errors = [r["logprob_error"] for r in content["forwards"] if "logprob_error" in r]
    if over := [error for error in errors if not error <= LOGPROB_ERROR]:
        found.append(
            f"- {len(over)} of {len(errors)} forwards are further from float64 than "
            f"{LOGPROB_ERROR:.0e} nats, up to {max(over):.0e}"
        )
    found += [f"- did not fit into the time: {title}" for title in content["left out"]]
    found += [f"- never launched: {name}" for name in content["never launched"]]
    return found or ["Nothing of ours was wrong or failed in that run."]


if __name__ == "__main__":
    sys.exit(main())
