"""k1, k2, k3 and abs of d = logprobs - ref_logprobs, with derivatives, in one elementwise pass.

        value             derivative
    K1  d                 1
    K2  d^2 / 2           d
    K3  expm1(-d) + d     -expm1(-d)      the exponent held at 20 nats
    ABS |d|               sign(d)

Traffic: reads N, writes 2N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def expm1_plus(x, TERMS: tl.constexpr = 11):
    """(expm1(x), expm1(x) - x), neither of which cancels near 0: a series below 1/4.

    x^2/2 (1 + x/3 (1 + x/4 (... (1 + x/(TERMS + 2))))): what 11 leave out is below the rounding of
    fp64, what 4 do below that of fp32, of expm1(x).
    """
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS):
        series = 1.0 + series * (x * (1.0 / (TERMS + 2 - i)))
    tail = 0.5 * x * x * series
    small = tl.abs(x) < 0.25
    em1 = tl.where(small, x + tail, tl.exp(x) - 1.0)
    return em1, tl.where(small, tail, em1 - x)


@triton.jit
def estimate(d, KIND: tl.constexpr):
    """(value, derivative) of one estimator."""
    if KIND == 1:
        value = d
        slope = tl.full(d.shape, 1.0, d.dtype)
    elif KIND == 2:
        value = 0.5 * d * d
        slope = d
    elif KIND == 3:
        # where, not minimum: a NaN stays one.
        x = tl.where(-d > 20.0, 20.0, -d)
        em1, rest = expm1_plus(x)
        value = rest + (x + d)
        slope = -em1
    else:
        value = tl.abs(d)
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    return value, slope


@triton.jit
def _kl_kernel(
    d_ptr,  # (N,) fp32 or fp64
    value_ptr,  # (N,), written
    slope_ptr,  # (N,), written
    N,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    d = tl.load(d_ptr + at, mask=mask, other=0.0)
    value, slope = estimate(d, VALUE)
    if SLOPE != VALUE:
        _, slope = estimate(d, SLOPE)
    tl.store(value_ptr + at, value, mask=mask)
    tl.store(slope_ptr + at, slope, mask=mask)


def fwd(d: Tensor, value_kind: int, slope_kind: int) -> tuple[Tensor, Tensor]:
    """The estimator `value_kind` at d, and the derivative of the estimator `slope_kind` there."""
    d = d.contiguous()
    value, slope = torch.empty_like(d), torch.empty_like(d)
    if d.numel():
        _kl_kernel[(triton.cdiv(d.numel(), BLOCK),)](
            d,
            value,
            slope,
            d.numel(),
            VALUE=value_kind,
            SLOPE=slope_kind,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return value, slope
