"""What a record of the benchmark says: a dict per provider, case and shape.

A record with an "axis" belongs to a curve: "tokens", "vocabulary" or "hidden" is what varies there;
on "padded" the tokens of the batch grow while those under the loss ("counted_tokens") stay as many.
Records without an axis are at the shape that was asked for, the common end of the first three.

"ratio_to_products" judges: it is to products that write into outputs which are there. Records of
CPUs have "ratio_to_allocating_products" beside it, and "user_seconds_median", the processor's time
in all threads of the process. A CPU's result without them is older, and its "ratio_to_products" is
to products that allocate. "load" is the number of competing processes, if it says so.
"""

from pathlib import Path
from typing import Any

from fused_rl.system.outputs import read_json

PRODUCTS = "bare products"
ALLOCATING = "bare products that allocate"
BARE = (PRODUCTS, ALLOCATING)
# The titles of our ways begin with it.
OURS = "fused_rl"
MIB = 2**20
# What a record's error is of, by the name of the field.
ERRORS = {
    "logprob_error": "log-prob error",
    "divergence_error": "divergence error",
    "gradient_error": "relative gradient error",
}
SHAPE = ("tokens", "hidden", "vocabulary", "dtype")

Record = dict[str, Any]
Content = dict[str, Any]


def shape_of(record: Record) -> tuple[int, int, int, str]:
    """N, H, V, dtype."""
    return tuple(record[key] for key in SHAPE)


def error_of(record: Record) -> float | None:
    """Of log-probs, of divergences or of gradients: whichever the record has."""
    return next((record[name] for name in ERRORS if name in record), None)


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


def ratio_to_full(records: list[Record], record: Record) -> float | None:
    """Of a step with masked tokens: its time over that of the same provider's step without them,
    each as a ratio to the products in its own rounds. None of anything else.
    """
    N = record["tokens"]
    if record["provider"] in BARE or record.get("counted_tokens", N) == N:
        return None

    def kind(r: Record) -> tuple:
        return r["provider"], r["nhv"], r.get("load", 0), *shape_of(r)

    for r in records:
        if r.get("counted_tokens") == N and "ratio_to_products" in r and kind(r) == kind(record):
            return record["ratio_to_products"] / r["ratio_to_products"]
    return None


def read_result(path: Path) -> Content:
    """What a bench.json says, with all that a comparison asks of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no result of the benchmark; nothing of what it says instead is repeated.
    """
    content = read_json(path)
    records = content.get("records") if isinstance(content, dict) else None
    if not isinstance(records, list) or not isinstance(content.get("shape"), dict):
        raise ValueError(f"{path} is no result of fused-rl bench: it has no shape and records")
    for number, record in enumerate(records):
        if not (isinstance(record, dict) and _is_record(record, content["shape"])):
            raise ValueError(f"{path} is no result of fused-rl bench: record {number} is none")
    return content


def _is_record(record: Record, shape: Record) -> bool:
    """shape: of the result, since older records have that alone."""
    *counts, dtype = ({**shape, **record}.get(key) for key in SHAPE)
    texts = (record.get("case"), record.get("provider"), dtype)
    verdict = record.get("verdict", "right")
    names = ("ratio_p20", "ratio_p80", "ratio_to_allocating_products")
    ratios = [record[k] for k in names if k in record]
    if verdict == "right":
        ratios.append(record.get("ratio_to_products"))
    return (
        all(isinstance(t, str) and t.isprintable() for t in texts)
        and all(type(count) is int and 0 < count < 2**63 for count in counts)
        and verdict in ("right", "wrong", "failed")
        and all(type(ratio) in (int, float) and 0 < ratio < 1e300 for ratio in ratios)
    )
