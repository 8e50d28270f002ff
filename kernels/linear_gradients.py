"""Gradients of the linear head: products of whole chunks, around the row kernel of logprobs.py.

    draw    = the gradient of hidden . weight^T, from logprobs.bwd
    dhidden = draw weight      dweight = draw^T hidden      dbias = sum_n draw

The vendor's library forms these products as fast as the chip can. `bwd` walks the vocabulary for
all tokens and writes each row of dweight once: 8 NHV with the forward pass. `chunk_bwd` takes the
logits that a chunk of tokens already has: 6 NHV.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import logprobs, split

# The tile that the vendor's products of bf16 are cut into, tokens x H.
PRODUCT_TILE = (128, 256)


def bytes_per_logit(element_size: int) -> int:
    """fp32 logits, and beside them their gradient in the dtype of the products; fp32 shares."""
    return 4 if element_size == 4 else 4 + element_size


# Of so many numbers a product has tiles for all of a device, 128 x 256 each.
LARGE_RESULT = 2**23
# Of a product that is rounded to another dtype than the product has.
BLOCK_ROWS = 16384
# A row of logits begins where the vendor's products and vectors of 16 bytes can.
ALIGNED = 64


def row_stride(V: int) -> int:
    """Between rows of logits."""
    return -(-V // ALIGNED) * ALIGNED


def logits_room(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # [N, V]
    """Room for logits, or their gradient, with rows `row_stride` apart."""
    return torch.empty(N, row_stride(V), dtype=dtype, device=device)[:, :V]


def chunk_tokens(V: int, H: int, per_logit: int, chunk_bytes: int, multiprocessors: int) -> int:
    """Tokens of a chunk: of the numbers that chunk_bytes allows, the one whose dhidden, the product
    with the fewest tiles, leaves the fewest multiprocessors idle in its last wave; the largest of
    those that do almost as well.
    """
    rows, columns = PRODUCT_TILE
    most = chunk_bytes // (row_stride(V) * per_logit)
    if most < rows:
        return max(1, most)
    across = -(-H // columns)

    def used(count: int) -> float:
        tiles = count * across
        return tiles / (-(-tiles // multiprocessors) * multiprocessors)

    counts = range(1, most // rows + 1)
    best = max(used(count) for count in counts)
    return rows * max(count for count in counts if used(count) >= best - 0.02)


def product(
    a: Tensor, b: Tensor, out: Tensor | None = None, final: torch.dtype = torch.float32
) -> Tensor:
    """a @ b with fp32 accumulators and an fp32 result, whatever the operands.

    final: what the result is rounded to in the end; split.py has the products that need not be in
    float32.
    """
    if split.takes(a, b, final):
        out = a.new_empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out
        split.product(a, b, out, False)
        return out
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def write_product(a: Tensor, b: Tensor, to: Tensor, final: torch.dtype | None = None) -> None:
    """to = a @ b, rounded once to its dtype; final: that, or what `to` is rounded to in the end."""
    # The vendor's library may cut the sums of a small result into parts, and round those.
    if to.dtype == a.dtype == b.dtype and to.numel() >= LARGE_RESULT:
        torch.mm(a, b, out=to)
    elif to.dtype == torch.float32:
        product(a, b, to, final or to.dtype)
    else:
        # A block at a time: dweight is as large as the head.
        for block, part in zip(to.split(BLOCK_ROWS), a.split(BLOCK_ROWS), strict=True):
            block.copy_(product(part, b, None, final or to.dtype))


def summed_dtype(weight: Tensor) -> torch.dtype:
    """What dweight is written in: float16 has no room for a sum that is still scaled up."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def add_product_(total: Tensor, a: Tensor, b: Tensor, final: torch.dtype = torch.float32) -> None:
    """total += a @ b, in fp32; final: what the total is rounded to in the end."""
    if split.takes(a, b, final):
        split.product(a, b, total, True)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def bwd(
    dlogprobs: Tensor,  # [N] fp32
    dentropy: Tensor,  # [N] fp32
    hidden: Tensor,  # [N, H], the dtype of weight, or one is float32 and the other bfloat16
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,  # [N] fp64
    entropy: Tensor,  # [N] fp32
    needs: tuple[bool, bool, bool],  # dhidden, dweight, dbias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden [N, H] fp32, dweight [V, H] in summed_dtype of weight, dbias [V] fp32."""
    N, V = len(hidden), len(weight)
    of_draw = torch.promote_types(hidden.dtype, weight.dtype)
    columns = block_columns(N, bytes_per_logit(of_draw.itemsize), chunk_bytes)
    raw = logits_room(N, min(columns, V), torch.float32, hidden.device)

    def draw_of(v0: int, v1: int) -> Tensor:
        return logits_gradient(
            (dlogprobs, dentropy),
            product(hidden, weight[v0:v1].T, raw[:, : v1 - v0]),
            (None if bias is None else bias[v0:v1], labels, temperature, scale, softcap, rounding),
            (ignore_index, lse, entropy),
            of_draw,
            v0,
        )

    return by_blocks(draw_of, columns, hidden, weight, needs)


def block_columns(tokens: int, per_logit: int, chunk_bytes: int) -> int:
    """Vocabulary entries of a block for all tokens: as many as fit into chunk_bytes, or 128."""
    return max(128, chunk_bytes // (max(tokens, 1) * per_logit) // 128 * 128)


def by_blocks(
    draw_of: Callable[[int, int], Tensor],  # the gradient of the raw logits of some entries
    columns: int,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    needs: tuple[bool, bool, bool],  # dhidden, dweight, dbias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden [N, H] fp32, dweight [V, H] in summed_dtype of weight, dbias [V] fp32.

    Blocks of the vocabulary for all tokens: a row of dweight is one product, rounded once.
    """
    (N, H), V = hidden.shape, weight.shape[0]
    dhidden = hidden.new_zeros(N, H, dtype=torch.float32) if needs[0] else None
    dweight = hidden.new_empty(V, H, dtype=summed_dtype(weight)) if needs[1] else None
    dbias = hidden.new_empty(V, dtype=torch.float32) if needs[2] else None
    for v0 in range(0, V, columns):
        v1 = min(v0 + columns, V)
        draw = draw_of(v0, v1)
        if needs[0]:
            add_product_(dhidden, draw, weight[v0:v1], hidden.dtype)
        if needs[1]:
            write_product(draw.T, hidden, dweight[v0:v1], weight.dtype)
        if needs[2]:
            torch.sum(draw, 0, dtype=torch.float32, out=dbias[v0:v1])
    return dhidden, dweight, dbias


def logits_gradient(
    upstream: tuple[Tensor, Tensor],
    raw: Tensor,  # [N, columns] fp32, overwritten where the result is fp32
    transform: tuple[Tensor | None, Tensor, Tensor, float, float, int],
    known: tuple[int, Tensor, Tensor],
    dtype: torch.dtype,
    first_column: int = 0,
) -> Tensor:
    """The gradient of raw logits, in the dtype that the products take."""
    draw = raw if dtype == torch.float32 else logits_room(*raw.shape, dtype, raw.device)
    logprobs.bwd(*upstream, raw, *transform, *known, draw, first_column)
    return draw


def chunk_bwd(
    upstream: tuple[Tensor, Tensor],
    raw: Tensor,  # [N, V] fp32, consumed
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    transform: tuple[Tensor | None, Tensor, Tensor, float, float, int],
    known: tuple[int, Tensor, Tensor],
    dweight: Tensor | None,  # [V, H] or its last columns, written or added to
    dbias: Tensor | None,  # [V], written or added to
    accumulate: bool,
    final: torch.dtype,  # what dhidden is rounded to in the end
) -> Tensor:  # [N, H] fp32
    """dhidden of a chunk of tokens; its share of dweight and dbias."""
    of_draw = torch.promote_types(hidden.dtype, weight.dtype)
    draw = logits_gradient(upstream, raw, transform, known, of_draw)
    return products(draw, hidden, weight, dweight, dbias, accumulate, final)


def beside(dweight: Tensor, hidden: Tensor) -> Tensor:
    """The columns of hidden [N, H] whose product dweight is: the last ones, perhaps all."""
    return hidden[:, hidden.shape[1] - dweight.shape[1] :]


def products(
    draw: Tensor,  # [N, V]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    dweight: Tensor | None,  # [V, H] or its last columns, written or added to
    dbias: Tensor | None,  # [V], written or added to
    accumulate: bool,
    final: torch.dtype,  # what dhidden is rounded to in the end
) -> Tensor:  # [N, H] fp32
    """dhidden from the gradient of a chunk's raw logits; its share of dweight and dbias."""
    if dweight is not None and accumulate:
        add_product_(dweight, draw.T, beside(dweight, hidden), weight.dtype)
    elif dweight is not None:
        write_product(draw.T, beside(dweight, hidden), dweight, weight.dtype)
    if dbias is not None:
        share = torch.sum(draw, 0, dtype=torch.float32)
        dbias.copy_(dbias + share if accumulate else share)
    return product(draw, weight, None, final)
