"""Statistics and gradients of rows of logits that are in memory.

    z[n, v]     = softcap(scale * rounded(raw[n, v] + bias[v])) / temperature[n]
    lse[n]      = log sum_v exp z[n, v]
    logprobs[n] = z[n, labels[n]] - lse[n]
    entropy[n]  = lse[n] - sum_v p[n, v] z[n, v]
    top[n]      = max_v z[n, v] - lse[n]
    draw        = (dlogprobs (1[label] - p) - dentropy p (log p + entropy))
                  * softcap'(.) * scale / temperature

One program owns one row, or one of `splits` equal parts of it where rows are few; parts are merged
in a fixed order. The columns may be a block of a larger vocabulary, from `first_column` on.
Traffic: statistics read NV; gradients read NV and write NV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2 = 0.6931471805599453
# The same in a kernel, and its inverse.
LOG_2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(1.4426950408889634)
# 2^-160 is 0 in fp32, and times -160 still: where -inf would give NaN.
_LEAST = tl.constexpr(-160.0)
_WITH_NAN = tl.constexpr(tl.PropagateNan.ALL)

BLOCK_V = 4096  # columns at a time: four vectors of 16 bytes for each of 256 threads in float32
NUM_WARPS = 8
MERGE_TILE = (32, 32)  # parts, rows
# Programs per multiprocessor that keep the memory busy.
PROGRAMS_PER_SM = 8


@triton.jit
def rounded(x, ROUNDING: tl.constexpr):
    """To the nearest number of bfloat16 (1) or float16 (2), in fp32."""
    if ROUNDING == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    if ROUNDING == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def transformed(
    raw,
    bias,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A logit from its raw product."""
    # Without one, no sum: the compiler may not drop an addition of 0.
    x = rounded(raw + bias if HAS_BIAS else raw, ROUNDING) * scale
    if HAS_SOFTCAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1): exp may overflow to inf, and the quotient is then 0.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x * inv_temperature


@triton.jit
def added(m_i, s_i, t_i, z):
    """The running softmax after a block z of logits; sums are along the last axis.

    m: the maximum; s = sum exp(z - m); t = sum exp(z - m) (z - m).
    """
    m_new = tl.maximum(m_i, tl.max(z, axis=-1))
    # While every logit is -inf the reference point is 0: -inf - -inf would be NaN.
    at = tl.where(m_new == float("-inf"), 0.0, m_new)
    d = z - tl.expand_dims(at, -1)
    p = tl.exp(d)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i - at)
    factor = tl.where(m_i == float("-inf"), 0.0, tl.exp(shift))
    t_new = factor * (t_i + shift * s_i) + tl.sum(p * tl.where(p > 0.0, d, 0.0), axis=-1)
    s_new = factor * s_i + tl.sum(p, axis=-1)
    return m_new, s_new, t_new


@triton.jit
def log2_factor(scale, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """What `in_log2` multiplies by: all that comes after a softcap, or all there is."""
    if HAS_SOFTCAP:
        return inv_temperature * _LOG2E
    return (scale * _LOG2E) * inv_temperature


@triton.jit
def in_log2(raw, scale, softcap, to_log2, HAS_SOFTCAP: tl.constexpr):
    """A logit times log2(e), from its raw product; to_log2 of `log2_factor`.

    Not for logits with a bias, which may be as large as the dtype holds.
    """
    if HAS_SOFTCAP:
        # As in `transformed`, with exp(2u) = 2^(2 log2(e) u).
        power = tl.exp2(raw * (2.0 * _LOG2E * scale / softcap))
        return softcap * (1.0 - 2.0 / (power + 1.0)) * to_log2
    return raw * to_log2


@triton.jit
def in_units(
    raw,
    bias,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A logit from its raw product: in units of log2, but natural with a bias."""
    if HAS_BIAS:
        return transformed(raw, bias, scale, softcap, inv_temperature, True, HAS_SOFTCAP, ROUNDING)
    to_log2 = log2_factor(scale, inv_temperature, HAS_SOFTCAP)
    return in_log2(rounded(raw, ROUNDING), scale, softcap, to_log2, HAS_SOFTCAP)


@triton.jit
def log2_ratio(z, at, IN_LOG2: tl.constexpr):
    """log2 of exp(z - at), where both are in units of log2 or neither is; 0 stays of it at -inf."""
    d = z - at if IN_LOG2 else (z - at) * _LOG2E
    return tl.maximum(d, _LEAST, propagate_nan=_WITH_NAN)


@triton.jit
def added_by_exp2(m_i, s_i, t_i, z, IN_LOG2: tl.constexpr):
    """`added` with t in units of log2, and z and m in them too if IN_LOG2:

    s = sum 2^d, t = sum 2^d d with d = log2 of exp(z - m).
    """
    m_new = tl.maximum(m_i, tl.max(z, axis=-1))
    at = tl.where(m_new == float("-inf"), 0.0, m_new)
    d = log2_ratio(z, tl.expand_dims(at, -1), IN_LOG2)
    p = tl.exp2(d)
    shift = log2_ratio(m_i, at, IN_LOG2)
    factor = tl.exp2(shift)
    t_new = factor * (t_i + shift * s_i) + tl.sum(p * d, axis=-1)
    s_new = factor * s_i + tl.sum(p, axis=-1)
    return m_new, s_new, t_new


@triton.jit
def split_lse(lse, entropy):
    """lse, fp64, as two fp32: rounded to one it would be a relative error of every p.

    Logits so large that they lie 64 apart or more leave log_sum no place in lse = max + log_sum.
    But then only those that tie with the largest have a probability, so that log_sum is the
    entropy, and lse rounds to the largest.
    """
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    return high, tl.where(tl.abs(high) < 1073741824.0, low, entropy)


@triton.jit
def softmax_gradient(z, lse, entropy, dlogprob, dentropy, is_label):
    """dz of one logit."""
    high, low = split_lse(lse, entropy)
    logp = (z - high) - low
    p = tl.exp(logp)
    surprise = p * tl.where(p > 0.0, logp + entropy, 0.0)
    # A NaN in the row makes p NaN, and p > 0 false: the first term carries it on.
    return tl.where(is_label, dlogprob, 0.0) - dlogprob * p - dentropy * surprise


@triton.jit
def _statistics_kernel(
    logits_ptr,  # (N, V)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    partial_ptr,  # (splits, 4, N) fp32, written
    N,
    V,
    first_column,
    columns_per_split,
    scale,
    softcap,
    row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    label = tl.load(labels_ptr + n) - first_column
    inv_temperature = 1.0 / tl.load(temperature_ptr + n)
    m_i = float("-inf")
    s_i = 0.0
    t_i = 0.0
    at_label = 0.0
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, V)
    for v0 in range(begin, end, BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        mask = cols < end
        raw = tl.load(logits_ptr + n * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        z = transformed(raw, bias, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
        z = tl.where(mask, z, float("-inf"))
        m_i, s_i, t_i = added(m_i, s_i, t_i, z)
        # With the mask: the label may lie in the columns after these.
        at_label += tl.sum(tl.where((cols == label) & mask, z, 0.0), axis=-1)
    out = partial_ptr + split * 4 * N + n
    tl.store(out + 0 * N, m_i)
    tl.store(out + 1 * N, s_i)
    tl.store(out + 2 * N, t_i)
    tl.store(out + 3 * N, at_label)


@triton.jit
def _merge_kernel(
    partial_ptr,  # (splits, 4, N) fp32
    labels_ptr,  # (N,) int64
    logprobs_ptr,  # (N,) fp32, written
    entropy_ptr,  # (N,) fp32, written
    lse_ptr,  # (N,) fp64, written
    top_ptr,  # (N,) fp32, written
    N,
    V,
    splits,
    ignore_index,
    unit: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    parts = tl.arange(0, BLOCK_S)
    # [BLOCK_S, BLOCK_N]: the same number of each part, and of each row.
    of_part = tl.full((), 4, tl.int64) * N
    first = partial_ptr + parts[:, None] * of_part + rows[None, :]
    m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for i in range(0, splits, BLOCK_S):
        there = (parts < splits - i)[:, None] & mask[None, :]
        m = tl.load(first + i * of_part, mask=there, other=float("-inf"))
        m_i = tl.maximum(m_i, tl.max(m, axis=0))
    empty = m_i == float("-inf")
    at = tl.where(empty, 0.0, m_i)
    s_i = tl.zeros((BLOCK_N,), tl.float64)
    t_i = tl.zeros((BLOCK_N,), tl.float64)
    label_logit = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(0, splits, BLOCK_S):
        there = (parts < splits - i)[:, None] & mask[None, :]
        part = first + i * of_part
        m = tl.load(part, mask=there, other=float("-inf"))
        s = tl.load(part + 1 * N, mask=there, other=0.0)
        t = tl.load(part + 2 * N, mask=there, other=0.0)
        shift = tl.where(m == float("-inf"), 0.0, m - at[None, :])
        factor = tl.where(m == float("-inf"), 0.0, tl.exp(shift * unit))
        # A part of NaN alone has maximum -inf and a NaN sum, which must not be lost.
        s_i += tl.sum(tl.where(s == s, factor * s, s).to(tl.float64), axis=0)
        t_i += tl.sum((factor * (t + shift * s)).to(tl.float64), axis=0)
        label_logit += tl.sum(tl.load(part + 3 * N, mask=there, other=0.0), axis=0)
    # A row beyond the last has no parts.
    s_i = tl.where(mask, s_i, 1.0)
    nan = float("nan")
    log_s = tl.log(s_i)
    entropy = tl.where(empty, nan, (log_s - t_i * unit / s_i).to(tl.float32))
    logprob = ((label_logit - m_i).to(tl.float64) * unit - log_s).to(tl.float32)
    # The same rounding: equal to logprob where the label has the largest logit.
    top = tl.where(empty, nan, (0.0 - log_s).to(tl.float32))
    label = tl.load(labels_ptr + rows, mask=mask, other=0)
    # A label outside the vocabulary is a mistake of the caller: NaN for that token, never a number.
    logprob = tl.where((label >= 0) & (label < V), logprob, nan)
    ignored = label == ignore_index
    tl.store(logprobs_ptr + rows, tl.where(ignored, 0.0, logprob), mask=mask)
    tl.store(entropy_ptr + rows, tl.where(ignored, 0.0, entropy), mask=mask)
    tl.store(lse_ptr + rows, tl.where(ignored, 0.0, m_i.to(tl.float64) * unit + log_s), mask=mask)
    tl.store(top_ptr + rows, tl.where(ignored, 0.0, top), mask=mask)


@triton.jit
def _gradient_kernel(
    logits_ptr,  # (N, V)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp64
    entropy_ptr,  # (N,) fp32
    dlogprobs_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32
    draw_ptr,  # (N, V), written; may be logits
    V,
    first_column,
    ignore_index,
    scale,
    softcap,
    row_stride,
    draw_row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    inv_temperature = 1.0 / tl.load(temperature_ptr + n)
    lse = tl.load(lse_ptr + n)
    entropy = tl.load(entropy_ptr + n)
    dlogprob = tl.load(dlogprobs_ptr + n)
    dentropy = tl.load(dentropy_ptr + n)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    raw = tl.load(logits_ptr + n * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    z = transformed(raw, bias, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
    is_label = cols + first_column == label
    dz = softmax_gradient(z, lse, entropy, dlogprob, dentropy, is_label)
    if HAS_SOFTCAP:
        # d softcap(x) / dx = 1 - tanh(x / c)^2, and tanh(x / c) = z temperature / c.
        t = z / (inv_temperature * softcap)
        dz = dz * (1.0 - t * t)
    # A row without upstream gradient is 0 whatever its logits hold.
    idle = (label == ignore_index) | ((dlogprob == 0.0) & (dentropy == 0.0))
    draw = tl.where(idle, 0.0, dz * (scale * inv_temperature))
    out = draw_ptr + n * draw_row_stride + cols
    tl.store(out, draw.to(draw_ptr.dtype.element_ty), mask=mask)


def splits_for(rows: int, columns: int, multiprocessors: int) -> int:
    """Parts that each row is read in, so that few rows still occupy the whole device."""
    blocks = triton.cdiv(columns, BLOCK_V)
    wanted = triton.cdiv(multiprocessors * PROGRAMS_PER_SM, max(rows, 1))
    return max(1, min(wanted, blocks))


def partial_statistics(
    logits: Tensor,  # [N, V], rows contiguous
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    partial: Tensor,  # [splits, 4, N] fp32, written
    scale: float = 1.0,
    softcap: float = 0.0,
    rounding: int = 0,
    first_column: int = 0,
) -> None:
    """Each part's maximum, sums and label logit. Labels outside the columns leave 0."""
    N, V = logits.shape
    splits = partial.shape[0]
    per_split = triton.cdiv(triton.cdiv(V, BLOCK_V), splits) * BLOCK_V
    if N == 0:
        return
    _statistics_kernel[(N, splits)](
        logits,
        logits if bias is None else bias,
        labels,
        temperature,
        partial,
        N,
        V,
        first_column,
        per_split,
        scale,
        softcap,
        logits.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        ROUNDING=rounding,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def merge(
    partial: Tensor,  # [splits, 4, N] fp32
    labels: Tensor,  # [N] int64
    V: int,
    ignore_index: int,
    unit: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse (fp64), top [N] of the rows whose parts are in `partial`, whose
    logits are in multiples of `unit`.
    """
    splits, _, N = partial.shape
    logprobs, entropy, top = (partial.new_empty(N) for _ in range(3))
    lse = partial.new_empty(N, dtype=torch.float64)
    at_once, rows = MERGE_TILE
    if N:
        _merge_kernel[(triton.cdiv(N, rows),)](
            partial,
            labels,
            logprobs,
            entropy,
            lse,
            top,
            N,
            V,
            splits,
            ignore_index,
            unit=unit,
            BLOCK_S=at_once,
            BLOCK_N=rows,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return logprobs, entropy, lse, top


def fwd(
    logits: Tensor,  # [N, V]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    ignore_index: int,
    multiprocessors: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy [N] fp32, lse [N] fp64, top [N] fp32."""
    N, V = logits.shape
    splits = splits_for(N, V, multiprocessors)
    partial = torch.empty(splits, 4, N, dtype=torch.float32, device=logits.device)
    partial_statistics(logits, bias, labels, temperature, partial, scale, softcap, rounding)
    return merge(partial, labels, V, ignore_index)


def bwd(
    dlogprobs: Tensor,  # [N] fp32
    dentropy: Tensor,  # [N] fp32
    logits: Tensor,  # [N, V], rows contiguous
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    ignore_index: int,
    lse: Tensor,  # [N] fp64
    entropy: Tensor,  # [N] fp32
    draw: Tensor,  # [N, V], rows contiguous, written; may be logits
    first_column: int = 0,
) -> None:
    """The gradient of the raw logits, rounded once, to the dtype of draw."""
    N, V = logits.shape
    if N == 0:
        return
    _gradient_kernel[(N, triton.cdiv(V, BLOCK_V))](
        logits,
        logits if bias is None else bias,
        labels,
        temperature,
        lse,
        entropy,
        dlogprobs,
        dentropy,
        draw,
        V,
        first_column,
        ignore_index,
        scale,
        softcap,
        logits.stride(0),
        draw.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        ROUNDING=rounding,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
