"""The pages that fused_rl/plan's model of the time writes, and the measurements that it knows.

    python bench/predictions.py

docs/benchmarks.md        between predicted:begin and predicted:end, each case beside its target
docs/predictions.md       between errors:begin and errors:end, the model beside each measurement
fused_rl/plan/measured.py   the medians of bench/results that `fused-rl plan` shows

It measures nothing. Predictions are predictions.
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from run import replace_block

from fused_rl.bench.records import PRODUCTS, Content, Record
from fused_rl.ops import chunk_sizes
from fused_rl.ops.chunks import ONE_PASS_TOKENS
from fused_rl.plan import steps
from fused_rl.plan.devices import CARDS, Card
from fused_rl.plan.time import (
    GRADIENT,
    STATISTICS,
    Part,
    Tile,
    Times,
    fused_forward,
    product,
    row_pass,
    tiled_forward,
    times,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE, ERRORS, MODULE = "docs/benchmarks.md", "docs/predictions.md", "fused_rl/plan/measured.py"
MEASURED_CARDS = ("h100", "h200")
# The code that was measured: tiles of 4096 x 2048 from 513 tokens on, a merge part by part, chunks
# of 1 GiB.
TILE, FUSED_ROWS, MERGED, SCRATCH = (4096, 2048), 512, 1, 2**30
FUSED = re.compile(r"(TMA|pointers) (\d+)x(\d+)x(\d+), (\d+) warps, (\d+) stages$")


class Case(NamedTuple):
    """A measurement and its prediction."""

    kind: str
    card: str
    shape: str
    name: str
    tokens: int
    predicted: Times
    ms: float

    @property
    def ratio(self) -> float:
        """Measured time in the predicted one."""
        return self.ms / self.predicted.middle


@functools.lru_cache
def result(card: str) -> Content:
    return json.loads((ROOT / f"bench/results/{card}-bfloat16.json").read_text())


def cases(cards: tuple[str, ...] = MEASURED_CARDS) -> list[Case]:
    """Every measurement of ours, of eager torch and of bare products."""
    found = []
    for name in cards:
        content, card = result(name), CARDS[name]
        for kind in (records, forwards, products, row_kernels, chunks):
            for record, title, parts, ms in kind(card, content):
                tokens = record["tokens"] if "tokens" in record else tokens_of(content, record)
                predicted = times(card, parts)
                found.append(
                    Case(kind.__name__, name, record["shape"], title, tokens, predicted, ms)
                )
    return found


Found = Iterator[tuple[Record, str, list[Part], float]]


def tokens_of(content: Content, record: Record) -> int:
    return next(r["tokens"] for r in content["records"] if r["shape"] == record["shape"])


def records(card: Card, content: Content) -> Found:
    """The four kinds of work of a head."""
    for r in content["records"]:
        if "seconds_median" in r and (parts := record_parts(card, r)):
            yield r, f"{r['case']}: {r['provider']}", parts, r["seconds_median"] * 1e3


def record_parts(card: Card, r: Record) -> list[Part] | None:
    """None of a peer that has no model."""
    N, H, V = r["tokens"], r["hidden"], r["vocabulary"]
    counted = r.get("counted_tokens", N)
    frozen = r["name"] == "grpo_step_frozen"
    if r["provider"] == PRODUCTS:
        return steps.products(card, N, H, V, r["nhv"])
    if r["provider"] == "eager torch":
        return steps.eager(card, N, H, V, r["nhv"])
    if r["provider"] == "fused_rl":
        return old_forward(card, N, H, V)
    sizes = sizes_of(card, counted, H, V)
    if r["provider"] == "fused_rl linear_policy_loss":
        pays = frozen or len(sizes) == 1 or sizes[0] >= ONE_PASS_TOKENS["cuda"]
        one_pass = steps.one_pass(card, sizes, H, V, trained=not frozen)
        return one_pass if pays else old_two_passes(card, counted, H, V, SCRATCH)
    if r["provider"] == "fused_rl linear_logprobs":
        two_passes = old_two_passes(card, counted, H, V, SCRATCH)
        return steps.frozen(card, sizes, H, V) if frozen else two_passes
    return None


def sizes_of(card: Card, tokens: int, H: int, V: int) -> list[int]:
    """Of the chunks of the one pass."""
    from fused_rl.kernels.linear_gradients import chunk_tokens

    return chunk_sizes(tokens, chunk_tokens(V, H, 6, SCRATCH, card.multiprocessors))


def old_forward(card: Card, N: int, H: int, V: int) -> list[Part]:
    """Of the code that was measured."""
    assert N > FUSED_ROWS
    return tiled_forward(card, N, H, V, TILE, MERGED)


def old_two_passes(card: Card, N: int, H: int, V: int, scratch: int) -> list[Part]:
    return steps.two_passes(card, N, H, V, scratch, old_forward(card, N, H, V))


def forwards(card: Card, content: Content) -> Found:
    """Every way of the forward, of 64 to 8192 tokens."""
    for r in content["forwards"]:
        if "ms_median" not in r:
            continue
        shape = (r["tokens"], r["H"], r["V"])
        if r["way"] == PRODUCTS:
            parts = steps.products(card, *shape, 2)
        elif fused := FUSED.match(r["way"]):
            blocks = map(int, fused.groups()[1:])
            tile = Tile(*blocks, fused[1] == "TMA", steps.NATURAL)
            parts = fused_forward(card, *shape, tile, MERGED)
        else:
            rows, columns = map(int, r["way"].split()[-1].split("x"))
            parts = tiled_forward(card, *shape, (rows, columns), MERGED)
        yield r, r["way"], parts, r["ms_median"]


def products(card: Card, content: Content) -> Found:
    """Each product of a step, with its own result."""
    for r in content["products"]:
        n, H, V = r["tokens"], r["H"], r["V"]
        which, result_ = r["way"].split(", ")
        shape = {"logits": (n, V, H), "dhidden": (n, H, V), "dweight": (V, H, n)}[which]
        width, added = 2 if result_ == "half" else 4, result_ == "fp32 added"
        yield r, r["way"], [product(card, which, *shape, width=width, added=added)], r["ms_median"]


def row_kernels(card: Card, content: Content) -> Found:
    """Those of the blocks that the library takes."""
    for r in content["row kernels"]:
        name, blocks = r["way"].split(", ", 1) if ", " in r["way"] else ("", "")
        if blocks == "4096 columns, 8 warps":
            counts = {"statistics": (STATISTICS, 4), "gradient": (GRADIENT, 6)}[name]
            part = row_pass(card, name, r["tokens"] * r["V"], *counts)
            yield r, name, [part], r["ms_median"]


def chunks(card: Card, content: Content) -> Found:
    """The step in chunks of each size, and in two passes."""
    for r in content["chunks"]:
        N, H, V = tokens_of(content, r), r["H"], r["V"]
        title = f"{r['way']}{', frozen' * r['frozen']}"
        if way := re.match(r"one pass, chunks of (\d+)$", r["way"]):
            sizes = chunk_sizes(N, int(way[1]))
            parts = steps.one_pass(card, sizes, H, V, trained=not r["frozen"])
        elif way := re.match(r"two passes(?:, (\d+) bytes)?$", r["way"]):
            parts = old_two_passes(card, N, H, V, int(way[1] or SCRATCH))
        else:
            continue
        yield r, title, parts, r["ms_median"]


def deviation(found: list[Case]) -> tuple[float, float]:
    """The median and the largest |log(measured / predicted)|."""
    logs = [abs(math.log(case.ratio)) for case in found]
    return statistics.median(logs), max(logs)


def main() -> int:
    import predictions_pages as pages

    replace_block(ROOT / PAGE, "predicted", pages.predicted())
    replace_block(ROOT / ERRORS, "errors", pages.errors(cases()))
    (ROOT / MODULE).write_text(pages.measured_module())
    return 0


if __name__ == "__main__":
    sys.exit(main())
