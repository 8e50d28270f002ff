"""Finds the fitted constants of fused_rl/plan anew, from one card, and tries them on the other.

    python bench/predictions_fit.py                      from each measured card; prints
    python bench/predictions_fit.py --cards h100,h200    from both together

It changes one constant at a time by a random factor, from values that are far off, and keeps what
lowers the deviation: the sum over the kinds of measurements of the mean of |log(ratio)|^1.5, where
one that is over 0.4 counts as 0.4. A second or so for each 50 steps.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from typing import Any

import predictions
from predictions import Case, cases, deviation

from fused_rl.plan import steps
from fused_rl.plan import time as model

# owner, name, where the search begins.
CONSTANTS: list[tuple[Any, Any, float]] = [
    (vars(model), "POWER", 3.0),
    (vars(model), "ISSUE", 1.0),
    (vars(model), "TILE", 1e-6),
    (vars(model), "ADDED", 1.0),
    (vars(model), "OTHERS", 0.5),
    (model.MAIN_LOOP, True, 1.0),
    (model.MAIN_LOOP, False, 1.0),
    (vars(model), "LATENCY", 1e-6),
    (vars(model), "START", 20e-6),
    (vars(model), "TILE_HOST", 50e-6),
    (vars(model), "TILE_GAP", 5e-6),
    (vars(model), "MERGE", 0.5e-6),
    (vars(steps), "CHUNK_HOST", 2e-3),
    (vars(steps), "CHUNK_GAP", 0.3e-3),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", help="fit on these, together (default: on each alone)")
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    every = predictions.MEASURED_CARDS
    sets = [tuple(options.cards.split(","))] if options.cards else [(name,) for name in every]
    for cards in sets:
        found = fit(cards, options.steps)
        print(f"fitted on {', '.join(cards)}:", {k: float(f"{v:.3g}") for k, v in found.items()})
        for name in every:
            of_kind = {k: deviation(v) for k, v in by_kind((name,)).items()}
            said = (f"{kind} {a:.3f} (at most {b:.3f})" for kind, (a, b) in of_kind.items())
            print(f"  median |log(ratio)| on {name}: {', '.join(said)}")
    return 0


def fit(cards: tuple[str, ...], count: int, seed: int = 0) -> dict[str, float]:
    """The constants after that many steps; the modules keep them."""
    draw = random.Random(seed)
    for owner, name, value in CONSTANTS:
        owner[name] = value
    least = total(cards)
    for i in range(count):
        owner, name, _ = draw.choice(CONSTANTS)
        before = owner[name]
        owner[name] = before * math.exp(draw.gauss(0, 0.25 if 2 * i < count else 0.1))
        now = total(cards)
        if now < least:
            least = now
        else:
            owner[name] = before
    return {
        f"MAIN_LOOP {n}" if owner is model.MAIN_LOOP else n: owner[n] for owner, n, _ in CONSTANTS
    }


def by_kind(cards: tuple[str, ...]) -> dict[str, list[Case]]:
    """The cases of these cards."""
    found: dict[str, list[Case]] = {}
    for case in cases(cards):
        found.setdefault(case.kind, []).append(case)
    return found


def total(cards: tuple[str, ...]) -> float:
    """What is to be small."""
    return sum(
        statistics.mean(min(abs(math.log(case.ratio)), 0.4) ** 1.5 for case in of_kind)
        for of_kind in by_kind(cards).values()
    )


if __name__ == "__main__":
    sys.exit(main())
