"""Runs the benchmark, prints its tables and writes a JSON: `make bench`, or

    python bench/run.py [--tokens 1024] [--hidden 1024] [--vocabulary 32768] [--dtype bfloat16]
    python bench/run.py --readme bench/results/NAME.json      the README's table from a result

Times are ratios to the bare matrix products of the same dtype, run in turns with them. The error is
that of log-probs against float64, or the relative error of the gradients against float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import linear_logprobs
import losses
import torch
from common import environment, interleaved, peak_extra_bytes, ratio
from linear_logprobs import Case
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--readme", type=Path, help="write this result into README.md, run nothing")
    args = parser.parse_args()
    if args.readme:
        write_readme(json.loads(args.readme.read_text()), args.readme)
        return
    case = Case.make(args.tokens, args.hidden, args.vocabulary, getattr(torch, args.dtype))
    records = [
        *no_grad(case, args.rounds),
        *training("GRPO step, head trained", case, 6, args.rounds),
        *training("GRPO step, head frozen", case, 4, args.rounds, frozen=True),
        *training("GRPO step, half the tokens masked", case, 6, args.rounds, counted=0.5),
    ]
    shape = {k: getattr(args, k) for k in ("tokens", "hidden", "vocabulary", "dtype", "rounds")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "shape": shape, "records": records}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    print(f"written to {args.out}")


def no_grad(case: Case, rounds: int) -> list[dict]:
    providers = linear_logprobs.no_grad(case)
    errors = {n: linear_logprobs.logprob_error(case, run()[0]) for n, run in providers.items()}
    label = "log-probs and entropy, no gradient"
    records = measure(label, providers, linear_logprobs.products(case, 2), 2, rounds)
    return [{**r, "logprob_error": errors.get(r["provider"])} for r in records]


def training(
    label: str, case: Case, nhv: int, rounds: int, *, frozen: bool = False, counted: float = 1.0
) -> list[dict]:
    providers = losses.steps(case, counted, frozen)
    wrong = disagreement(case, counted, frozen, providers)
    base = linear_logprobs.products(case, nhv)
    records = measure(label, providers, base, nhv, rounds)
    return [{**r, "gradient_error": wrong.get(r["provider"])} for r in records]


def disagreement(case: Case, counted: float, frozen: bool, providers: dict) -> dict[str, float]:
    """The relative error of the gradients against the same step on float32 copies of the inputs."""
    wide = Case(case.hidden.float(), case.weight.float(), case.labels)
    exact = losses.steps(wide, counted, frozen)["fused_rl linear_logprobs"]()[1:]

    def error(run: Callable) -> float:
        pairs = zip(run()[1:], exact, strict=True)
        return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)

    return {name: error(run) for name, run in providers.items()}


def measure(
    label: str, providers: dict[str, Callable], base: Callable, nhv: int, rounds: int
) -> list[dict]:
    seconds = interleaved({"bare products": base, **providers}, rounds)
    return [
        {
            "case": label,
            "provider": name,
            "nhv": nhv,
            "seconds_best": min(times),
            "seconds_median": statistics.median(times),
            "ratio_to_products": ratio(times, seconds["bare products"]),
            "peak_extra_bytes": peak_extra_bytes(providers[name]) if name in providers else None,
        }
        for name, times in seconds.items()
    ]


def write_readme(content: dict, source: Path) -> None:
    """Puts the table between the README's markers."""
    shape, where = content["shape"], content["environment"]
    lines = [
        f"N = {shape['tokens']} tokens, H = {shape['hidden']}, V = {shape['vocabulary']}, "
        f"{shape['dtype']}, on {where['cores']} cores of an {where['cpu']} "
        f"({where['backend']['note']}), torch {where['torch']}: [{source.name}]({source}), "
        "or `make bench` on your machine.",
        "",
        "| | time, ms | x bare products | extra memory, MiB | error |",
        "|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(r["case"] for r in content["records"]):
        for r in (r for r in content["records"] if r["case"] == label):
            if r["provider"] == "bare products":
                lines.append(
                    f"| **{label}** ({r['nhv']} NHV) | {r['seconds_median'] * 1e3:.0f} | 1 | | |"
                )
                continue
            error = r.get("logprob_error", r.get("gradient_error"))
            lines.append(
                f"| {r['provider']} | {r['seconds_median'] * 1e3:.0f} "
                f"| {r['ratio_to_products']:.2f} | {r['peak_extra_bytes'] / 2**20:.0f} "
                f"| {error:.0e} |"
            )
    lines += [
        "",
        "Medians of interleaved runs; below 1 is less time than torch's own products take. The "
        "error is the largest of the log-probs against float64 in the first case, and in the "
        "others the relative error of the gradients against float32.",
    ]
    readme = Path("README.md")
    before, rest = readme.read_text().split("<!-- bench:begin -->")
    after = rest.split("<!-- bench:end -->")[1]
    block = "\n".join(lines)
    readme.write_text(f"{before}<!-- bench:begin -->\n{block}\n<!-- bench:end -->{after}")


def show(content: dict) -> None:
    console = Console(width=118)
    for label in dict.fromkeys(r["case"] for r in content["records"]):
        rows = [r for r in content["records"] if r["case"] == label]
        table = Table(title=f"{label} (products: {rows[0]['nhv']} NHV)", title_justify="left")
        table.add_column("provider")
        for name in ("ms, best", "ms, median", "x products", "peak extra MiB", "error"):
            table.add_column(name, justify="right")
        for r in rows:
            error = r.get("logprob_error", r.get("gradient_error"))
            peak = r["peak_extra_bytes"]
            table.add_row(
                r["provider"],
                f"{r['seconds_best'] * 1e3:.0f}",
                f"{r['seconds_median'] * 1e3:.0f}",
                f"{r['ratio_to_products']:.2f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if error is None else f"{error:.1e}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
