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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_gradients import add_product_, beside, logits_room, product, write_product

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
    first_column,
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
    label = tl.load(labels_ptr + n) - first_column
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
                f *= tl.where((e > 0.0) | is_label, 1.0 - t * t, 0.0)
            f = tl.where(finite & (not idle), f, 0.0)
            tl.store(f_ptr + n * f_row_stride + cols, f.to(tl.bfloat16), mask=mask)
    if SCALED:
        for h0 in range(0, H, BLOCK_H):
            ks = h0 + tl.arange(0, BLOCK_H)
            x = tl.load(hidden_ptr + n * hidden_row_stride + ks, mask=ks < H, other=0.0)
            x = tl.where(idle, 0.0, x.to(tl.float32) * factor)
            tl.store(scaled_ptr + n * H + ks, x.to(tl.bfloat16), mask=ks < H)


class Known(NamedTuple):
    """What the forward pass left of N tokens, beside E.

    The vocabulary may be part of a larger one, and these of the whole: s = exp(lse) / 2^r.
    """

    s: Tensor  # [N] fp32
    logprobs: Tensor  # [N] fp32
    lse: Tensor  # [N] fp64
    entropy: Tensor  # [N] fp32


# A part counts as having exp(-44) = 8e-20 of all probability at least: its s, times the inverse of
# that, is to be a number of fp32.
MOST = 44.0


def of_whole(
    s: Tensor,  # [N] fp32: the sum of E
    logprobs: Tensor,  # [N] fp32
    own_lse: Tensor,  # [N] fp64: of E
    lse: Tensor,  # [N] fp64: of the whole vocabulary
    entropy: Tensor,  # [N] fp32
) -> Known:
    """s and the log-probs as they are among all entries: the same bits where E has them all."""
    # Every E is 0: whatever the sum is, there are no probabilities.
    nothing = (own_lse == -torch.inf) & lse.isfinite()
    own_lse = own_lse.where(~nothing, lse)
    lse = torch.minimum(lse, own_lse + MOST)
    outside = lse - own_lse
    s = (s * outside.exp().float()).masked_fill(nothing, 1.0)
    among = (logprobs.double() - outside).float().masked_fill(nothing, -torch.inf)
    return Known(s, among, lse, entropy)


Transform = tuple[Tensor | None, Tensor, Tensor, float, float, int]  # bias, labels, ... rounding


def form(
    upstream: tuple[Tensor, Tensor],
    e: Tensor,
    f: Tensor,
    hidden: Tensor,
    transform: Transform,
    known: Known,
    scaled: Tensor | None,
    first_column: int = 0,
) -> Tensor:  # [N] fp32
    """factor; f and scaled [N, H] = factor hidden are written.

    e and f are [N, columns] bf16, from first_column on: two tensors, or one, of which only the
    entry of the label is written if nothing else differs.
    """
    (N, V), H = e.shape, hidden.shape[1]
    _, labels, temperature, scale, softcap, _ = transform
    factor = known.s.new_empty(N)
    if N == 0:
        return factor
    _factor_kernel[(N,)](
        e,
        f,
        hidden,
        hidden if scaled is None else scaled,
        factor,
        labels,
        temperature,
        *known,
        *upstream,
        V,
        H,
        first_column,
        scale,
        softcap,
        e.stride(0),
        f.stride(0),
        hidden.stride(0),
        HAS_SOFTCAP=softcap != 0.0,
        IN_PLACE=f is e,
        SCALED=scaled is not None,
        BLOCK_V=BLOCK_V,
        BLOCK_H=1024,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return factor


def bwd(
    upstream: tuple[Tensor, Tensor],  # dlogprobs, dentropy [N] fp32
    e: Tensor,  # [N, V] bf16, spent
    hidden: Tensor,  # [N, H] bf16, contiguous
    weight: Tensor,  # [V, H] bf16
    transform: Transform,
    known: Known,
    dweight: Tensor | None,  # [V, H] or its last columns, written or added to
    dbias: Tensor | None,  # [V], written or added to
    accumulate: bool,
) -> Tensor:  # [N, H] fp32
    """dhidden of a chunk of tokens; its share of dweight and dbias.

    Without softcap and entropy gradients E is as before but for the entries of the labels, and a
    second call finds the same.
    """
    scaled = None if dweight is None else torch.empty_like(hidden)
    factor = form(upstream, e, e, hidden, transform, known, scaled)
    if dweight is not None and accumulate:
        add_product_(dweight, e.T, beside(dweight, scaled))
    elif dweight is not None:
        write_product(e.T, beside(dweight, scaled), dweight)
    if dbias is not None:
        share = _times(e, factor)
        dbias.copy_(dbias + share if accumulate else share)
    return product(e, weight).mul_(factor[:, None])


def bwd_by_blocks(
    upstream: tuple[Tensor, Tensor],
    e: Tensor,  # [N, V] bf16, left as it is
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    known: Known,
    dweight: Tensor | None,  # [V, H], written
    dbias: Tensor | None,  # [V], written
    columns: int,
) -> Tensor:  # [N, H] fp32
    """The same, so many entries of the vocabulary at a time, and E stays what it was."""
    (N, H), V = hidden.shape, weight.shape[0]
    dhidden = hidden.new_zeros(N, H, dtype=torch.float32)
    scaled = None if dweight is None else torch.empty_like(hidden)
    room = logits_room(N, min(columns, V), e.dtype, e.device)
    for v0 in range(0, V, columns):
        v1 = min(v0 + columns, V)
        f = room[:, : v1 - v0]
        once = scaled if v0 == 0 else None
        factor = form(upstream, e[:, v0:v1], f, hidden, transform, known, once, v0)
        add_product_(dhidden, f, weight[v0:v1])
        if dweight is not None:
            write_product(f.T, scaled, dweight[v0:v1])
        if dbias is not None:
            dbias[v0:v1] = _times(f, factor)
    return dhidden.mul_(factor[:, None])


def _times(f: Tensor, factor: Tensor) -> Tensor:  # [V] fp32
    """f^T factor. A product takes bfloat16: the sum of three is a number of fp32."""
    rest, columns = factor, factor.new_zeros(len(factor), 8, dtype=torch.bfloat16)
    for i in range(3):
        columns[:, i] = rest
        rest = rest - columns[:, i].float()
    return product(f.T, columns).sum(1)
