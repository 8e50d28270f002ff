"""The figures of a GPU in docs/benchmarks.md and in the README, from a result of bench/gpu.py.

    python bench/gpu_readme.py bench/results/h200-bfloat16.json

The page is written between gpu:begin and gpu:end: every case of the first shape beside the peers,
as a table and as a picture beside the result; the ways through the forward pass; of the other
shapes ours alone; and by name what was wrong, failed, or did not fit. The README gets a row between
marks of the same name.

A result of divergences alone is a table between gpu-divergence:begin and gpu-divergence:end.

A result that is the proof of kernels in kernels/configs.py has them as "unproven". Since then they
are what users have: on the pages they are ours, and what was on when it ran is "before".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import forwards
from cells import row
from decisions import UNPROVEN
from run import FRONT_PAGE, PAGE, SUMMARY, replace_block

from fused_rl.bench.figures import write_ratios
from fused_rl.bench.records import MIB, OURS, PRODUCTS, Content, Record, error_of, of_case
from fused_rl.bench.tasks import KINDS
from fused_rl.kernels.configs import CONFIGS

# What ours were when the kernels that a result proves were off.
BEFORE = ", before"
# Whose cells the README's row has beside ours and the fastest peer's.
FRONT_PEERS = ("eager torch", "torch.compile")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write into")
    parser.add_argument("--front", type=Path, default=FRONT_PAGE, help="where the row goes")
    arguments = parser.parse_args(argv)
    content = as_now(json.loads(arguments.result.read_text()), arguments.result.stem)
    link = link_to(arguments.result, arguments.page)
    if content.get("parts") == ["divergences"]:
        replace_block(arguments.page, "gpu-divergence", divergences(content, link))
        return 0
    picture = arguments.result.with_suffix(".svg")
    write_ratios(picture, of_first_shape(content["records"]))
    print(f"written to {picture}")
    replace_block(arguments.page, "gpu", lines(content, link))
    front = front_page(content, link_to(arguments.result, arguments.front))
    replace_block(arguments.front, "gpu", front)
    return 0


def as_now(content: Content, name: str) -> Content:
    """A result by its name, with the providers that are ours as users have them since."""
    if not is_proof(name):
        return content
    return {**content, "records": [renamed(record) for record in content["records"]]}


def is_proof(name: str) -> bool:
    """Whether a configuration of the kernels is on because of that result."""
    return any(config.proof == name for table in CONFIGS.values() for config in table)


def renamed(record: Record) -> Record:
    provider = record["provider"]
    if not provider.startswith(OURS):
        return record
    now = provider.removesuffix(UNPROVEN) if provider.endswith(UNPROVEN) else provider + BEFORE
    return {**record, "provider": now}


def link_to(path: Path, page: Path) -> str:
    return os.path.relpath(path.resolve(), page.resolve().parent)


def lines(content: Content, link: str) -> list[str]:
    """The block: where, the first shape in full, the others in short, what is missing."""
    records = content["records"]
    first = of_first_shape(records)
    shape = first[0]
    return [
        measured_where(content, shape, link) + told(first),
        "",
        f"![Time of ours and of the peers over that of the bare products]({picture_of(link)})",
        "",
        *cases(first),
        "",
        *ways(content["forwards"], shape["shape"]),
        "| ours at other heads, x bare products | " + " | ".join(k.title for k in KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
        *short_rows(records),
        "",
        *faults(content),
    ]


def measured_where(content: Content, shape: Record, link: str) -> str:
    where = content["environment"]
    return (
        f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}: "
        f"[{Path(link).name}]({link}), by `python bench/gpu.py` (commit {content['commit'][:7]}). "
        f"{shape['shape']}'s head, N = {shape['tokens']}, H = {shape['hidden']}, "
        f"V = {shape['vocabulary']}, {shape['dtype']}; medians of interleaved runs."
    )


def divergences(content: Content, link: str) -> list[str]:
    """The block of two heads, whose kernels do not depend on what is proven."""
    shown = [r for r in of_first_shape(content["records"]) if not r["provider"].endswith(UNPROVEN)]
    where = measured_where(content, shown[0], link)
    return [where, "", *cases(shown), "", *faults(content)]


def told(records: list[Record]) -> str:
    """What "before" means, where it is there."""
    if not any(r["provider"].endswith(BEFORE) for r in records):
        return ""
    return (
        ' Ours are with the kernels that this result is the proof of, "unproven" in the file; '
        '"before": with those that were on when it ran.'
    )


def picture_of(link: str) -> str:
    return Path(link).with_suffix(".svg").as_posix()


def cases(records: list[Record]) -> list[str]:
    """A row for each provider; with the time until the call returns, where it was taken."""
    if not any("host_ms" in r for r in records):
        return [
            "| | time, ms | x bare products | extra memory, MiB | error |",
            "|---|---|---|---|---|",
            *map(row, records),
        ]
    return [
        "| | time, ms | x bare products | extra memory, MiB | error | of the host, ms |",
        "|---|---|---|---|---|---|",
        *(f"{row(r)} {host(r)} |" for r in records),
    ]


def host(record: Record) -> str:
    """Milliseconds until the call returned."""
    return f"{record['host_ms']:.1f}" if "host_ms" in record else ""


def first_shape(records: list[Record]) -> str:
    """The one with the most records: that is measured beside all of the peers."""
    return Counter(r["shape"] for r in records).most_common(1)[0][0]


def of_first_shape(records: list[Record]) -> list[Record]:
    """Case by case, in the order of KINDS, and what is no kind last; products and ours first."""
    here = [r for r in records if r["shape"] == first_shape(records)]
    titles = dict.fromkeys([*(kind.title for kind in KINDS), *(r["case"] for r in here)])
    return [r for t in titles for r in sorted(of_case(here, t), key=place)]


def place(record: Record) -> int:
    """In its case: the products, ours as users have them, what ours were, others."""
    if record["provider"] == PRODUCTS:
        return 0
    if not record["provider"].startswith(OURS):
        return 3
    return 1 if is_default(record) else 2


def ways(records: list[Record], shape: str) -> list[str]:
    """The forwards of that shape: a row for each way, a column for each number of tokens."""
    here = [r for r in records if r["shape"] == shape]
    if not here:
        return []
    tokens = list(dict.fromkeys(r["tokens"] for r in here))
    best = {n: min(ratios_of(here, n).values(), default=None) for n in tokens}
    rows = []
    for way in dict.fromkeys(r["way"] for r in here):
        found = {r["tokens"]: r for r in here if r["way"] == way}
        rows.append(f"| {way} | " + " | ".join(cell(found[n], best[n]) for n in tokens) + " |")
    return [
        "| forward, x bare products at N = | " + " | ".join(map(str, tokens)) + " |",
        "|---|" + "---|" * len(tokens),
        *rows,
        "",
    ]


def ratios_of(records: list[Record], tokens: int) -> dict[str, float]:
    """way -> x bare products, at that number of tokens."""
    here = [r for r in records if r["tokens"] == tokens and "ratio" in r]
    return {r["way"]: r["ratio"] for r in here if r["way"] != PRODUCTS}


def cell(record: Record, best: float | None) -> str:
    """The products have their time, the ways their ratio to it; the best is in bold."""
    if "failed" in record:
        return "failed"
    if record["way"] == PRODUCTS:
        return f"{record['ms_median']:.2f} ms"
    text = f"{record['ratio']:.2f}"
    return f"**{text}**" if record["ratio"] == best else text


def short_rows(records: list[Record]) -> list[str]:
    """A line for each other shape: the ratios of linear_policy_loss / linear_logprobs."""
    first = first_shape(records)
    rows = []
    for shape in dict.fromkeys(r["shape"] for r in records if r["shape"] != first):
        here = [r for r in records if r["shape"] == shape]
        cells = []
        for kind in KINDS:
            ours = [r for r in here if r["case"] == kind.title and is_default(r)]
            ratios = [f"{r['ratio_to_products']:.2f}" for r in ours if r["verdict"] == "right"]
            cells.append(" / ".join(ratios) or "-")
        size = next(r for r in here if r["provider"] == PRODUCTS)
        title = f"{shape}, {size['tokens']} x {size['hidden']} x {size['vocabulary']}"
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return rows


def is_default(record: Record) -> bool:
    """Whether it is ours, as users have it."""
    return record["provider"].startswith(OURS) and not record["provider"].endswith(
        (UNPROVEN, BEFORE)
    )


def faults(content: Content) -> list[str]:
    """What was wrong, failed or left out, each with its name; one line where nothing was."""
    found = [f"- wrong: {name}: {why}" for name, why in content["wrong"].items()]
    found += [f"- failed: {name}: {why}" for name, why in content["failed"].items()]
    found += [f"- a CUDA graph: {r['failed']}" for r in content["graph"] if "failed" in r]
    reasons = Counter(r["failed"] for r in content["forwards"] if "failed" in r)
    found += [f"- {n} of the forwards that were tried: {why}" for why, n in reasons.items()]
    found += errors_of_forwards([r for r in content["forwards"] if "logprob_error" in r])
    found += [f"- did not fit into the time: {title}" for title in content["left out"]]
    found += [f"- never launched: {name}" for name in content["never launched"]]
    return found or ["Nothing of ours was wrong or failed in that run."]


def errors_of_forwards(records: list[Record]) -> list[str]:
    """Those beyond the error of the products; or that this was not measured."""
    judged = [r for r in records if "logprob_error_of_products" in r]
    if records and not judged:
        largest = max(r["logprob_error"] for r in records)
        return [
            f"- Log-probs of the forwards are up to {largest:.0e} nats from float64. How far those "
            "of the products in float32 are was not measured in that run."
        ]
    over = [r for r in judged if not forwards.is_right(r)]
    return [
        f"- wrong: {r['way']} at {r['tokens']} tokens: {r['logprob_error']:.1e} nats from float64, "
        f"the products {r['logprob_error_of_products']:.1e}"
        for r in over
    ]


def front_page(content: Content, link: str) -> list[str]:
    """A training step by ours, by the usual ways and by the fastest peer, in one row."""
    here = of_case(of_first_shape(content["records"]), SUMMARY)
    ours = next(r for r in here if is_default(r))
    peers = [r for r in here if not r["provider"].startswith(OURS) and r["provider"] != PRODUCTS]
    usual = [r for r in peers if r["provider"] in FRONT_PEERS]
    others = [r for r in peers if r not in usual]
    fastest = sorted(others, key=lambda r: r["seconds_median"])[:1]
    shown = [ours, *usual, *fastest]
    gpu = content["environment"]["gpu"]
    return [
        f"| On an {gpu}: ms, extra MiB, error | "
        + " | ".join(r["provider"].replace(ours["provider"], f"**{OURS}**") for r in shown)
        + " |",
        "|---|" + "---|" * len(shown),
        f"| {SUMMARY} | " + " | ".join(map(in_short, shown)) + " |",
        "",
        f"{ours['shape']}'s head: {ours['tokens']} tokens, hidden size {ours['hidden']}, "
        f"vocabulary {ours['vocabulary']}, {ours['dtype']} ([{Path(link).name}]({link})).",
    ]


def in_short(record: Record) -> str:
    """Time, memory and error of a provider."""
    memory = record.get("peak_extra_bytes")
    mib = "" if memory is None else f"{memory / MIB:.0f}, "
    return f"{record['seconds_median'] * 1e3:.0f}, {mib}{error_of(record):.0e}"


if __name__ == "__main__":
    sys.exit(main())
