"""Heads and tokens that hypothesis draws: shapes, dtypes, layouts in memory, ignored tokens,
entries that no token may take; and how far the library may be from the truth on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import oracle
import torch
import torch.nn.functional as F
from oracle import IGNORED, Case
from torch import Tensor

from fused_rl import reference

# Our error may be so many times that of eager torch, and so many roundings of the accumulator more,
# at the size of what it adds up.
TIMES, ROUNDINGS = 4, 4
CHUNKS = (None, None, 1, 1000, 2**14)
IGNORE_INDICES = (IGNORED, 0, 3, -1, -(2**63))


def strided(t: Tensor) -> Tensor:
    """In every second column of something wider, full of NaN."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t: Tensor) -> Tensor:
    """Not at the beginning of its memory, nor at an even address."""
    return torch.cat([t.new_full((3,), torch.nan), t.reshape(-1)])[3:].view_as(t)


def every_other_row(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]


LAYOUTS = (Tensor.clone, Tensor.clone, strided, transposed, offset, every_other_row)


@dataclass(frozen=True)
class Drawn:
    """case: with IGNORED for ignored tokens. labels: as the call gets them, with ignore_index.
    trained: which of hidden, weight, bias want a gradient. excluded: entries whose bias is -inf.
    """

    case: Case
    labels: Tensor
    ignore_index: int
    temperature: float | Tensor
    chunk_bytes: int | None
    trained: tuple[bool, bool, bool]
    excluded: Tensor

    @property
    def compact(self) -> Case:
        """The case with nothing between the elements: torch's own products of bfloat16 let NaN in
        that lies beside a strided operand.
        """
        names = ("hidden", "weight", "bias")
        tensors = {n: getattr(self.case, n) for n in names}
        whole = {n: t.contiguous().clone() for n, t in tensors.items() if t is not None}
        return replace(self.case, **whole)

    @property
    def options(self) -> dict:
        return {
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
            "chunk_bytes": self.chunk_bytes,
        }


@st.composite
def heads(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = oracle.FLOATS, level: float = 0.0
) -> Drawn:
    """Logits with a standard deviation of up to 10, all of them beside `level`."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    N, H = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    V = draw(st.one_of(st.integers(1, 20), st.integers(21, 300)))
    dtype = draw(st.sampled_from(dtypes))
    softcap, scale = draw(st.sampled_from((None, None, 0.5, 3.0, 30.0))), 1.0
    if draw(st.booleans()):
        scale = draw(st.sampled_from((0.7, -1.3, 0.05, 12.0)))
    case = oracle.random_case(
        *(N, H, V, dtype),
        weight_dtype=draw(st.sampled_from((dtype, dtype, *dtypes))),
        logit_std=draw(st.sampled_from((0.1, 1.0, 1.0, 10.0))),
        bias=bool(level) or draw(st.booleans()),
        scale=abs(scale),
        softcap=softcap,
    )
    case = replace(case, scale=scale, bias=case.bias if case.bias is None else case.bias + level)
    excluded = torch.zeros(V, dtype=torch.bool)
    if case.bias is not None and softcap is None and scale > 0 and draw(st.booleans()):
        excluded = torch.rand(V) < draw(st.sampled_from((0.1, 0.9)))
        excluded[case.labels] = False
        case.bias[excluded] = -torch.inf
    of_bias = draw(st.sampled_from((offset, strided)))
    case = replace(
        case,
        hidden=draw(st.sampled_from(LAYOUTS))(case.hidden),
        weight=draw(st.sampled_from(LAYOUTS))(case.weight),
        bias=None if case.bias is None else of_bias(case.bias),
    )
    temperature = draw(st.sampled_from((1.0, 0.3, 2.5, None)))
    if temperature is None:
        temperature = 0.3 + 2 * torch.rand(N)
    ignored = torch.rand(N) < draw(st.sampled_from((0.0, 0.0, 0.3, 1.0)))
    index = draw(st.sampled_from(IGNORE_INDICES))
    ignored |= case.labels == index
    trained = draw(st.sampled_from(((True, True, True), (True, False, False), (False, True, True))))
    return Drawn(
        replace(
            case,
            labels=case.labels.masked_fill(ignored, IGNORED),
            temperature=torch.as_tensor(temperature, dtype=torch.float64).expand(N),
        ),
        case.labels.masked_fill(ignored, index),
        *(index, temperature, draw(st.sampled_from(CHUNKS)), trained, excluded),
    )


Logits = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def exact_logits(case: Case) -> Logits:
    """At temperature 1, by reference.py."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ones = torch.ones(len(hidden), dtype=torch.float64)
        return reference.logits(hidden, weight, bias, ones, case.scale, case.softcap or 0.0)

    return logits


def eager_logits(case: Case) -> Logits:
    """At temperature 1, as one writes it by hand, in the wider dtype of hidden and weight."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        z = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        z = z * case.scale
        return torch.tanh(z / case.softcap) * case.softcap if case.softcap else z

    return logits


def size_of(case: Case) -> float:
    """Of log-probs, lse and entropy: 1 + the largest finite logit + log V."""
    wide = [None if t is None else t.double() for t in (case.hidden, case.weight, case.bias)]
    z = exact_logits(case)(*wide) / case.temperature.double()[:, None]
    largest = float(z.masked_fill(z == -torch.inf, 0.0).abs().max())
    return 1 + largest + math.log(len(case.weight))


def assert_values(mine: Tensor, eager: Tensor, exact: Tensor, case: Case) -> None:
    """Element by element; eager: in the accumulator dtype, since our logits are never rounded to
    that of the model.
    """
    error, theirs = ((t.double() - exact.double()).abs().max() for t in (mine, eager))
    unit = torch.finfo(mine.dtype).eps * size_of(case)
    assert error <= TIMES * theirs + ROUNDINGS * unit, (float(error), float(theirs), unit)


def assert_gradients(
    mine: list[Tensor | None],
    eager: list[Tensor | None],
    exact: list[Tensor | None],
    case: Case,
    up: list[Tensor],
) -> None:
    """By norm: dhidden, dweight, dbias, where there are. up: what the statistics' gradients are."""
    acc = torch.finfo(reference.acc_dtype(case.hidden, case.weight)).eps
    rows = (case.labels != IGNORED) / case.temperature.double()
    draw = abs(case.scale) * sum((g.double() * rows).norm() for g in up)
    widest = [t.double().norm(dim=-1).max() for t in (case.weight, case.hidden)]
    for got, theirs, right, scale in zip(mine, eager, exact, (*widest, 1.0), strict=True):
        if got is None:
            continue
        error, of_eager = ((t.double() - right).norm() for t in (got, theirs))
        # Rounded when it is handed over, and before it as an operand of a product.
        rounded = 2 * torch.finfo(got.dtype).eps * right.norm()
        allowed = TIMES * of_eager + rounded + ROUNDINGS * acc * size_of(case) * draw * scale
        assert error <= allowed, (float(error), float(of_eager), float(allowed))
