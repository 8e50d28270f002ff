"""Divergences of two linear heads: products of whole chunks, around the rows of divergences.py.

Statistics and `chunk_bwd` take both sides' logits of a chunk of tokens, fp32 [2, N, row_stride].
`bwd` walks the vocabulary for all tokens, as linear_gradients.py does, and forms both sides' logits
of a block again. In multiples of NHV: 4 forward, 4 for what a chunk's logits give, 8 for what `bwd`
does. The gradients are those of one side, the student; with the two exchanged, the teacher's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import divergences, linear_gradients, logprobs

# Both sides' logits.
FORWARD_BYTES = 8


class Head(NamedTuple):
    """A side's head, and its hidden states."""

    hidden: Tensor  # [N, H], the dtype of weight, or one is float32 and the other bfloat16
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64, the same on both sides
    temperature: Tensor  # [N] fp32
    scale: float
    softcap: float
    rounding: int

    def side(
        self, logits: Tensor, lse: Tensor, entropy: Tensor, columns: slice = slice(None)
    ) -> divergences.Side:
        """With its logits of some columns of the vocabulary."""
        bias = None if self.bias is None else self.bias[columns]
        transform = (self.temperature, self.scale, self.softcap, self.rounding)
        return divergences.Side(logits, bias, *transform, lse, entropy)


class Known(NamedTuple):
    """Of the forward pass, [N] each."""

    lse: Tensor  # fp64
    entropy: Tensor  # fp32
    teacher_lse: Tensor  # fp64
    teacher_entropy: Tensor  # fp32
    slope: Tensor  # fp32


def bytes_per_logit(element_size: int) -> int:
    """Of the student's, with those of the teacher and the gradient."""
    return 4 + linear_gradients.bytes_per_logit(element_size)


def logits(student: Head, teacher: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """Raw logits [N, V] of both, written into z [2, N, row_stride]."""
    V = len(student.weight)
    pairs = ((student, z[0, :, :V]), (teacher, z[1, :, :V]))
    return tuple(linear_gradients.product(h.hidden, h.weight.T, to) for h, to in pairs)


def statistics(
    student: Head,
    teacher: Head,
    measure: tuple[int, float, float],  # kind, parameter, factor
    z: Tensor,  # [2, N, row_stride] fp32, written
    ignore_index: int,
    multiprocessors: int,
) -> tuple[Tensor, ...]:
    """divergence, logprobs, entropy, lse, the teacher's three, and the sums of both slopes, [N]
    each: fp32, and each lse fp64. A token whose label is ignored has 0.
    """
    sides, stats = [], []
    for head, raw in zip((student, teacher), logits(student, teacher, z), strict=True):
        of_head = logprobs.fwd(raw, *head[2:], ignore_index, multiprocessors)[:3]
        sides.append(head.side(raw, of_head[2], of_head[1]))
        stats += of_head
    sums = divergences.sums(*sides, *measure, multiprocessors)
    sums = sums.where(student.labels != ignore_index, 0.0).float()
    # No operator may return views of one tensor.
    divergence, *slopes = (t.clone() for t in sums)
    return (divergence, *stats, *slopes)


def bwd(
    upstream: tuple[Tensor, Tensor, Tensor],  # of divergence, log-prob and entropy, [N] fp32
    student: Head,
    teacher: Head,
    measure: tuple[int, float, float],
    known: Known,
    ignore_index: int,
    chunk_bytes: int,
    needs: tuple[bool, bool, bool],  # dhidden, dweight, dbias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden, dweight and dbias of the student, as linear_gradients.bwd has them."""
    hidden, weight, *_ = student
    N, V = len(hidden), len(weight)
    of_draw = torch.promote_types(hidden.dtype, weight.dtype)
    columns = linear_gradients.block_columns(N, bytes_per_logit(of_draw.itemsize), chunk_bytes)
    room = [
        linear_gradients.logits_room(N, min(columns, V), torch.float32, hidden.device)
        for _ in range(2)
    ]

    def draw_of(v0: int, v1: int) -> Tensor:
        block, of_sides = slice(v0, v1), (known[:2], known[2:4])
        sides = [
            head.side(
                linear_gradients.product(head.hidden, head.weight[block].T, raw[:, : v1 - v0]),
                *of_side,
                block,
            )
            for head, raw, of_side in zip((student, teacher), room, of_sides, strict=True)
        ]
        given = (measure, student.labels, known.slope, ignore_index)
        return _draw(upstream, *sides, given, of_draw, v0)

    return linear_gradients.by_blocks(draw_of, columns, hidden, weight, needs)


def chunk_bwd(
    z: Tensor,  # [2, N, row_stride] fp32 of `statistics`, consumed
    upstream: tuple[Tensor, Tensor, Tensor],
    student: Head,
    teacher: Head,
    measure: tuple[int, float, float],
    known: Known,
    dweight: Tensor | None,  # [V, H], written or added to
    dbias: Tensor | None,  # [V], written or added to
    accumulate: bool,
    final: torch.dtype,  # what dhidden is rounded to in the end
) -> Tensor:  # [N, H] fp32
    """dhidden of a chunk of tokens, all of which count; its share of dweight and dbias."""
    hidden, weight, *_ = student
    of_draw = torch.promote_types(hidden.dtype, weight.dtype)
    raw, teacher_raw = z[:, :, : len(weight)]
    sides = (student.side(raw, *known[:2]), teacher.side(teacher_raw, *known[2:4]))
    given = (measure, student.labels, known.slope, -1)
    draw = _draw(upstream, *sides, given, of_draw)
    return linear_gradients.products(draw, hidden, weight, dweight, dbias, accumulate, final)


def _draw(
    upstream: tuple[Tensor, Tensor, Tensor],
    student: divergences.Side,
    teacher: divergences.Side,
    given: tuple,
    dtype: torch.dtype,
    first_column: int = 0,
) -> Tensor:
    """The gradient of the student's raw logits, in the dtype that the products take; in fp32 it is
    written over them.
    """
    raw = student.logits
    room = linear_gradients.logits_room
    draw = raw if dtype == torch.float32 else room(*raw.shape, dtype, raw.device)
    divergences.gradient(upstream, student, teacher, *given, draw, first_column)
    return draw
