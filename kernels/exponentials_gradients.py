"""Gradients of the linear head from exponentials of its logits, by plain products.

    draw[n, v] = factor[n] F[n, v]          F = E, but E - s at the label; E, s, r of
    factor     = -g slope / s               linear_exponentials.py; g = dlogprob,
    dhidden    = factor (F weight)          slope = scale / temperature
    dweight    = F^T (factor hidden)
    dbias      = F^T factor

A gradient of the entropy, h = dentropy, or a softcap takes one pass over E:

    F[n, v] = (E (g + h (log p + entropy)) - g s 1[label]) (1 - tanh^2)
    factor  = -slope / s

Traffic: reads NV numbers of two bytes twice; that pass reads and writes them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_exponentials import Exponentials
from .linear_gradients import add_product_, product, write_product

BLOCK_V, NUM_WARPS = 4096, 8


@triton.jit
def _factor_kernel(
    exponentials_ptr,  # (N, V) bf16
    f_ptr,  # (N, V) bf16, written; may be exponentials, and then only where it differs
    hidden_ptr,  # (N, H) bf16
    scaled_ptr,  # (N, H) bf16, written: factor * hidden; unused without SCALED
    factor_ptr,  # (N,) fp32, written
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    s_ptr,  # (N,) fp32
    logprobs_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp64
    entropy_ptr,  # (N,) fp32
    dlogprobs_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32
    V,
    H,
    scale,
    softcap,
    row_stride,
    f_row_stride,
    hidden_row_stride,
    HAS_SOFTCAP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    inv_temperature = 1.0 / tl.load(temperature_ptr + n)
    s = tl.load(s_ptr + n)
    logprob = tl.load(logprobs_ptr + n)
    lse = tl.load(lse_ptr + n).to(tl.float32)
    entropy = tl.load(entropy_ptr + n)
    g = tl.load(dlogprobs_ptr + n)
    h = tl.load(dentropy_ptr + n)
    finite = tl.abs(s) < float("inf")
    idle = (g == 0.0) & (h == 0.0)
    plain = (h == 0.0) & (softcap == 0.0)
    slope = scale * inv_temperature / s
    factor = tl.where(plain, -g * slope, -slope)
    # Where a row has no sum: no gradient if none is asked for, NaN else, and nothing of the row.
    factor = tl.where(idle, 0.0, tl.where(finite, factor, float("nan")))
    tl.store(factor_ptr + n, factor)
    p_label = tl.exp(logprob)
    log_s = tl.log(s)
    one_entry = plain & finite
    if not IN_PLACE:
        one_entry = V < 0
    if one_entry:
        inside = (label >= 0) & (label < V)
        at_label = (s * (p_label - 1.0)).to(tl.bfloat16)
        tl.store(f_ptr + n * f_row_stride + label, at_label, mask=inside)
    else:
        for v0 in range(0, V, BLOCK_V):
            cols = v0 + tl.arange(0, BLOCK_V)
            mask = cols < V
            e = tl.load(exponentials_ptr + n * row_stride + cols, mask=mask, other=0.0)
            e = e.to(tl.float32)
            is_label = cols == label
            e = tl.where(is_label, p_label * s, e)
            # 0 log 0 is 0.
            logp = tl.where(is_label, logprob, tl.log(tl.where(e > 0.0, e, 1.0)) - log_s)
            f = e if plain else e * (g + h * (logp + entropy))
            f -= tl.where(is_label, s if plain else g * s, 0.0)
            if HAS_SOFTCAP:
                t = (logp + lse) / (inv_temperature * softcap)
                f *= tl.where(e > 0.0, 1.0 - t * t, 0.0)
            f = tl.where(finite & (not idle), f, 0.0)
            tl.store(f_ptr + n * f_row_stride + cols, f.to(tl.bfloat16), mask=mask)
    if SCALED:
        for h0 in range(0, H, BLOCK_H):
            ks = h0 + tl.arange(0, BLOCK_H)
            x = tl.load(hidden_ptr + n * hidden_row_stride + ks, mask=ks < H, other=0.0)
            x = tl.where(idle, 0.0, x.to(tl.float32) * factor)
            tl.store(scaled_ptr + n * H + ks, x.to(tl.bfloat16), mask=ks < H)


def bwd(
    upstream: tuple[Tensor, Tensor],  # dlogprobs, dentropy [N] fp32
    stored: Exponentials,
    hidden: Tensor,  # [N, H] bf16, contiguous
    weight: Tensor,  # [V, H] bf16
    transform: tuple[Tensor | None, Tensor, Tensor, float, float],  # bias ... softcap
    known: tuple[Tensor, Tensor, Tensor],  # logprobs [N] fp32, lse [N] fp64, entropy [N] fp32
    dweight: Tensor | None,  # [V, H], written or added to
    dbias: Tensor | None,  # [V], written or added to
    accumulate: bool,
    into: Tensor | None = None,  # [N, V] bf16: F; None: E itself becomes it
) -> Tensor:  # [N, H] fp32
    """dhidden of a chunk of tokens; its share of dweight and dbias."""
    (N, H), V = hidden.shape, weight.shape[0]
    _, labels, temperature, scale, softcap = transform
    e, s = stored
    f = e if into is None else into
    factor = s.new_empty(N)
    scaled = torch.empty_like(hidden) if dweight is not None else hidden
    if N:
        _factor_kernel[(N,)](
            e, f, hidden, scaled, factor, labels, temperature, s, *known, *upstream,
            V, H, scale, softcap, e.stride(0), f.stride(0), hidden.stride(0),
            HAS_SOFTCAP=softcap != 0.0, IN_PLACE=into is None, SCALED=dweight is not None,
            BLOCK_V=BLOCK_V, BLOCK_H=1024, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    if dweight is not None and accumulate:
        add_product_(dweight, f.T, scaled)
    elif dweight is not None:
        write_product(f.T, scaled, dweight)
    if dbias is not None:
        share = _times(f, factor)
        dbias.copy_(dbias + share if accumulate else share)
    return product(f, weight).mul_(factor[:, None])


def _times(f: Tensor, factor: Tensor) -> Tensor:  # [V] fp32
    """f^T factor. A product takes bfloat16: the sum of three is a number of fp32."""
    rest, columns = factor, factor.new_zeros(len(factor), 8, dtype=torch.bfloat16)
    for i in range(3):
        columns[:, i] = rest
        rest = rest - columns[:, i].float()
    return product(f.T, columns).sum(1)
