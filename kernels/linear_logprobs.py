"""Log-probability and entropy of each token from hidden states and the head: the forward pass.

    raw[n, v] = hidden[n] . weight[v]; the rest as in logprobs.py

Two ways. `fused_statistics` never writes a logit: a program owns a tile of tokens and one of
`splits` parts of the vocabulary, multiplies tile by tile with fp32 accumulators in registers, and
keeps the running softmax of its tokens in units of log2: one instruction less for each
exponential. Traffic: reads NH and VH (from L2 for all but the first of the programs that share a
part), writes 4 N splits. `tiled_statistics` lets the vendor's library write tiles of fp32 logits
that stay in L2, and reads them there. Parts merge in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper, logprobs
from .configs import Config, Device, chosen
from .linear_gradients import product

# Logits in a tile of `tiled_statistics`, and tokens at most: 64 MiB in fp32, of which an L2 of
# 50 MB holds most; smaller ones take more launches than that saves.
TILE_LOGITS, TILE_ROWS = 2**24, 2048


@triton.jit
def raw_tile(
    hidden,
    weight,
    first_row,
    v0,
    N,
    end,
    H,
    hidden_row_stride,
    weight_row_stride,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden . weight of BLOCK_M tokens and BLOCK_N entries of the vocabulary, in fp32."""
    raw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not TMA:
        rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = v0 + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        row_mask, col_mask = rows < N, cols < end
        a_ptrs = hidden + rows[:, None] * hidden_row_stride + ks[None, :]
        b_ptrs = weight + cols[:, None].to(tl.int64) * weight_row_stride + ks[None, :]
    for k0 in range(0, H, BLOCK_K):
        if TMA:
            a = hidden.load([first_row, k0])
            b = weight.load([v0, k0])
        else:
            k_mask = ks[None, :] < H - k0
            a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask, other=0.0)
            b = tl.load(b_ptrs, mask=col_mask[:, None] & k_mask, other=0.0)
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        raw = tl.dot(a, b.T, raw, input_precision="ieee")
    return raw


@triton.jit
def _linear_statistics_kernel(
    hidden,  # (N, H): pointer, or descriptor of (BLOCK_M, BLOCK_K)
    weight,  # (V, H): pointer, or descriptor of (BLOCK_N, BLOCK_K)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    partial_ptr,  # (splits, 4, N) fp32, written
    N,
    V,
    H,
    columns_per_split,
    scale,
    softcap,
    hidden_row_stride,
    weight_row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbours share a part of the vocabulary, so that a tile of weight is read once into L2.
    tiles = tl.cdiv(N, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    split = (tl.program_id(0) // tiles).to(tl.int64)
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=-1)
    # In int32, and -1 for those that no int32 holds: they are in no tile.
    labels = tl.where((labels >= 0) & (labels < V), labels, -1).to(tl.int32)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s_i = tl.zeros((BLOCK_M,), tl.float32)
    t_i = tl.zeros((BLOCK_M,), tl.float32)
    at_label = tl.zeros((BLOCK_M,), tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    begin = (split * columns_per_split).to(tl.int32)
    end = tl.minimum(begin + columns_per_split, V)
    for v0 in range(begin, end, BLOCK_N):
        cols = v0 + offsets
        col_mask = cols < end
        z = raw_tile(
            hidden, weight, first_row, v0, N, end, H, hidden_row_stride, weight_row_stride,
            TMA, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0) if HAS_BIAS else 0.0
        if HAS_BIAS:
            bias = bias.to(tl.float32)[None, :]
        per_token = inv_temperature[:, None]
        z = logprobs.in_units(z, bias, scale, softcap, per_token, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
        if v0 + BLOCK_N > end:
            z = tl.where(col_mask[None, :], z, float("-inf"))
        m_i, s_i, t_i = logprobs.added_by_exp2(m_i, s_i, t_i, z, not HAS_BIAS)
        here = labels - v0
        if tl.max(((here >= 0) & (here < BLOCK_N)).to(tl.int32)) > 0:
            at_label += tl.sum(tl.where(offsets[None, :] == here[:, None], z, 0.0), axis=1)
    if HAS_BIAS:
        t_i *= logprobs.LOG_2
    out = partial_ptr + split * 4 * N + rows
    tl.store(out + 0 * N, m_i, mask=row_mask)
    tl.store(out + 1 * N, s_i, mask=row_mask)
    tl.store(out + 2 * N, t_i, mask=row_mask)
    tl.store(out + 3 * N, at_label, mask=row_mask)


def descriptors(
    hidden: Tensor, weight: Tensor, config: Config
) -> tuple[Tensor, Tensor] | tuple[object, object]:
    """The operands as the kernel takes them."""
    if not config.tma:
        return hidden, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def parts(tokens: int, V: int, config: Config, device: Device) -> tuple[int, int, int]:
    """Tiles of tokens, splits of the vocabulary, and columns of a split."""
    tiles = triton.cdiv(tokens, config.block_m)
    # Two programs for each multiprocessor even out the ends of the parts.
    splits = max(1, min(2 * device.multiprocessors // tiles, triton.cdiv(V, config.block_n)))
    per_split = triton.cdiv(triton.cdiv(V, config.block_n), splits) * config.block_n
    return tiles, triton.cdiv(V, per_split), per_split


def blocks(config: Config, device: Device) -> dict[str, object]:
    """What the kernels are compiled for."""
    return {
        "TMA": config.tma,
        "UPCAST": device.interpreted,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def unit(bias: Tensor | None) -> float:
    """Of what `fused_statistics` writes: log2 but for a bias, which may be near the largest number
    there is, so that its multiple by log2(e) would be infinite.
    """
    return logprobs.LN2 if bias is None else 1.0


def fused_statistics(
    hidden: Tensor,  # [N, H], columns contiguous, the dtype of weight
    weight: Tensor,  # [V, H], columns contiguous
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    device: Device,
    config: Config,
) -> Tensor:  # [splits, 4, N] fp32, in multiples of unit(bias)
    """Parts of the running softmax, from logits that stay in registers."""
    if config.gluon:
        call = (hidden, weight, bias, labels, temperature, scale, softcap, rounding)
        return hopper.statistics(*call, device, config)
    (N, H), V = hidden.shape, weight.shape[0]
    tiles, splits, per_split = parts(N, V, config, device)
    partial = torch.empty(splits, 4, N, dtype=torch.float32, device=hidden.device)
    _linear_statistics_kernel[(tiles * splits,)](
        *descriptors(hidden, weight, config),
        hidden if bias is None else bias,
        labels,
        temperature,
        partial,
        N,
        V,
        H,
        per_split,
        scale,
        softcap,
        hidden.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        ROUNDING=rounding,
        **blocks(config, device),
    )
    return partial


def tile_sides(tokens: int) -> tuple[int, int]:
    """Tokens and columns of a tile of logits: even tiles of tokens, as many columns as fit.

    Columns are whole blocks of the row kernel, so that none of its lanes is idle.
    """
    rows = triton.cdiv(tokens, triton.cdiv(tokens, TILE_ROWS))
    block = logprobs.BLOCK_V
    return rows, max(1, TILE_LOGITS // (rows * block)) * block


def tiled_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    rounding: int,
) -> Tensor:  # [tiles, 4, N] fp32
    """The same, from the vendor's products: tiles of fp32 logits small enough to stay in L2."""
    N, V = hidden.shape[0], weight.shape[0]
    count = triton.cdiv(V, tile_sides(N)[1])
    partial = torch.empty(count, 4, N, dtype=torch.float32, device=hidden.device)
    for rows, tiles in tiles_of(hidden, weight):
        tokens = (labels[rows], temperature[rows])
        # A contiguous workspace for these rows; copied where the rows are not all there are.
        some = len(tokens[0]) < N
        here = partial.new_empty(count, 4, len(tokens[0])) if some else partial
        for i, (v0, columns, raw) in enumerate(tiles):
            of_bias = None if bias is None else bias[columns]
            to = here[i : i + 1]
            logprobs.partial_statistics(raw, of_bias, *tokens, to, scale, softcap, rounding, v0)
        if some:
            partial[:, :, rows] = here
    return partial


def tiles_of(
    hidden: Tensor, weight: Tensor
) -> Iterator[tuple[slice, Iterator[tuple[int, slice, Tensor]]]]:
    """For some tokens after others, for some columns after others: (first column, columns, raw).

    raw: the products [tokens, columns] in fp32, until the next are formed in their place.
    """
    N, V = hidden.shape[0], weight.shape[0]
    rows, columns = tile_sides(N)
    room = torch.empty(rows * min(columns, V), dtype=torch.float32, device=hidden.device)

    def formed(of: slice) -> Iterator[tuple[int, slice, Tensor]]:
        states = hidden[of]
        for v0 in range(0, V, columns):
            part = weight[v0 : v0 + columns]
            raw = room[: len(states) * len(part)].view(len(states), len(part))
            yield v0, slice(v0, v0 + columns), product(states, part.T, raw)

    for n0 in range(0, N, rows):
        yield slice(n0, n0 + rows), formed(slice(n0, n0 + rows))


def fwd(
    hidden: Tensor,  # [N, H], the dtype of weight, or one is float32 and the other bfloat16
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    ignore_index: int,
    device: Device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy [N] fp32, lse [N] fp64, top [N] fp32; nothing of size V is kept."""
    if len(labels) == 0:
        empty = temperature.new_empty(0)
        return empty, empty.clone(), empty.double(), empty.clone()
    args = (hidden.contiguous(), weight, bias, labels, temperature, scale, softcap, rounding)
    config = chosen(args, device)
    if config is None:
        return logprobs.merge(tiled_statistics(*args), labels, len(weight), ignore_index)
    partial = fused_statistics(*args, device, config)
    return logprobs.merge(partial, labels, len(weight), ignore_index, unit(bias))
