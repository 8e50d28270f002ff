"""What predictions.py writes of the model: its error beside each measurement."""

from __future__ import annotations

import math

from decisions import UNPROVEN
from predictions import MEASURED_CARDS, UNSEEN, Case, cases, deviation

from fused_rl.plan.devices import CARDS
from fused_rl.plan.time import Times


def errors(found: list[Case]) -> list[str]:
    """The block of docs/predictions.md: of what the model is fitted to."""
    kinds = list(dict.fromkeys(case.kind for case in found))
    lines = [*HEADER, *(summary(kind, [c for c in found if c.kind == kind]) for kind in kinds)]
    for kind in kinds:
        lines += ["", f"### {kind.replace('_', ' ').capitalize()}", ""]
        lines += table([c for c in found if c.kind == kind], MEASURED_CARDS)
    return lines


def unseen() -> list[str]:
    """The block of docs/predictions.md: of a later result, its steps case by case."""
    found = cases(tuple(UNSEEN), UNSEEN)
    kinds = list(dict.fromkeys(case.kind for case in found))
    of_records = [c for c in found if c.kind == "records"]
    groups = {
        "records of ours": [c for c in of_records if ": fused_rl" in c.name],
        "of these, what is on by default now": [c for c in of_records if is_today(c)],
    }
    return [
        *HEADER,
        *(summary(kind, [c for c in found if c.kind == kind]) for kind in kinds),
        *(summary(title, of) for title, of in groups.items()),
        "",
        *table(groups["of these, what is on by default now"], tuple(UNSEEN)),
    ]


def is_today(case: Case) -> bool:
    return case.name.endswith(UNPROVEN)


HEADER = [
    "| measured | cases | median deviation | largest | within the range, or 3 % of it |",
    "|---|---|---|---|---|",
]


def summary(kind: str, found: list[Case]) -> str:
    median, largest = (math.expm1(d) for d in deviation(found))
    within = sum(inside(c.predicted, c.ms) for c in found)
    name = kind.replace("_", " ")
    return f"| {name} | {len(found)} | {median:.0%} | {largest:.0%} | {within} |"


def inside(predicted: Times, ms: float) -> bool:
    return predicted.low / 1.03 <= ms <= predicted.high * 1.03


def table(found: list[Case], cards: tuple[str, ...]) -> list[str]:
    """A line for each case, the cards side by side."""
    header = " | ".join(
        f"{CARDS[name].title}: predicted, ms | measured, ms | ratio" for name in cards
    )
    cells = {(c.card, c.shape, c.name, c.tokens): c for c in found}
    lines = [
        f"| head | tokens | case | {header} |",
        "|---|" + "---|" * (2 + 3 * len(cards)),
    ]
    for shape, name, tokens in dict.fromkeys(key[1:] for key in cells):
        here = [cells.get((card, shape, name, tokens)) for card in cards]
        values = " | ".join(f"{figures(c)} | {c.ratio:.2f}" if c else " | | " for c in here)
        lines.append(f"| {shape} | {tokens} | {name} | {values} |")
    return lines


def figures(case: Case) -> str:
    digits = 1 if case.ms >= 10 else 2
    low, high = (f"{t:.{digits}f}" for t in case.predicted)
    return f"{low if low == high else f'{low}..{high}'} | {case.ms:.{digits}f}"
