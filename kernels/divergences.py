"""Divergences of rows of logits by two heads, and their gradients.

    z, z'       = the logits of the student and of the teacher, as logprobs.py has them
    s, t        = exp(z - lse), exp(z' - lse')
    d           = log s - log t = (z - z') - (lse - lse')
    g, g'       = the slopes dc/d log s and dc/d log t of the terms c = g + g'
    divergence  = sum_v c
    draw        = (ddivergence (g - s sum_u g) + the gradients of log-prob and entropy)
                  * softcap'(.) * scale / temperature

Distributions may be near each other: logits are subtracted first, s - t is formed by expm1, and
both slopes of an entry are added before anything else is. The same gradient, with the two sides
exchanged, is the teacher's. One program owns one row, or one of its parts; the columns may be a
block of a larger vocabulary for a gradient. Traffic: sums read 2NV; gradients read 2NV, write NV.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .kl import expm1_plus
from .logprobs import softmax_gradient, split_lse, splits_for, transformed

# The kinds, as reference.py numbers them.
_REVERSE = tl.constexpr(1)
_FORWARD = tl.constexpr(2)
_JSD = tl.constexpr(3)
_ALPHA = tl.constexpr(4)
# Nats that an infinite log-ratio is taken for, and that exponents of log-ratios are held at.
_INFINITE = tl.constexpr(100.0)
_EXPONENT = tl.constexpr(80.0)
# From here on lse = max + log_sum has no room for log_sum in fp64, or logits none in fp32.
_HUGE = tl.constexpr(1073741824.0)
_INF = tl.constexpr(float("inf"))

BLOCK_V = 2048  # columns at a time
NUM_WARPS = 8


class Side(NamedTuple):
    """What one head's rows of logits are made of, and what is known of them."""

    logits: Tensor  # [N, V] raw, rows contiguous
    bias: Tensor | None  # [V]
    temperature: Tensor  # [N] fp32
    scale: float
    softcap: float
    rounding: int
    lse: Tensor  # [N] fp64
    entropy: Tensor  # [N] fp32


@triton.jit
def expm1(x):
    """In fp32: the series to x^6 below 1/4, where the next term is under the rounding."""
    em1, _ = expm1_plus(x, 4)
    return em1


@triton.jit
def log1p(x):
    """2 atanh(x / (2 + x)) below 1/4, by its series to the seventh power."""
    w = x / (2.0 + x)
    w2 = w * w
    series = 1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7)))
    return tl.where(tl.abs(x) < 0.25, 2.0 * w * series, tl.log(1.0 + x))


@triton.jit
def slopes(s, t, d, delta, KIND: tl.constexpr, parameter):
    """dc / d log s and dc / d log t of the terms c of a divergence; d is finite."""
    if KIND == _REVERSE:
        g, of_teacher = s * d, 0.0 - delta
    elif KIND == _FORWARD:
        g, of_teacher = delta, 0.0 - t * d
    elif KIND == _JSD:
        # log(m / s), m = (1 - beta) s + beta t: of the larger of s and t, so that nothing is large.
        share = tl.where(d < 0.0, 1.0 - parameter, parameter)
        to_s = log1p(share * expm1(0.0 - tl.abs(d))) - tl.where(d < 0.0, d, 0.0)
        g, of_teacher = (parameter - 1.0) * s * to_s, (0.0 - parameter) * t * (to_s + d)
    elif KIND == _ALPHA:
        above = parameter - 1.0
        most = _EXPONENT / tl.maximum(tl.maximum(tl.abs(parameter), tl.abs(above)), 1.0)
        d = tl.where(d > most, most, tl.where(d < 0.0 - most, 0.0 - most, d))
        g, of_teacher = s * expm1(above * d) / above, 0.0 - t * expm1(parameter * d) / parameter
    else:
        sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, d))
        g, of_teacher = s * sign, 0.0 - t * sign
    return g, of_teacher


@triton.jit
def logits_at(
    row_ptr,
    bias_ptr,
    cols,
    mask,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A row's logits at some columns."""
    raw = tl.load(row_ptr + cols, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    return transformed(raw, bias, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP, ROUNDING)


@triton.jit
def pair(z, teacher_z, lse, entropy, teacher_lse, teacher_entropy):
    """s, t, d, s - t of one entry; d is 0 where both probabilities are, infinite where one is."""
    high, low = split_lse(lse, entropy)
    teacher_high, teacher_low = split_lse(teacher_lse, teacher_entropy)
    logs = (z - high) - low
    logt = (teacher_z - teacher_high) - teacher_low
    gap = lse - teacher_lse
    gap_high = gap.to(tl.float32)
    d = ((z - teacher_z) - gap_high) - (gap - gap_high.to(tl.float64)).to(tl.float32)
    # Of an infinite logit, or of those that have no room for their sum, only log p is known.
    most = tl.where(tl.abs(high) + tl.abs(teacher_high) < _HUGE, _INF, 0.0)
    d = tl.where(tl.abs(d) < most, d, logs - logt)
    d = tl.where((logs == -_INF) & (logt == -_INF), 0.0, d)
    # The smaller from the larger: an error of either's normalisation is then one of both, and
    # cancels between slopes.
    below = d < 0.0
    largest = tl.exp(tl.where(below, logt, logs))
    least = largest * tl.exp(0.0 - tl.abs(d))
    delta = tl.where(below, largest, 0.0 - largest) * expm1(0.0 - tl.abs(d))
    return tl.where(below, least, largest), tl.where(below, largest, least), d, delta


@triton.jit
def bounded(d):
    """A log-ratio that is finite."""
    return tl.where(d == _INF, _INFINITE, tl.where(d == -_INF, -_INFINITE, d))


@triton.jit
def term(g, of_teacher, d, KIND: tl.constexpr, parameter):
    """c, infinite where the divergence is: its log-ratio d is, and that counts."""
    c = g + of_teacher
    if KIND == _REVERSE:
        c = tl.where(d == _INF, _INF, c)
    elif KIND == _FORWARD:
        c = tl.where(d == -_INF, _INF, c)
    elif KIND == _ALPHA:
        infinite = ((d == _INF) & (parameter >= 1.0)) | ((d == -_INF) & (parameter <= 0.0))
        c = tl.where(infinite, _INF, c)
    return c


@triton.jit
def _divergence_sums_kernel(
    logits_ptr,  # (N, V) fp32
    bias_ptr,  # (V,) or unused
    temperature_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp64
    entropy_ptr,  # (N,) fp32
    teacher_logits_ptr,  # (N, V) fp32
    teacher_bias_ptr,  # (V,) or unused
    teacher_temperature_ptr,  # (N,) fp32
    teacher_lse_ptr,  # (N,) fp64
    teacher_entropy_ptr,  # (N,) fp32
    partial_ptr,  # (splits, 3, N) fp64, written
    N,
    V,
    columns_per_split,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    parameter,
    row_stride,
    teacher_row_stride,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_ROUNDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    inv = 1.0 / tl.load(temperature_ptr + n)
    teacher_inv = 1.0 / tl.load(teacher_temperature_ptr + n)
    lse, entropy = tl.load(lse_ptr + n), tl.load(entropy_ptr + n)
    teacher_lse, teacher_entropy = tl.load(teacher_lse_ptr + n), tl.load(teacher_entropy_ptr + n)
    row = logits_ptr + n * row_stride
    teacher_row = teacher_logits_ptr + n * teacher_row_stride
    total = tl.full((), 0.0, tl.float64)
    of_student = tl.full((), 0.0, tl.float64)
    of_teacher = tl.full((), 0.0, tl.float64)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, V)
    for v0 in range(begin, end, BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        mask = cols < end
        z = logits_at(
            row, bias_ptr, cols, mask, scale, softcap, inv, HAS_BIAS, HAS_SOFTCAP, ROUNDING
        )
        teacher_z = logits_at(
            teacher_row,
            teacher_bias_ptr,
            cols,
            mask,
            teacher_scale,
            teacher_softcap,
            teacher_inv,
            HAS_TEACHER_BIAS,
            HAS_TEACHER_SOFTCAP,
            TEACHER_ROUNDING,
        )
        s, t, d, delta = pair(z, teacher_z, lse, entropy, teacher_lse, teacher_entropy)
        g, h = slopes(s, t, bounded(d), delta, KIND, parameter)
        c = term(g, h, d, KIND, parameter)
        # Short sums in fp32, and those in fp64.
        total += tl.sum(tl.where(mask, c, 0.0), axis=0).to(tl.float64)
        of_student += tl.sum(tl.where(mask, g, 0.0), axis=0).to(tl.float64)
        of_teacher += tl.sum(tl.where(mask, h, 0.0), axis=0).to(tl.float64)
    out = partial_ptr + split * 3 * N + n
    tl.store(out + 0 * N, total)
    tl.store(out + 1 * N, of_student)
    tl.store(out + 2 * N, of_teacher)


@triton.jit
def _divergence_gradient_kernel(
    logits_ptr,  # (N, V) fp32
    bias_ptr,  # (V,) or unused
    temperature_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp64
    entropy_ptr,  # (N,) fp32
    teacher_logits_ptr,  # (N, V) fp32
    teacher_bias_ptr,  # (V,) or unused
    teacher_temperature_ptr,  # (N,) fp32
    teacher_lse_ptr,  # (N,) fp64
    teacher_entropy_ptr,  # (N,) fp32
    labels_ptr,  # (N,) int64
    slope_ptr,  # (N,) fp32
    ddivergence_ptr,  # (N,) fp32
    dlogprobs_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32
    draw_ptr,  # (N, V), written; may be logits
    V,
    first_column,
    ignore_index,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    parameter,
    factor,
    row_stride,
    teacher_row_stride,
    draw_row_stride,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_ROUNDING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    inv = 1.0 / tl.load(temperature_ptr + n)
    teacher_inv = 1.0 / tl.load(teacher_temperature_ptr + n)
    lse, entropy = tl.load(lse_ptr + n), tl.load(entropy_ptr + n)
    teacher_lse, teacher_entropy = tl.load(teacher_lse_ptr + n), tl.load(teacher_entropy_ptr + n)
    ddivergence = tl.load(ddivergence_ptr + n)
    dlogprob, dentropy = tl.load(dlogprobs_ptr + n), tl.load(dentropy_ptr + n)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    row = logits_ptr + n * row_stride
    z = logits_at(row, bias_ptr, cols, mask, scale, softcap, inv, HAS_BIAS, HAS_SOFTCAP, ROUNDING)
    teacher_z = logits_at(
        teacher_logits_ptr + n * teacher_row_stride,
        teacher_bias_ptr,
        cols,
        mask,
        teacher_scale,
        teacher_softcap,
        teacher_inv,
        HAS_TEACHER_BIAS,
        HAS_TEACHER_SOFTCAP,
        TEACHER_ROUNDING,
    )
    s, t, d, delta = pair(z, teacher_z, lse, entropy, teacher_lse, teacher_entropy)
    g, _ = slopes(s, t, bounded(d), delta, KIND, parameter)
    of_divergence = factor * g - s * tl.load(slope_ptr + n)
    # An entry that cannot be sampled has no gradient, though it may have a slope.
    dz = ddivergence * tl.where(z == -_INF, 0.0, of_divergence)
    is_label = cols + first_column == label
    dz += softmax_gradient(z, lse, entropy, dlogprob, dentropy, is_label)
    if HAS_SOFTCAP:
        # d softcap(x) / dx = 1 - tanh(x / c)^2, and tanh(x / c) = z temperature / c.
        u = z / (inv * softcap)
        dz = dz * (1.0 - u * u)
    # A row without upstream gradient is 0 whatever its logits hold.
    none = (ddivergence == 0.0) & (dlogprob == 0.0) & (dentropy == 0.0)
    draw = tl.where((label == ignore_index) | none, 0.0, dz * (scale * inv))
    out = draw_ptr + n * draw_row_stride + cols
    tl.store(out, draw.to(draw_ptr.dtype.element_ty), mask=mask)


def _arguments(side: Side) -> tuple:
    """What the kernels take of a side, in order."""
    bias = side.logits if side.bias is None else side.bias
    return (side.logits, bias, side.temperature, side.lse, side.entropy)


def _options(student: Side, teacher: Side, kind: int) -> dict:
    """The settings of a launch."""
    return {
        "KIND": kind,
        "HAS_BIAS": student.bias is not None,
        "HAS_SOFTCAP": student.softcap != 0.0,
        "ROUNDING": student.rounding,
        "HAS_TEACHER_BIAS": teacher.bias is not None,
        "HAS_TEACHER_SOFTCAP": teacher.softcap != 0.0,
        "TEACHER_ROUNDING": teacher.rounding,
        "BLOCK_V": BLOCK_V,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


def sums(
    student: Side, teacher: Side, kind: int, parameter: float, factor: float, multiprocessors: int
) -> Tensor:  # [3, N] fp64
    """The divergence, and the sums of g and g'."""
    N, V = student.logits.shape
    splits = splits_for(N, V, multiprocessors)
    partial = student.lse.new_empty(splits, 3, N)
    if N:
        _divergence_sums_kernel[(N, splits)](
            *_arguments(student),
            *_arguments(teacher),
            partial,
            N,
            V,
            triton.cdiv(triton.cdiv(V, BLOCK_V), splits) * BLOCK_V,
            *(student.scale, student.softcap, teacher.scale, teacher.softcap),
            parameter,
            student.logits.stride(0),
            teacher.logits.stride(0),
            **_options(student, teacher, kind),
        )
    return factor * partial.sum(0)


def gradient(
    upstream: tuple[Tensor, Tensor, Tensor],  # of divergence, log-prob and entropy, [N] fp32
    student: Side,
    teacher: Side,
    measure: tuple[int, float, float],  # kind, parameter, factor
    labels: Tensor,  # [N] int64
    slope: Tensor,  # [N] fp32: the sum of g times factor
    ignore_index: int,
    draw: Tensor,  # [N, V], rows contiguous, written; may be the student's logits
    first_column: int = 0,
) -> None:
    """The gradient of the student's raw logits, rounded once, to the dtype of draw."""
    N, V = student.logits.shape
    kind, parameter, factor = measure
    if N == 0:
        return
    _divergence_gradient_kernel[(N, triton.cdiv(V, BLOCK_V))](
        *_arguments(student),
        *_arguments(teacher),
        labels,
        slope,
        *upstream,
        draw,
        V,
        first_column,
        ignore_index,
        *(student.scale, student.softcap, teacher.scale, teacher.softcap),
        parameter,
        factor,
        student.logits.stride(0),
        teacher.logits.stride(0),
        draw.stride(0),
        **_options(student, teacher, kind),
    )
