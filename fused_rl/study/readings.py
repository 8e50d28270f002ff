"""How the numbers of overoptimisation.py are found, and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fused_rl.study.part import Numbers

TUNED = ("fixed", "annealed", "adaptive")
"""Schedules that are also run at scales of the proxy which they are not tuned for."""


def main_runs(numbers: Numbers) -> list[dict[str, Any]]:
    """Runs without a KL whose fits and monitors are known: one for each seed, at one rate."""
    return [run for run in numbers["free"] if "fits" in run]


def ends(kind: dict[str, Any], name: str) -> list[float]:
    """Of every seed."""
    return [end[name] for end in kind["ends"]]


def kind_of(numbers: Numbers, schedule: str, scale: float = 1.0) -> dict[str, Any]:
    """The runs of a schedule at the nearest scale."""
    kinds = [kind for kind in numbers["beta"] if kind["schedule"] == schedule]
    return min(kinds, key=lambda kind: abs(math.log(kind["scale"] / scale)))


def number(values: Sequence[float] | float, form: str = ".2f", unit: str = "") -> str:
    """Of several, the least and the largest."""
    several = values if isinstance(values, Sequence) else [values]
    texts = dict.fromkeys(f"{x:{form}}" for x in (min(several), max(several)))
    return " to ".join(texts).replace("-", "\N{MINUS SIGN}") + unit


def percent(values: Sequence[float] | float) -> str:
    """As number, of shares."""
    several = values if isinstance(values, Sequence) else [values]
    return number([100 * x for x in several], ".0f", " %")


def ratio(pairs: Sequence[tuple[dict[str, Any], dict[str, float | None]]]) -> str:
    """Fitted over true KL of the peak; "none in reach" where a fit has none."""
    found = [fit["kl_peak"] / of["peak"]["kl"] for of, fit in pairs if fit["kl_peak"] is not None]
    none = len(pairs) - len(found)
    if not found:
        return "none in reach"
    return number(found) + (f", {none} out of reach" if none else "")
