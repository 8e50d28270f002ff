"""The pages that fused_rl/plan's model of the time writes, and the measurements that it knows.

    python bench/predictions.py

docs/benchmarks.md        between predicted:begin and predicted:end, each case beside its target
docs/predictions.md       between errors:begin and errors:end, the model beside each measurement
                          that it is fitted to; unseen, beside those that it is not
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from decisions import UNPROVEN
from run import replace_block

from fused_rl.bench.records import PRODUCTS, Content, Record
from fused_rl.kernels.configs import Config
from fused_rl.ops import chunk_sizes
from fused_rl.ops.chunks import ONE_PASS_TOKENS
from fused_rl.plan import steps
from fused_rl.plan.devices import CARDS, Card
from fused_rl.plan.memory import own_bytes
from fused_rl.plan.time import (
    GRADIENT,
    MERGED,
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
FUSED = re.compile(
    r"(TMA|pointers|Gluon) (\d+)x(\d+)x(\d+), (\d+) warps, (\d+) stages(, exp2|, stores)?$"
)
# Instructions per logit of the epilogue with natural exponentials, which every result has.
NATURAL = 23


class Code(NamedTuple):
    """What a commit that was measured does, where that is not what the code does now."""

    forward: Callable[[Card, int, int, int], list[Part]]  # of many tokens
    sides: Callable[[int, int, int], tuple[int, int]]  # of a tile in L2: of N, rows, logits
    merged: int  # parts that a step of the merge takes
    scratch: int  # bytes of a chunk


# Tiles in L2 of 4096 x 2048, for fewer tokens just lower; a merge part by part; chunks of 1 GiB.
D709148 = Code(
    lambda card, N, H, V: tiled_forward(card, N, H, V, (4096, 2048), 1),
    lambda N, rows, logits: (rows, logits // rows),
    *(1, 2**30),
)
# Logits in registers with natural exponentials. As "unproven" it ran what is chosen now.
_WIDE = Tile(128, 256, 64, 8, 3, True, NATURAL)
C50F1677 = Code(
    lambda card, N, H, V: fused_forward(card, N, H, V, _WIDE),
    steps.tile_sides,
    *(MERGED, own_bytes("h100")),
)
# card -> what the constants are fitted to; and a later result, that nothing is fitted to.
FITTED = {"h100": ("h100-bfloat16-145b923", D709148), "h200": ("h200-bfloat16", D709148)}
UNSEEN = {"h100": ("h100-bfloat16", C50F1677)}
MEASURED_CARDS = tuple(FITTED)
# What is on by default now ran as unproven in the result that is the proof.
NEWEST = {name: UNSEEN.get(name, of)[0] for name, of in FITTED.items()}


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
def result(name: str) -> Content:
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def cases(
    cards: tuple[str, ...] = MEASURED_CARDS, of: dict[str, tuple[str, Code]] = FITTED
) -> list[Case]:
    """Every measurement of ours, of eager torch and of bare products, in a result of each card."""
    found = []
    for name in cards:
        title, code = of[name]
        content, card = result(title), CARDS[name]
        kinds = {
            "records": partial(records, code),
            "forwards": partial(forwards, code),
            "products": products,
            "row_kernels": row_kernels,
            "chunks": partial(chunks, code),
        }
        for kind, of_kind in kinds.items():
            for record, title, parts, ms in of_kind(card, content):
                tokens = record["tokens"] if "tokens" in record else tokens_of(content, record)
                predicted = times(card, parts)
                found.append(Case(kind, name, record["shape"], title, tokens, predicted, ms))
    return found


Found = Iterator[tuple[Record, str, list[Part], float]]


def tokens_of(content: Content, record: Record) -> int:
    return next(r["tokens"] for r in content["records"] if r["shape"] == record["shape"])


def records(code: Code, card: Card, content: Content) -> Found:
    """The four kinds of work of a head."""
    for r in content["records"]:
        if "seconds_median" in r and (parts := record_parts(code, card, r)):
            yield r, f"{r['case']}: {r['provider']}", parts, r["seconds_median"] * 1e3


def record_parts(code: Code, card: Card, r: Record) -> list[Part] | None:
    """None of a peer that has no model."""
    N, H, V = r["tokens"], r["hidden"], r["vocabulary"]
    counted = r.get("counted_tokens", N)
    if r["provider"] == PRODUCTS:
        return steps.products(card, N, H, V, r["nhv"])
    if r["provider"] == "eager torch":
        return steps.eager(card, N, H, V, r["nhv"])
    unproven = r["provider"].endswith(UNPROVEN)
    forward = (steps.no_gradient if unproven else code.forward)(card, counted, H, V)
    provider = r["provider"].removesuffix(UNPROVEN)
    if provider == "fused_rl":
        return forward
    two_passes = steps.two_passes(card, counted, H, V, code.scratch, forward)
    trained = r["name"] != "grpo_step_frozen"
    sizes = sizes_of(code, card, counted, H, V, 2 if unproven else 6)
    if provider == "fused_rl linear_policy_loss":
        pays = not trained or len(sizes) == 1 or sizes[0] >= ONE_PASS_TOKENS["cuda"]
        way = steps.stored if unproven else steps.one_pass
        return way(card, sizes, H, V, trained=trained) if pays else two_passes
    if provider == "fused_rl linear_logprobs":
        if trained:
            fits = unproven and code.scratch >= 2 * N * V
            return steps.stored(card, [counted], H, V, trained=True) if fits else two_passes
        return steps.frozen(card, sizes, H, V, stored=unproven)
    return None


def sizes_of(code: Code, card: Card, tokens: int, H: int, V: int, per_logit: int) -> list[int]:
    """Of the chunks of the one pass."""
    from fused_rl.kernels.linear_gradients import chunk_tokens

    most = chunk_tokens(V, H, per_logit, code.scratch, card.multiprocessors)
    return chunk_sizes(tokens, most)


def forwards(code: Code, card: Card, content: Content) -> Found:
    """Every way of the forward, of 64 to 8192 tokens."""
    for r in content["forwards"]:
        if "ms_median" not in r:
            continue
        shape = (r["tokens"], r["H"], r["V"])
        if r["way"] == PRODUCTS:
            parts = steps.products(card, *shape, 2)
        elif fused := FUSED.match(r["way"]):
            parts = fused_forward(card, *shape, tile_of(fused), code.merged)
        else:
            rows, columns = map(int, r["way"].split()[-1].split("x"))
            sides = code.sides(r["tokens"], rows, rows * columns)
            parts = tiled_forward(card, *shape, sides, code.merged)
        yield r, r["way"], parts, r["ms_median"]


def tile_of(way: re.Match) -> Tile:
    """Of a configuration's title."""
    operands, *blocks, epilogue = way.groups()
    config = Config(*map(int, blocks), operands != "pointers")
    config = config._replace(gluon=operands == "Gluon", stores=epilogue == ", stores")
    found = steps.tile(config)
    return found if epilogue else found._replace(instructions=NATURAL)


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


def chunks(code: Code, card: Card, content: Content) -> Found:
    """The step in chunks of each size, and in two passes."""
    for r in content["chunks"]:
        N, H, V = tokens_of(content, r), r["H"], r["V"]
        title = f"{r['way']}{', frozen' * r['frozen']}"
        if way := re.match(r"one pass, chunks of (\d+)$", r["way"]):
            sizes = chunk_sizes(N, int(way[1]))
            parts = steps.one_pass(card, sizes, H, V, trained=not r["frozen"])
        elif way := re.match(r"two passes(?:, (\d+) bytes)?$", r["way"]):
            forward = code.forward(card, N, H, V)
            parts = steps.two_passes(card, N, H, V, int(way[1] or code.scratch), forward)
        else:
            continue
        yield r, title, parts, r["ms_median"]


def deviation(found: list[Case]) -> tuple[float, float]:
    """The median and the largest |log(measured / predicted)|."""
    logs = [abs(math.log(case.ratio)) for case in found]
    return statistics.median(logs), max(logs)


def main() -> int:
    import predictions_errors as errors
    import predictions_pages as pages

    replace_block(ROOT / PAGE, "predicted", pages.predicted())
    replace_block(ROOT / ERRORS, "errors", errors.errors(cases()))
    replace_block(ROOT / ERRORS, "unseen", errors.unseen())
    (ROOT / MODULE).write_text(pages.measured_module())
    return 0


if __name__ == "__main__":
    sys.exit(main())
