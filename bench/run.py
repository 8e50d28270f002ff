"""`make bench`: tables and curves of this machine, kept in bench/results and docs/benchmarks.md.

python bench/run.py                        measures, within 15 minutes on two cores; writes
                                           bench/results/MACHINE-DTYPE.json, .csv, pictures; pages
python bench/run.py --readme RESULT.json   measures nothing: pictures and pages from a result

A page is written between its marks, bench:begin and bench:end for the table, curves:begin and
curves:end for the pictures. With docs/benchmarks.md goes the README's short table, summary:begin
and summary:end. Options of `fused-rl bench` are taken as well; --out is for results. The results of
another --work, divergence say, go into MACHINE-DTYPE-divergence-V.json, and between marks of
divergence-V.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from cells import columns_of, row

from fused_rl import cli
from fused_rl.bench.figures import write_figures
from fused_rl.bench.records import (
    MIB,
    OURS,
    Content,
    Record,
    cases_of,
    error_of,
    of_case,
    of_first_shape,
    ratio_to_full,
    read_result,
)
from fused_rl.system.outputs import replacing, try_folder
from fused_rl.system.signals import stoppable

RESULTS = "bench/results"
PAGE, FRONT_PAGE = Path("docs/benchmarks.md"), Path("README.md")
# The case of the front page's table, and who is in it beside the first of ours.
SUMMARY = "GRPO step, head trained"
SUMMARY_PEERS = ("eager torch", "torch.compile", "LigerFusedLinearGRPOLoss", "TRL chunked")
# What a table's errors are of, by the work: its cases without a gradient come first.
JUDGED = {
    "logprobs": (
        "largest of the log-probs against float64 in the first case, and in the others the "
    ),
    "divergence": (
        "largest of the divergences against float64 where there is no gradient, and in the others "
        "the "
    ),
    "preference": "",
}
# Parts of a processor's name that do not tell it from others.
NOISE = ("amd", "intel", "nvidia", "cpu", "processor")


def main(argv: list[str] | None = None) -> int:
    """1 if one of our ways is wrong: the pages then stay as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="of the machine, in file names (default: from its cpu)")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write into")
    parser.add_argument("--readme", type=Path, metavar="RESULT.json", help="measure nothing")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.readme:
        publish(read_result(arguments.readme), arguments.readme, arguments.page)
        return 0
    with stoppable():
        return measure(rest, arguments.name, arguments.page)


def measure(options: list[str], name: str | None, page: Path) -> int:
    """Runs the sweep, writes the results and, if ours are right and all is there, the page.

    What was measured until Ctrl-C or SIGTERM goes into a file of its own, beside an earlier result.
    """
    from rich.console import Console

    from fused_rl.bench.report import show, write_data
    from fused_rl.bench.run import BenchConfig, exit_status, measured

    parsed = cli.build_parser().parse_args(["bench", "--sweep", "--out", RESULTS, *options])
    try:
        config = BenchConfig(**cli.bench_options(parsed))
        try_folder(Path(config.out))
    except ValueError as error:
        return cli.usage_error("bench", str(error))
    if config.load[0]:
        return cli.usage_error("bench", f"pages begin with load 0, got {config.load[0]}")
    console = Console(width=118, markup=False)
    content = measured(config, console)
    stem = Path(config.out) / f"{name or machine(content['environment'])}-{config.dtype}"
    if config.work != "logprobs":
        stem = stem.with_name(f"{stem.name}-{block_of(content)}")
    if "interrupted" in content:
        stem = stem.with_name(f"{stem.name}-interrupted")
    if not content["records"]:
        return exit_status(content)
    for path in write_data(stem, content):
        print(f"written to {path}")
    show(console, content)
    if code := exit_status(content):
        why = "interrupted" if "interrupted" in content else "one of our ways is wrong or failed"
        print(f"{why}: {page} stays as it is")
        return code
    publish(content, stem.with_name(f"{stem.name}.json"), page)
    return 0


def machine(environment: dict) -> str:
    """AMD EPYC 9B45 64-Core Processor, with two cores here -> epyc-9b45-2c."""
    known = environment.get("gpu") or f"{environment['cpu']} {environment['cores']}c"
    plain = re.sub(r"\((r|tm)\)|\d+-core|@ ?\S+", " ", known.lower())
    return "-".join(w for w in re.findall(r"[a-z0-9]+", plain) if w not in NOISE)


def block_of(content: Content) -> str:
    """The name of the page's block: that of the work with its V, where it is not of log-probs."""
    shape = content["shape"]
    work = shape.get("work", "logprobs")
    return "bench" if work == "logprobs" else f"{work}-{shape['vocabulary']}"


def publish(content: Content, source: Path, page: Path) -> None:
    """The pictures beside the result, both blocks of the page, and the short table."""
    if (block := block_of(content)) != "bench":
        link = os.path.relpath(source.resolve(), page.resolve().parent)
        replace_block(page, block, table(content, link))
        return
    prefix = f"{source.stem}-"
    pictures = write_figures(source.parent, content["records"], prefix, "svg")
    for path in pictures:
        print(f"written to {path}")
    base = page.resolve().parent
    link = os.path.relpath(source.resolve(), base)
    replace_block(page, "bench", table(content, link))
    if pictures:
        links = [os.path.relpath(p.resolve(), base) for p in pictures]
        replace_block(page, "curves", curves(links))
    if page == PAGE:
        link = os.path.relpath(source.resolve(), FRONT_PAGE.resolve().parent)
        replace_block(FRONT_PAGE, "summary", summary(content, link))


def replace_block(page: Path, name: str, lines: list[str]) -> None:
    """Writes the lines between the page's marks, or says that there are none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text() if page.exists() else ""
    if begin not in text or end not in text:
        print(f"{page} has no {begin} and {end}: nothing of that kind written to it")
        return
    before, rest = text.split(begin)
    block = "\n".join(lines)
    with replacing(page) as partial:
        partial.write_text(f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}")
    print(f"{name} written to {page}")


def curves(links: list[str]) -> list[str]:
    """The lines that show the pictures."""
    lines = []
    for link in links:
        what = "padding" if link.endswith("-padding.svg") else "N, H and V"
        lines += [f"![Time and memory of ours and of the peers against {what}]({link})", ""]
    return [
        *lines,
        "Both axes are logarithmic; the dotted line is growth in proportion. Where the number of "
        "tokens under the loss stays the same, padding should cost nothing.",
    ]


def table(content: Content, link: str) -> list[str]:
    """The lines of the table."""
    shape, where = content["shape"], content["environment"]
    records = [{**shape, **record} for record in content["records"]]
    columns = columns_of(records)
    judged = JUDGED[shape.get("work", "logprobs")]
    lines = [
        f"N = {shape['tokens']} tokens, H = {shape['hidden']}, V = {shape['vocabulary']}, "
        f"{shape['dtype']}, on {where['cores']} cores of an {where['cpu']} "
        f"({where['backend']['note']}), torch {where['torch']}: [{Path(link).name}]({link}), "
        f"or `{command(content)}` on your machine.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    found = of_first_shape(records)
    for case in cases_of(records):
        lines += [row(r, columns.values()) for r in found if r["case"] == case]
    return [
        *lines,
        "",
        *masked(found),
        "Medians of interleaved runs; below 1 is less time than torch's own products take. The "
        f"error is the {judged}relative error of the gradients against float32 or better.",
    ]


def command(content: Content) -> str:
    """What measures the table again."""
    shape, loads = content["shape"], content["shape"].get("load", [0])
    beside = [f"--load {' '.join(map(str, loads))}"] if any(loads) else []
    if block_of(content) == "bench":
        return " ".join(("make bench", *(f'ARGS="{option}"' for option in beside)))
    sizes = (f"--{name} {shape[name]}" for name in ("tokens", "hidden", "vocabulary"))
    return " ".join(("python bench/run.py", f"--work {shape['work']}", *sizes, *beside))


def masked(records: list[Record]) -> list[str]:
    """What steps with masked tokens take of the step with all, by each provider of ours."""
    lines = []
    for case in cases_of(records):
        here = [r for r in of_case(records, case) if r["provider"].startswith(OURS)]
        shares = [(r["provider"], ratio_to_full(records, r)) for r in here]
        if said := ", ".join(f"{share:.2f} ({name})" for name, share in shares if share):
            lines += [f"{case}: {said} of the step with all of them.", ""]
    return lines


def summary(content: Content, link: str) -> list[str]:
    """The lines of the front page: a training step by each provider, and nothing to explain."""
    shape, where = content["shape"], content["environment"]
    found = of_first_shape([{**shape, **record} for record in content["records"]])
    found = [r for r in found if r["case"] == SUMMARY and r.get("verdict", "right") == "right"]
    ours = next(r for r in found if r["provider"].startswith(OURS))
    lines = [
        f"| {SUMMARY} | time, ms | extra memory, MiB | error of the gradients |",
        "|---|---|---|---|",
    ]
    for r in (ours, *(r for r in found if r["provider"] in SUMMARY_PEERS)):
        name = f"**{r['provider']}**" if r is ours else r["provider"]
        ms, memory = r["seconds_median"] * 1e3, r["peak_extra_bytes"] / MIB
        lines.append(f"| {name} | {ms:.0f} | {memory:.0f} | {error_of(r):.0e} |")
    return [
        *lines,
        "",
        f"{shape['tokens']} tokens, hidden size {shape['hidden']}, vocabulary "
        f"{shape['vocabulary']}, {shape['dtype']}, {where['cores']} cores of an {where['cpu']} "
        f"([{Path(link).name}]({link})).",
    ]


if __name__ == "__main__":
    sys.exit(main())
