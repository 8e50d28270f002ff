"""Errors against float64, ours beside eager torch's, as lines of JSON.

    python tests/accuracy.py float32,bfloat16 64,4200 [H V]

test_accuracy.py runs this in processes of its own, since the instruction set must be chosen before
torch is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import oracle
import torch

# Sums of all kinds: terms of either sign; terms of one sign, for which one accumulator is worse;
# the same term every time, for which it is worst; and the sum over the vocabulary of a weight that
# has a mean.
KINDS = ("random", "mean", "constant", "weight mean")


def cases(kind: str, N: int, H: int, V: int, dtype: torch.dtype) -> oracle.Case:
    """Entries of about the same probability, so that no few of them make up the error."""
    case = oracle.random_case(N, H, V, torch.float64, logit_std=0.3, bias=True)
    hidden, weight = case.hidden, case.weight
    if kind == "mean":
        hidden = 1 + 0.1 * hidden
    if kind == "constant":
        hidden = hidden[:1].expand(N, H)
    if kind == "weight mean":
        weight = 0.5 + 0.1 * torch.randn(V, H, dtype=torch.float64)
    given = {"hidden": hidden, "weight": weight, "bias": 0.3 * case.bias}
    return replace(case, **{name: t.to(dtype).contiguous() for name, t in given.items()})


def upstream(kind: str, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "random":
        return oracle.random_upstream(N)
    return torch.ones(N) if kind != "weight mean" else torch.randn(N), torch.zeros(N)


def errors(kind: str, N: int, H: int, V: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """By result: our error and eager torch's, relative, as vectors; over a few cases where N is
    small, since the error of few numbers is a matter of luck."""
    torch.manual_seed(N)
    found = [_errors(kind, N, H, V, dtype) for _ in range(4 if N <= 1000 else 1)]
    return {name: tuple(_mean_square(each[name] for each in found)) for name in found[0]}


def _mean_square(pairs: Iterator[tuple[float, float]]) -> list[float]:
    return torch.tensor(list(pairs)).square().mean(0).sqrt().tolist()


def _errors(
    kind: str, N: int, H: int, V: int, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    case, up = cases(kind, N, H, V, dtype), upstream(kind, N)
    ours, eager, exact = (way(case, *up) for way in (oracle.ours, oracle.eager, oracle.exact))
    compared = zip(oracle.Result._fields, ours, eager, exact, strict=True)
    return {
        name: (oracle.relative_error(mine, right), oracle.relative_error(theirs, right))
        for name, mine, theirs, right in compared
        # All tokens are one.
        if not (kind == "constant" and name in ("logprobs", "entropy"))
    }


def rows(dtypes: list[str], sizes: list[int], H: int, V: int) -> Iterator[dict]:
    for dtype in dtypes:
        for kind in KINDS:
            for N in sizes:
                found = errors(kind, N, H, V, getattr(torch, dtype))
                yield {"dtype": dtype, "kind": kind, "N": N, **found}


def main(dtypes: str, sizes: str, H: str = "32", V: str = "96") -> None:
    for row in rows(dtypes.split(","), [int(N) for N in sizes.split(",")], int(H), int(V)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
