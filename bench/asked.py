"""What each statistic of linear_statistics adds to a pass, beside the bare product.

    python bench/asked.py [--rounds 12] [--name epyc-turin-2c] [--page docs/benchmarks.md]

Cases run in turns, and each time is judged by that of the bare product, 2 NHV, of its round. Writes
bench/results/asked-NAME.json and the table between asked:begin and asked:end of the page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from run import PAGE, replace_block

import fused_rl
from fused_rl.bench.clock import interleaved, wall
from fused_rl.bench.products import factors, into_outputs
from fused_rl.linear import Statistic

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1024, 1024, 32768), (2048, 896, 151936))
ASKED = {
    "`linear_logprobs`": None,
    "`linear_statistics`: lse": {},
    "and collision": {"of": Statistic.COLLISION},
    "and mean logit": {"of": Statistic.MEAN_LOGIT},
    "and the most likely id": {"top": 1},
    "and 8 ids": {"top": 8},
    "and 32 ids": {"top": 32},
    "and all of it": {"of": tuple(Statistic), "top": 32},
}
BARE = "product"


def cases(N: int, H: int, V: int) -> dict[str, Callable[[], object]]:
    """Without a gradient, in bfloat16."""
    hidden, weight = torch.randn(N, H).bfloat16(), (torch.randn(V, H) / H**0.5).bfloat16()
    labels = torch.randint(V, (N,))

    def of(asked: dict | None) -> Callable[[], object]:
        if asked is None:
            return lambda: fused_rl.linear_logprobs(hidden, weight, labels)
        return lambda: fused_rl.linear_statistics(hidden, weight, labels, **asked)

    return {BARE: into_outputs(factors(hidden, weight, 2)), **{k: of(v) for k, v in ASKED.items()}}


def measured(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Median ratio of each case to the bare product of its round."""
    times = interleaved(cases(*shape), rounds, wall)
    bare = times.pop(BARE)
    return {
        name: statistics.median(a / b for a, b in zip(taken, bare, strict=True))
        for name, taken in times.items()
    }


def page(found: dict, link: str) -> list[str]:
    """The table, and what it is of."""
    shapes = found["ratios"]
    lines = [
        f"Time of a pass without a gradient over that of the bare product, 2 NHV, in the same "
        f"round, on {found['machine']}: bfloat16, medians of {found['rounds']} rounds "
        f"([{Path(link).name}]({link}), `python bench/asked.py`):",
        "",
        "| | " + " | ".join(f"{s}" for s in shapes) + " |",
        "|---|" + "---|" * len(shapes),
    ]
    for name in ASKED:
        lines.append(
            f"| {name} | " + " | ".join(f"{of[name]:.2f}" for of in shapes.values()) + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--name", default="cpu")
    parser.add_argument("--machine", default="a CPU")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    with torch.no_grad():
        ratios = {f"{N} x {H} x {V}": measured((N, H, V), arguments.rounds) for N, H, V in SHAPES}
    found = {"machine": arguments.machine, "rounds": arguments.rounds, "ratios": ratios}
    path = RESULTS / f"asked-{arguments.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    replace_block(arguments.page, "asked", page(found, f"../bench/results/{path.name}"))


if __name__ == "__main__":
    main()
