"""Products of float32 and bfloat16 operands, by bfloat16 products with fp32 accumulators.

    x = x1 + x2 + x3      x1 = bf16(x), x2 = bf16(x - x1), x3 = bf16(x - x1 - x2)

A float32 has 24 bits and a bfloat16 8, of the same exponents: the sum is exact. So is the product
of two bfloat16 numbers in float32. With h in bfloat16, and w and the gradient d in float32,

    logits   = h w3 + h w2 + h w1      the fp32 product, its terms in another order
    dweight  = d3 h + d2 h + d1 h      likewise
    dhidden ~= d2 w1 + d1 w2 + d1 w1   each term to within 2^-15 of |d w|

and for h in float32 and w in bfloat16 the same with the two exchanged. Small parts are added first.

The error of dhidden: |x - x1| <= 2^-8 |x| and |x - x1 - x2| <= 2^-17 |x|. What is left out of a
term is d2 w2, d (w - w1 - w2) and (d - d1 - d2) w, at most (2^-16 + 2^-17 + 2^-17) |d w| together,
and 2^-18 |d w| in the root mean square. dhidden is then rounded to bfloat16, an error of 2^-9. So
even where the terms cancel to a hundredth of their size, the rounding decides.

The cost is that of three bfloat16 products, where a GPU forms an fp32 product at about a fifteenth
of the bfloat16 rate, by its data sheet; on an H100 it was right, and not timed. TF32, which
torch.set_float32_matmul_precision may ask for, has no part in it. The parts are those of a block of
the vocabulary at a time, at most PARTS_BYTES. Traffic of a split: reads 4 bytes per number and
writes 2 for each part.

What is left of numbers under 2^-110 may be lost: parts under 2^-133, the smallest bfloat16. A
number that rounds to infinity is cut instead; inf and NaN are their own first part. Against an
infinite number the other operand's parts of 0 are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# A file of bench/results that shows these products right and faster than those of float32; until
# there is one they stay off, unless they are asked for.
PROOF: str | None = None
# Numbers that a program splits, rows x columns: 8 for each thread.
TILE = (4, 256)
NUM_WARPS = 4
# Scratch for the parts of a block.
PARTS_BYTES = 2**27
# Results of a block: 128 tiles of 128 x 256, about one for each multiprocessor, 16 MiB that stay in
# the L2 cache while part after part is added to them.
RESULTS = 2**22


@triton.jit
def _first_part(x):
    """The nearest bfloat16, as fp32; toward 0 where that is infinite. inf and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    toward_zero = (bits & -0x10000).to(tl.float32, bitcast=True)
    part = tl.where(tl.abs(nearest) < float("inf"), nearest, toward_zero)
    return tl.where(x == x, part, x)


@triton.jit
def _split_kernel(
    x_ptr,  # (rows, columns) fp32
    parts_ptr,  # (COUNT, rows, columns) bf16, written
    rows,
    columns,
    row_stride,
    part_stride,
    part_row_stride,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    r = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (r < rows) & (c < columns)
    rest = tl.load(x_ptr + r * row_stride + c, mask=mask, other=0.0)
    out = parts_ptr + r * part_row_stride + c
    for _ in tl.static_range(COUNT):
        part = _first_part(rest)
        tl.store(out, part.to(tl.bfloat16), mask=mask)
        rest = tl.where(tl.abs(part) == float("inf"), 0.0, rest - part)
        out += part_stride


def parts(x: Tensor, count: int) -> Tensor:
    """The first `count` parts of x [rows, columns] fp32, largest first: [count, rows, columns].

    The dimension that is contiguous in x is so in them, and their other stride a multiple of 8: the
    vendor's products want 16-byte aligned rows.
    """
    if x.stride(0) == 1 != x.stride(1):
        return parts(x.T, count).transpose(1, 2)
    rows, columns = x.shape
    room = x.new_empty(count, rows, -(-columns // 8) * 8, dtype=torch.bfloat16)
    tiles = triton.cdiv(rows, TILE[0]) * triton.cdiv(columns, TILE[1])
    _split_kernel[(tiles,)](
        x,
        room,
        rows,
        columns,
        x.stride(0),
        room.stride(0),
        room.stride(1),
        COUNT=count,
        ROWS=TILE[0],
        COLUMNS=TILE[1],
        num_warps=NUM_WARPS,
    )
    return room[:, :, :columns]


def takes(a: Tensor, b: Tensor, final: torch.dtype = torch.float32) -> bool:
    """Whether a @ b, rounded to `final` in the end, is formed of parts."""
    dtypes = {a.dtype, b.dtype}
    one_is_wide = dtypes == {torch.float32, torch.bfloat16}
    return one_is_wide or (dtypes == {torch.float32} and final == torch.bfloat16)


def multiply(to: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """to = a @ b, or to += a @ b: bf16 operands, fp32 accumulators and result."""
    if add:
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=to)


def product(a: Tensor, b: Tensor, to: Tensor, add: bool) -> None:
    """to = a @ b, or to += a @ b, in fp32: what `takes` says yes to.

    Two float32 operands: for a sum that is rounded to bfloat16 in the end.
    """
    if a.dtype == b.dtype:
        _rounded_product(a, b, to, add)
    elif a.dtype == torch.float32:
        for rows in _blocks(len(a), 6 * a.shape[1], b.shape[1]):
            for i, part in enumerate(parts(a[rows], 3).unbind()[::-1]):
                multiply(to[rows], part, b, add or i > 0)
    else:
        for columns in _blocks(b.shape[1], 6 * len(b), len(a)):
            for i, part in enumerate(parts(b[:, columns], 3).unbind()[::-1]):
                multiply(to[:, columns], a, part, add or i > 0)


def _rounded_product(a: Tensor, b: Tensor, to: Tensor, add: bool) -> None:
    for inner in _blocks(len(b), 4 * (len(a) + b.shape[1])):
        a1, a2 = parts(a[:, inner], 2)
        b1, b2 = parts(b[inner], 2)
        for left, right in ((a2, b1), (a1, b2), (a1, b1)):
            multiply(to, left, right, add)
            add = True


def _blocks(length: int, part_bytes: int, results: int = 0) -> Iterator[slice]:
    """Slices of a dimension, whose parts fit into PARTS_BYTES and results into RESULTS.

    part_bytes, results: of one index of that dimension.
    """
    most = min(PARTS_BYTES // max(1, part_bytes), RESULTS // max(1, results))
    size = max(64, most // 64 * 64)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
