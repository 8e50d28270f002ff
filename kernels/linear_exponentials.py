"""Exponentials of a chunk's logits, in half the room of logits, and their statistics.

    E[n, v] = 2^(z2[n, v] - r[n])       z2 = z log2(e), in bfloat16; z as in logprobs.py
    s[n]    = sum_v E[n, v], in fp32, so that p = E / s

One reference r per row, and not one per tile, because bfloat16 has the exponents of fp32: what is
left to do before the products of the gradients is one entry of each row. r is the larger of the
label's logit and the largest of a first block of the vocabulary: real logits of the row, so that
s >= 1. A tile of tokens in which the largest logit proves further than FAR from r is formed again,
with the largest for r: then every row is within 2^FAR of it, and neither s nor 1 / s is near the
ends of fp32. Nothing of that waits for the host.

Traffic: reads NH and VH, writes NV numbers of two bytes. exponentials_gradients.py reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper, logprobs
from .configs import Config, Device
from .linear_logprobs import blocks, descriptors, parts, raw_tile, unit

# log2 of how far above r a logit may be: 2^FAR V is far from the end of fp32, and so is its inverse
# times a small gradient.
FAR = tl.constexpr(32.0)
REFERENCE_TILE = (32, 64, 64)  # tokens, entries of the vocabulary, of H


@triton.jit
def _reference_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    reference_ptr,  # (N,) fp32, written
    N,
    V,
    H,
    scale,
    softcap,
    hidden_row_stride,
    weight_row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=-1)
    known = (labels >= 0) & (labels < V)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    cols, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    raw = raw_tile(
        hidden_ptr, weight_ptr, first_row, 0, N, V, H, hidden_row_stride, weight_row_stride,
        False, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at_label = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        here = (ks + k0)[None, :]
        k_mask = here < H
        a_ptrs = hidden_ptr + rows[:, None] * hidden_row_stride + here
        a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask, other=0.0)
        w_ptrs = weight_ptr + labels[:, None] * weight_row_stride + here
        w = tl.load(w_ptrs, mask=known[:, None] & k_mask, other=0.0)
        at_label += tl.sum(a.to(tl.float32) * w.to(tl.float32), axis=1)
    bias = 0.0
    label_bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        label_bias = tl.load(bias_ptr + labels, mask=known, other=0.0).to(tl.float32)
    per_token = inv_temperature[:, None]
    z = logprobs.in_units(raw, bias, scale, softcap, per_token, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
    z = tl.where((cols < V)[None, :], z, float("-inf"))
    label = logprobs.in_units(
        at_label, label_bias, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP, ROUNDING
    )
    largest = tl.maximum(tl.max(z, axis=1), tl.where(known, label, float("-inf")))
    # Neither an infinity nor NaN is a place to count from.
    reference = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    tl.store(reference_ptr + rows, reference, mask=row_mask)


@triton.jit
def _linear_exponentials_kernel(
    hidden,  # (N, H): pointer, or descriptor of (BLOCK_M, BLOCK_K)
    weight,  # (V, H): pointer, or descriptor of (BLOCK_N, BLOCK_K)
    exponentials,  # (N, V) bf16, written: pointer, or descriptor of (BLOCK_M, BLOCK_N)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    reference_ptr,  # (N,) fp32
    again_ptr,  # (tiles,) int32: the tiles of tokens that are to be formed, if AGAIN
    partial_ptr,  # (splits, 4, N) fp32, written: largest z, s, t = sum E log2 E, z of the label
    N,
    V,
    H,
    columns_per_split,
    scale,
    softcap,
    hidden_row_stride,
    weight_row_stride,
    row_stride,
    AGAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    first_row = tile * BLOCK_M
    split = (tl.program_id(0) // tiles).to(tl.int64)
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=-1)
    labels = tl.where((labels >= 0) & (labels < V), labels, -1).to(tl.int32)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    reference = tl.load(reference_ptr + rows, mask=row_mask, other=0.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s_i = tl.zeros((BLOCK_M,), tl.float32)
    t_i = tl.zeros((BLOCK_M,), tl.float32)
    at_label = tl.zeros((BLOCK_M,), tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    begin = (split * columns_per_split).to(tl.int32)
    end = tl.minimum(begin + columns_per_split, V)
    written = row_mask
    if AGAIN:
        # Where nothing is wanted there is nothing to do.
        wanted = tl.load(again_ptr + tile) != 0
        end = tl.where(wanted, end, begin)
        written = rows < tl.where(wanted, N, 0)
    for v0 in range(begin, end, BLOCK_N):
        cols = v0 + offsets
        z = raw_tile(
            hidden, weight, first_row, v0, N, end, H, hidden_row_stride, weight_row_stride,
            TMA, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < end, other=0.0).to(tl.float32)[None, :]
        per_token = inv_temperature[:, None]
        z = logprobs.in_units(z, bias, scale, softcap, per_token, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
        if v0 + BLOCK_N > end:
            z = tl.where((cols < end)[None, :], z, float("-inf"))
        m_i = tl.maximum(m_i, tl.max(z, axis=1))
        here = labels - v0
        if tl.max(((here >= 0) & (here < BLOCK_N)).to(tl.int32)) > 0:
            at_label += tl.sum(tl.where(offsets[None, :] == here[:, None], z, 0.0), axis=1)
        d = logprobs.log2_ratio(z, reference[:, None], not HAS_BIAS)
        e = tl.exp2(d)
        s_i += tl.sum(e, axis=1)
        t_i += tl.sum(e * d, axis=1)
        if TMA:
            exponentials.store([first_row, v0], e.to(tl.bfloat16))
        else:
            out = exponentials + rows[:, None] * row_stride + cols[None, :]
            tl.store(out, e.to(tl.bfloat16), mask=row_mask[:, None] & (cols < end)[None, :])
    out = partial_ptr + split * 4 * N + rows
    tl.store(out + 0 * N, m_i, mask=written)
    tl.store(out + 1 * N, s_i, mask=written)
    tl.store(out + 2 * N, t_i, mask=written)
    tl.store(out + 3 * N, at_label, mask=written)


@triton.jit
def _again_kernel(
    partial_ptr,  # (splits, 4, N) fp32
    reference_ptr,  # (N,) fp32, replaced where a tile is to be formed again
    again_ptr,  # (tiles,) int32, written
    N,
    splits,
    IN_LOG2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < N
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    part = partial_ptr + rows
    for _ in range(splits):
        largest = tl.maximum(largest, tl.load(part, mask=mask, other=float("-inf")))
        part += tl.full((), 4, tl.int64) * N
    reference = tl.load(reference_ptr + rows, mask=mask, other=0.0)
    finite = tl.abs(largest) < float("inf")
    above = logprobs.log2_ratio(largest, reference, IN_LOG2)
    again = tl.max((mask & finite & (tl.abs(above) > FAR)).to(tl.int32), axis=0)
    tl.store(again_ptr + tile, again)
    tl.store(reference_ptr + rows, tl.where((again > 0) & finite, largest, reference), mask=mask)


@triton.jit
def _sums_kernel(
    partial_ptr,  # (splits, 4, N) fp32
    labels_ptr,  # (N,) int64
    reference_ptr,  # (N,) fp32
    logprobs_ptr,  # (N,) fp32, written
    entropy_ptr,  # (N,) fp32, written
    lse_ptr,  # (N,) fp64, written
    top_ptr,  # (N,) fp32, written
    s_ptr,  # (N,) fp32, written
    N,
    V,
    splits,
    unit: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    among = tl.arange(0, BLOCK_S)
    of_part = tl.full((), 4, tl.int64) * N
    first = partial_ptr + among[:, None] * of_part + rows[None, :]
    m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s_i = tl.zeros((BLOCK_N,), tl.float64)
    t_i = tl.zeros((BLOCK_N,), tl.float64)
    label_logit = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(0, splits, BLOCK_S):
        there = (among < splits - i)[:, None] & mask[None, :]
        part = first + i * of_part
        m_i = tl.maximum(m_i, tl.max(tl.load(part, mask=there, other=float("-inf")), axis=0))
        s_i += tl.sum(tl.load(part + N, mask=there, other=0.0).to(tl.float64), axis=0)
        t_i += tl.sum(tl.load(part + 2 * N, mask=there, other=0.0).to(tl.float64), axis=0)
        label_logit += tl.sum(tl.load(part + 3 * N, mask=there, other=0.0), axis=0)
    s_i = tl.where(mask, s_i, 1.0)
    reference = tl.load(reference_ptr + rows, mask=mask, other=0.0)
    nan = float("nan")
    empty = m_i == float("-inf")
    nothing = empty & (s_i == s_i)
    log_s = tl.where(nothing, nan, tl.log(s_i))
    lse = tl.where(nothing, m_i.to(tl.float64), reference.to(tl.float64) * unit + log_s)
    entropy = log_s - t_i * logprobs.LOG_2 / s_i
    logprob = (label_logit - reference).to(tl.float64) * unit - log_s
    # The same arithmetic: equal to logprob where the label has the largest logit.
    top = (m_i - reference).to(tl.float64) * unit - log_s
    label = tl.load(labels_ptr + rows, mask=mask, other=0)
    logprob = tl.where((label >= 0) & (label < V), logprob, nan)
    tl.store(logprobs_ptr + rows, logprob.to(tl.float32), mask=mask)
    tl.store(entropy_ptr + rows, entropy.to(tl.float32), mask=mask)
    tl.store(lse_ptr + rows, lse, mask=mask)
    tl.store(top_ptr + rows, top.to(tl.float32), mask=mask)
    tl.store(s_ptr + rows, tl.where(empty, nan, s_i).to(tl.float32), mask=mask)


def fwd(
    hidden: Tensor,  # [N, H] bf16, contiguous
    weight: Tensor,  # [V, H] bf16, columns contiguous
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    device: Device,
    config: Config,
    e: Tensor,  # [N, V] bf16, written; its rows `row_stride` apart
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """logprobs, entropy [N] fp32, lse [N] fp64, top [N] fp32; and s [N] fp32."""
    head = (hidden, weight, bias, labels, temperature, scale, softcap, rounding)
    N, V = len(hidden), len(weight)
    reference = temperature.new_empty(N)
    if N == 0:
        partial = temperature.new_empty(1, 4, 0)
    else:
        _refer(head, reference, device)
        partial, form = _formed_by(head, e, reference, device, config)
        form(None)
        form(_again(partial, reference, config, bias))
    return _statistics(partial, labels, reference, V, unit(bias))


def _refer(head: tuple, reference: Tensor, device: Device) -> None:
    hidden, weight, bias, labels, temperature, scale, softcap, rounding = head
    rows, columns, step = REFERENCE_TILE
    _reference_kernel[(triton.cdiv(len(hidden), rows),)](
        hidden,
        weight,
        hidden if bias is None else bias,
        labels,
        temperature,
        reference,
        *hidden.shape[:1],
        *weight.shape,
        scale,
        softcap,
        hidden.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        ROUNDING=rounding,
        UPCAST=device.interpreted,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=step,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _again(partial: Tensor, reference: Tensor, config: Config, bias: Tensor | None) -> Tensor:
    """[tiles] int32: the tiles of tokens that are to be formed again, from another reference."""
    splits, _, N = partial.shape
    tiles = triton.cdiv(N, config.block_m)
    again = torch.empty(tiles, dtype=torch.int32, device=partial.device)
    _again_kernel[(tiles,)](
        partial,
        reference,
        again,
        N,
        splits,
        IN_LOG2=bias is None,
        BLOCK_M=config.block_m,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return again


def _formed_by(
    head: tuple, e: Tensor, reference: Tensor, device: Device, config: Config
) -> tuple[Tensor, Callable[[Tensor | None], None]]:
    """Room for the parts, and what writes them and E: all of it, or the tiles that it is given."""
    if config.gluon:
        partial = hopper.parts_of(head, device, config)

        def form(again: Tensor | None) -> None:
            stored = hopper.Stored(e, reference, again)
            hopper.exponentials(head, stored, partial, device, config)

        return partial, form
    hidden, weight, bias, labels, temperature, scale, softcap, rounding = head
    (N, H), V = hidden.shape, weight.shape[0]
    tiles, splits, per_split = parts(N, V, config, device)
    partial = temperature.new_empty(splits, 4, N)
    operands = (*descriptors(hidden, weight, config), _written(e, config))

    def form(again: Tensor | None) -> None:
        _linear_exponentials_kernel[(tiles * splits,)](
            *operands,
            hidden if bias is None else bias,
            labels,
            temperature,
            reference,
            labels if again is None else again,
            partial,
            N,
            V,
            H,
            per_split,
            scale,
            softcap,
            hidden.stride(0),
            weight.stride(0),
            e.stride(0),
            AGAIN=again is not None,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0.0,
            ROUNDING=rounding,
            **blocks(config, device),
        )

    return partial, form


def _written(e: Tensor, config: Config) -> Tensor | object:
    """E as the kernel takes it."""
    if not config.tma:
        return e
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(e, [config.block_m, config.block_n])


def _statistics(
    partial: Tensor, labels: Tensor, reference: Tensor, V: int, unit: float
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """logprobs, entropy, lse, top, and s, from parts that all count from `reference`."""
    splits, _, N = partial.shape
    values, entropy, top, s = (partial.new_empty(N) for _ in range(4))
    lse = partial.new_empty(N, dtype=torch.float64)
    at_once, rows = logprobs.MERGE_TILE
    if N:
        _sums_kernel[(triton.cdiv(N, rows),)](
            partial, labels, reference, values, entropy, lse, top, s, N, V, splits,
            unit=unit, BLOCK_S=at_once, BLOCK_N=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return (values, entropy, lse, top), s
