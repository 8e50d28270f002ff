"""A rollout in a file: log-probs of the trainer and of the engine, and the tokens that count.

JSON, either a list of records or one object of arrays; JSON lines, a record each; Parquet. A record
is a sequence with a list per field, or a token with a number per field. null is NaN. The fields go
by the names of fused_rl, verl, TRL, slime, NeMo-RL or prime-rl, or by those that are given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_rl.system.commands import missing_of

# In the order in which they are looked for.
LOGPROBS = ("old_logprobs", "logprobs", "old_log_probs", "old_per_token_logps", "prev_logprobs")
LOGPROBS += ("trainer_logprobs", "log_probs")
ROLLOUT = ("rollout_logprobs", "rollout_log_probs", "sampling_per_token_logps")
ROLLOUT += ("generation_logprobs", "inference_logprobs")
MASK = ("loss_mask", "response_mask", "completion_mask", "loss_masks", "token_mask")

Columns = Mapping[str, list]


@dataclass(frozen=True)
class Names:
    """Fields to take; None: the first of those that are known."""

    logprobs: str | None = None
    rollout: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Rollout:
    """Vectors [N], float64; loss_mask [N] bool, or None where all count; cu_seqlens [B + 1] int64,
    or None where tokens are not told apart by sequence. named: the fields they were taken from.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    loss_mask: Tensor | None
    cu_seqlens: Tensor | None
    named: tuple[str, ...]


def read(path: Path, names: Names) -> Rollout:
    """The rollout in a file; a file that is not Parquet is read whole.

    Raises:
        OSError: it cannot be read.
        ValueError: another format, a field that is missing, or numbers that do not fit together.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} must be {', '.join(_READERS)}, got {path.suffix or 'no suffix'}")
    columns = reader(path, {*LOGPROBS, *ROLLOUT, *MASK, *vars(names).values()})
    ours = _field(columns, "the trainer's log-probs", names.logprobs, LOGPROBS, "--logprobs")
    theirs = _field(columns, "the engine's log-probs", names.rollout, ROLLOUT, "--rollout")
    mask = names.mask or next((name for name in MASK if name in columns), None)
    if mask is not None:
        mask = _field(columns, "the mask", mask, MASK, "--mask")
    chosen = (ours, theirs) if mask is None else (ours, theirs, mask)
    lengths = _lengths(columns, ours)
    for name in chosen[1:]:
        _same_lengths(ours, lengths, name, _lengths(columns, name))
    vectors = [_vector(columns, name, lengths is not None) for name in chosen]
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return Rollout(*vectors[:2], _counts(mask, vectors), cu_seqlens, chosen)


def _field(
    columns: Columns, what: str, given: str | None, known: Iterable[str], option: str
) -> str:
    """The name of a field that is there."""
    if given is None:
        given = next((name for name in known if name in columns), None)
    if given in columns:
        return given
    found = ", ".join(map(str, columns)) or "none"
    if given is not None:
        raise ValueError(f"there is no field {given} for {what}; found: {found}")
    raise ValueError(
        f"{what} are missing: one of {', '.join(known)}, or {option} NAME; found: {found}"
    )


def _lengths(columns: Columns, name: str) -> list[int] | None:
    """Of each record's list; None where records are numbers."""
    kinds = {isinstance(value, list) for value in columns[name]}
    if kinds == {True}:
        return [len(value) for value in columns[name]]
    if True in kinds:
        raise ValueError(f"{name} has a list in some records, and none in others")
    return None


def _same_lengths(
    first: str, lengths: list[int] | None, name: str, others: list[int] | None
) -> None:
    if lengths is None or others is None:
        if (lengths is None) != (others is None):
            raise ValueError(f"{first} and {name} must both be lists per sequence, or neither")
        return
    if len(lengths) != len(others):
        raise ValueError(f"{first} has {len(lengths)} sequences, and {name} {len(others)}")
    for i, (length, other) in enumerate(zip(lengths, others, strict=True)):
        if length != other:
            raise ValueError(f"record {i}: {first} has {length} tokens, and {name} {other}")


def _vector(columns: Columns, name: str, nested: bool) -> Tensor:
    """[N] float64 of a column's numbers."""
    flat = columns[name]
    if nested:
        flat = [number for sequence in flat for number in sequence]
    for number in flat:
        # A bool is a number to Python, and to a mask.
        if number is not None and not isinstance(number, (int, float)):
            raise ValueError(
                f"{name} must be numbers, or a list of them per record, got {number!r}"
            )
    try:
        numbers = [math.nan if number is None else float(number) for number in flat]
    except OverflowError as error:
        raise ValueError(f"{name} has a number that is no float") from error
    return torch.tensor(numbers, dtype=torch.float64)


def _counts(mask: str | None, vectors: list[Tensor]) -> Tensor | None:
    """The mask, [N] bool; all vectors are of one length."""
    if len({len(vector) for vector in vectors}) > 1:
        raise ValueError(f"fields of {' and '.join(str(len(v)) for v in vectors)} tokens")
    if mask is None:
        return None
    wrong = vectors[2][(vectors[2] != 0) & (vectors[2] != 1)]
    if len(wrong):
        raise ValueError(f"{mask} must be 0 or 1, got {wrong[0].item()}")
    return vectors[2] == 1


def _read_json(path: Path, wanted: Set[str]) -> Columns:
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(content, dict):
        return {name: value for name, value in content.items() if isinstance(value, list)}
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a list of records, or an object of arrays")
    return _columns(content)


def _read_lines(path: Path, wanted: Set[str]) -> Columns:
    records = []
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {i}, is no JSON: {error}") from error
    return _columns(records)


def _columns(records: list) -> Columns:
    """Field -> the values of all records; a field that one of them lacks is none."""
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"record {i} must be an object, got {type(record).__name__}")
    shared = [name for name in (records[0] if records else {}) if all(name in r for r in records)]
    return {name: [record[name] for record in records] for name in shared}


def _read_parquet(path: Path, wanted: Set[str]) -> Columns:
    """Of the columns that are not wanted, which may be long texts, the names alone."""
    if missing := missing_of(("pyarrow",)):
        raise ValueError(f"{path} needs {missing}: pip install {missing}")
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in names if name in wanted])
    except ArrowException as error:
        raise ValueError(f"{path} is no Parquet: {error}") from error
    return {name: [] for name in names} | table.to_pydict()


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".parquet": _read_parquet,
}
