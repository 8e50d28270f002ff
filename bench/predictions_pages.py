"""What predictions.py writes of the cases: each beside its target, and the measured medians."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from decisions import UNPROVEN
from predictions import (
    MEASURED_CARDS,
    NEWEST,
    UNSEEN,
    result,
)

from fused_rl.kernels.linear_gradients import chunk_tokens
from fused_rl.ops import chunk_sizes
from fused_rl.plan import steps
from fused_rl.plan.devices import CARDS, Card
from fused_rl.plan.memory import keeps_exponentials, own_bytes
from fused_rl.plan.time import (
    ISSUE,
    LATENCY,
    LIBRARY,
    MAIN_LOOP,
    Part,
    Times,
    issued,
    overlapped,
    rate,
    shared_memory,
    times,
)

N, H, V = SHAPE = (8192, 4096, 151936)
FORWARD, STEP, ANY, FROZEN, HALF = (
    "log-probs and entropy, no gradient",
    "GRPO step, head trained",
    "any torch loss, head trained",
    "GRPO step, head frozen",
    "GRPO step, half the tokens masked",
)
OURS, ONE_PASS, TWO_PASSES = "fused_rl", "fused_rl linear_policy_loss", "fused_rl linear_logprobs"
# What is on now where it can be, and what a way that is measured and gone took.
TODAY, IN_L2, IN_FLOAT32 = "today", "in tiles in L2", "logits in float32"


class Row(NamedTuple):
    """target: ms on an H200. older: the provider that has been measured there in this way."""

    case: str
    way: str
    parts: list[Part]
    target: str = ""
    older: str = ""


def rows(name: str) -> Iterator[Row]:
    """The ways of each case: what has been measured on an H200, today's, and what is to come."""
    card = CARDS[name]
    of_tiles = steps.tiled_forward(card, *SHAPE, steps.tile_sides(N))
    yield Row(FORWARD, IN_L2, of_tiles, older=OURS)
    if steps.chosen(card, N):
        yield Row(FORWARD, TODAY, steps.no_gradient(card, *SHAPE), "13.9")
    yield from _step(name, STEP, N, True, "42")
    two_passes = steps.two_passes(card, *SHAPE, own_bytes(name))
    if steps.chosen(card, N, stores=True, unproven=True):
        today = keeps_exponentials(name, torch.bfloat16, N) and own_bytes(name) >= 2 * N * V
        yield Row(ANY, "two passes" if today else TODAY, two_passes, older=TWO_PASSES)
        kept = steps.stored(card, [N], H, V, trained=True)
        yield Row(ANY, TODAY if today else "E of all tokens", kept, "50")
    else:
        yield Row(ANY, TODAY, two_passes, older=TWO_PASSES)
    yield from _step(name, FROZEN, N, False, "28")
    yield from _step(name, HALF, N // 2, True, "24")


def _step(name: str, case: str, tokens: int, trained: bool, target: str) -> Iterator[Row]:
    """In chunks of logits, then of exponentials, then without their synchronisation."""
    card = CARDS[name]
    of_logits = steps.one_pass(card, sizes_of(name, tokens, 6), H, V, trained=trained)
    kept = keeps_exponentials(name, torch.bfloat16, N)
    yield Row(case, IN_FLOAT32 if kept else TODAY, of_logits, older=ONE_PASS)
    if not steps.chosen(card, N, stores=True, unproven=True):
        return
    for waits, way in ((True, TODAY if kept else "E"), (False, "E, nothing waited for")):
        parts = steps.stored(card, sizes_of(name, tokens, 2), H, V, trained=trained, waits=waits)
        yield Row(case, way, parts, target)


def sizes_of(name: str, tokens: int, per_logit: int) -> list[int]:
    """Chunks of the bytes that the library takes on the card by itself."""
    most = chunk_tokens(V, H, per_logit, own_bytes(name), CARDS[name].multiprocessors)
    return chunk_sizes(tokens, most)


def predicted() -> list[str]:
    """The block of docs/benchmarks.md."""
    card = CARDS["h200"]
    bare = [str(times(card, steps.products(card, *SHAPE, nhv))) for nhv in (2, 4, 6)]
    older = {
        (r["case"], r["provider"]): r for r in result(NEWEST["h200"])["records"] if is_first(r)
    }
    return [
        f"Predictions, not measurements: an H200 at N = {N}, H = {H}, V = {V}, bfloat16. The first "
        "time is that of a chip that keeps its clock, the second that of one at its power limit. "
        f"By the same model bare products of 2, 4 and 6 NHV take {', '.join(bare)} ms: a target "
        "below the second time cannot be met by a chip that products keep at its limit. Under "
        "arithmetic are the parts of the first time. The measured times are of older code (commit "
        f"{commit('h200')}): a forward in tiles in L2, logits in float32.",
        "",
        "| case | way | predicted, ms | target, ms | met | measured, ms | arithmetic, ms |",
        "|---|---|---|---|---|---|---|",
        *(row_line(card, row, older) for row in rows("h200")),
        "",
        "The same on other cards, predicted, ms; today's code, and the best that is there to be "
        "asked for, or to come:",
        "",
        "| card | " + " | ".join((FORWARD, STEP, ANY, FROZEN, HALF)) + " | ceilings |",
        "|---|" + "---|" * 6,
        *map(card_line, CARDS),
        "",
        *worked(card),
    ]


def is_first(record: dict) -> bool:
    return record["shape"] == "Qwen3-8B" and "seconds_median" in record


def commit(name: str) -> str:
    return result(NEWEST[name])["commit"][:7]


def row_line(card: Card, row: Row, older: dict) -> str:
    case = STEP if row.case == ANY else row.case
    record = older.get((case, row.older))
    ms = f"{record['seconds_median'] * 1e3:.1f}" if record else ""
    found = times(card, row.parts)
    cells = (row.case, row.way, found, row.target, met(row, found), ms, arithmetic(row.parts))
    return f"| {' | '.join(map(str, cells))} |"


def met(row: Row, found: Times) -> str:
    """Whether the target is, by the prediction."""
    if not row.target:
        return ""
    target = float(row.target)
    return "yes" if found.high <= target else "at its clock" if found.low <= target else "no"


def arithmetic(parts: list[Part]) -> str:
    """Their milliseconds by name, in the order of the first."""
    by_name: dict[str, float] = {}
    for part in parts:
        by_name[part.name] = by_name.get(part.name, 0.0) + part.seconds * 1e3
    return " + ".join(f"{name} {ms:.1f}" for name, ms in by_name.items() if ms >= 0.05)


def card_line(name: str) -> str:
    """Today, and the best other way where that is faster, of each case."""
    card, cells = CARDS[name], []
    found = [(row.case, row.way, times(card, row.parts)) for row in rows(name)]
    for case in (FORWARD, STEP, ANY, FROZEN, HALF):
        here = {way: t for c, way, t in found if c == case}
        today = here.get(TODAY) or here[IN_L2]
        best = min(here.values(), key=lambda t: t.middle)
        cells.append(str(today) if best == today else f"{today}, then {best}")
    c = card.ceilings
    figures = f"{c.alone:.0f} / {c.sustained:.0f} TFLOP/s, {c.copy:.0f} GB/s"
    return f"| {card.title} | {' | '.join(cells)} | {figures}, {c.source} |"


def worked(card: Card) -> list[str]:
    """The arithmetic of one prediction: today's forward."""
    config = steps.chosen(card, N)
    tile = steps.tile(config)
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    across, along = -(-N // m), -(-V // n)
    splits = max(1, 2 * card.multiprocessors // across)
    mine = -(-across * splits // card.multiprocessors) * -(-along // splits)
    contended = overlapped(1, shared_memory(tile)) / overlapped(1, shared_memory(LIBRARY))
    share = (tile.main_loop or MAIN_LOOP[tile.tma]) / contended
    of_sm = rate(card) / card.multiprocessors
    main_loop = 2 * m * n * H / of_sm / share
    loads = -(-H // k) * LATENCY / (tile.num_stages - 1)
    epilogue = issued(card, tile.instructions * m * n * card.multiprocessors)
    total = overlapped(main_loop, loads) + epilogue
    clock = f"{card.clock / 1e9:.2f} GHz"
    return [
        f"One of them step by step, {config.title} on an {card.title}: of {across} x {along} tiles "
        f"the busiest of {card.multiprocessors} multiprocessors has {mine}. A tile's main loop is "
        f"2 x {m} x {n} x {H} FLOP at {of_sm / 1e12:.2f} TFLOP/s x {share:.2f} "
        f"({'assumed' if tile.main_loop else 'fitted'}) = "
        f"{micro(main_loop)}; its loads take {-(-H // k)} x {LATENCY * 1e6:.2f} us (fitted) / "
        f"{tile.num_stages - 1} in flight = {micro(loads)} beside it; its epilogue "
        f"{tile.instructions} instructions x {m} x {n} / ({card.lanes} x {clock} x {ISSUE} "
        f"(fitted)) = {micro(epilogue)} after it. {mine} x {micro(total)} = "
        f"{mine * total * 1e3:.1f} ms."
    ]


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def measured_module() -> str:
    """The package's table of medians."""
    lines = [
        '"""What was measured on GPUs, in ms: from bench/results by bench/predictions.py."""',
        "",
        "# The commit that ran.",
        "COMMITS = {" + ", ".join(f'"{name}": "{commit(name)}"' for name in MEASURED_CARDS) + "}",
        "",
        "# (card, tokens, H, V, frozen) -> way -> median, bfloat16, all tokens under a GRPO loss.",
        "MEASURED: dict[tuple[str, int, int, int, bool], dict[str, float]] = {",
    ]
    for key, ways in measured_ways().items():
        inside_ = ", ".join(map(repr, key)).replace("'", '"')
        lines.append(f"    ({inside_}): {{")
        lines += [f'        "{way}": {round(ms, 1)},' for way, ms in sorted(ways.items())]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def measured_ways() -> dict[tuple, dict[str, float]]:
    """By the names that a plan gives them."""
    found: dict[tuple, dict[str, float]] = {}
    for card in MEASURED_CARDS:
        # In the later result, the proof of kernels, today's ways ran as unproven.
        suffix = UNPROVEN if card in UNSEEN else ""
        for r in result(NEWEST[card])["records"]:
            way = way_name(r, suffix)
            if way is None or "seconds_median" not in r:
                continue
            for frozen in (False, True):
                if r["case"] in (FORWARD, FROZEN if frozen else STEP):
                    key = (card, r["tokens"], r["hidden"], r["vocabulary"], frozen)
                    found.setdefault(key, {})[way] = r["seconds_median"] * 1e3
    return dict(sorted(found.items()))


def way_name(record: dict, suffix: str) -> str | None:
    """Of a record, or None where a plan has no such way; suffix: of ours, as they are now."""
    provider = record["provider"]
    if provider.startswith(OURS):
        if not provider.endswith(suffix):
            return None
        provider = provider.removesuffix(suffix)
    if record["case"] == FORWARD:
        names = {OURS: "linear_logprobs, no gradient", "eager torch": "eager torch, no gradient"}
        return names.get(provider)
    names = {ONE_PASS: "linear_policy_loss", TWO_PASSES: "linear_logprobs"}
    return names.get(provider, provider if provider == "eager torch" else None)
