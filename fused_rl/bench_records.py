"""What a record of the benchmark says: a dict per provider, case and shape.

A record with an "axis" belongs to a curve: "tokens", "vocabulary" or "hidden" is what varies there;
on "padded" the tokens of the batch grow while those under the loss ("counted_tokens") stay as many.
Records without an axis are at the shape that was asked for, the common end of the first three.
"""

from typing import Any

PRODUCTS = "bare products"
# The titles of our ways begin with it.
OURS = "fused_rl"
MIB = 2**20

Record = dict[str, Any]
Content = dict[str, Any]


def shape_of(record: Record) -> tuple[int, int, int, str]:
    """N, H, V, dtype."""
    return tuple(record[key] for key in ("tokens", "hidden", "vocabulary", "dtype"))


def error_of(record: Record) -> float | None:
    """Of log-probs, or of gradients: whichever the record has."""
    return record.get("logprob_error", record.get("gradient_error"))


def of_first_shape(records: list[Record]) -> list[Record]:
    """Those at the shape asked for, which is measured first."""
    first = shape_of(records[0])
    return [r for r in records if shape_of(r) == first and "axis" not in r]


def cases_of(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in records))


def of_case(records: list[Record], case: str) -> list[Record]:
    """Those that were timed."""
    return [r for r in records if r["case"] == case and r["verdict"] == "right"]


def on_axis(records: list[Record], case: str, axis: str) -> list[Record]:
    """The points of a curve from left to right, with the shape asked for at its end."""
    chosen = [r for r in of_case(records, case) if r.get("axis", axis) == axis]
    key = "tokens" if axis == "padded" else axis
    return sorted(chosen, key=lambda r: r[key])
