"""The operators on CUDA and ROCm: which tokens take part, and the Triton kernels they go to.

float64 has no kernel and takes the reference. Operands of different dtypes meet in float32. Each
function is what the operator of its name does, plus the `device` it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rl import chunked, ops


def launch(kernel: Callable, args: Sequence, device: Any) -> Any:
    """kernel(*args, device), with vectors as the kernels read them: one number after another.

    The upstream gradient of a sum is one number, expanded; labels may be every second of a row.
    """
    dense = (a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args)
    return kernel(*dense, device)


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In one dtype, with contiguous columns."""
    if hidden.dtype != weight.dtype:
        hidden, weight = hidden.float(), weight.float()
    return hidden.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()


def _chosen(live: Tensor) -> Tensor | None:
    """Indices of the tokens that take part, at the price of one synchronisation; None: all.

    While a graph is captured all take part: kernels leave zeros where they should not.
    """
    if live.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = live.nonzero()[:, 0]
    return None if len(rows) == len(live) else rows


def _placed(
    rows: Tensor | None, part: Tensor, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    part = part.to(dtype or like.dtype)
    if rows is None:
        return part
    return part.new_zeros(like.shape).index_copy_(0, rows, part)


def _taken(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def linear_logprobs(
    hidden, weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes, device
):
    from fused_rl.kernels import linear_logprobs as kernel

    rows = _chosen(labels != ignore_index)
    left, right = _operands(*_taken(rows, hidden), weight)
    tokens = _taken(rows, labels, temperature)
    stats = kernel.fwd(left, right, bias, *tokens, scale, softcap, ignore_index, device)
    return tuple(_placed(rows, part, part.new_empty(len(labels))) for part in stats)


# The power of two that the largest gradient of a log-prob is scaled to in float16, whose numbers
# end at 65504 and lose digits below 6e-5. It leaves room for the gradient of an entropy:
# p |log p + entropy| is under 4 in a vocabulary of a million.
FLOAT16_TOP = 11


def _scale_of(
    dtype: torch.dtype, slope: Tensor, dlogprobs: Tensor, dentropy: Tensor
) -> Tensor | None:
    """For float16, what brings the largest gradient of a log-prob to 2^FLOAT16_TOP; a power of two.

    slope [N]: what the chain rule makes of the upstream gradients.
    """
    if dtype != torch.float16 or not dlogprobs.numel():
        return None
    largest = (torch.maximum(dlogprobs.abs(), dentropy.abs()) * slope.abs()).max()
    power = torch.exp2((FLOAT16_TOP - largest.log2()).floor().clamp(max=126.0))
    return power.where(largest.isfinite(), 1.0)


def linear_logprobs_backward(
    dlogprobs,
    dentropy,
    hidden,
    weight,
    bias,
    labels,
    temperature,
    scale,
    softcap,
    ignore_index,
    chunk_bytes,
    lse,
    entropy,
    need_dhidden,
    need_dweight,
    need_dbias,
    device,
):
    from fused_rl.kernels import linear_gradients as kernel

    live = (labels != ignore_index) & ((dlogprobs != 0) | (dentropy != 0))
    rows = _chosen(live)
    left, right = _operands(*_taken(rows, hidden), weight)
    upstream, of_tokens = _taken(rows, dlogprobs, dentropy), _taken(rows, labels, temperature)
    unit = _scale_of(left.dtype, scale / of_tokens[1], *upstream)
    if unit is not None:
        upstream = tuple(g * unit for g in upstream)
    dhidden, dweight, dbias = kernel.bwd(
        *upstream,
        *(left, right, bias, *of_tokens, scale, softcap, ignore_index),
        *(chunk_bytes, *_taken(rows, lse, entropy), (need_dhidden, need_dweight, need_dbias)),
    )
    if unit is not None:
        for sum_ in (dhidden, dweight, dbias):
            if sum_ is not None:
                sum_.div_(unit)
    return (
        _placed(rows, dhidden, hidden) if need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype) if need_dweight else weight.new_empty(0),
        dbias.to(bias.dtype) if need_dbias else weight.new_empty(0),
    )


def linear_logprobs_chunk(hidden, weight, bias, labels, temperature, scale, softcap, device):
    from fused_rl.kernels import linear_gradients, logprobs

    left, right = _operands(hidden, weight)
    N, V = hidden.shape[0], weight.shape[0]
    z = temperature.new_empty(chunked.padded(N) * V)
    raw = linear_gradients.product(left, right.T, z[: N * V].view(N, V))
    stats = logprobs.fwd(raw, bias, labels, temperature, scale, softcap, -1, device.multiprocessors)
    return (*stats, z)


def linear_logprobs_chunk_backward(
    z,
    dlogprobs,
    dentropy,
    hidden,
    weight,
    bias,
    labels,
    temperature,
    scale,
    softcap,
    lse,
    entropy,
    dweight,
    dbias,
    accumulate,
    device,
):
    from fused_rl.kernels import linear_gradients as kernel

    N, V = hidden.shape[0], weight.shape[0]
    raw = z[: N * V].view(N, V)
    rows = _chosen((dlogprobs != 0) | (dentropy != 0))
    left, right = _operands(*_taken(rows, hidden), weight)
    upstream, of_tokens = _taken(rows, dlogprobs, dentropy), _taken(rows, labels, temperature)
    unit = _scale_of(left.dtype, scale / of_tokens[1], *upstream)
    if unit is not None:
        upstream = tuple(g * unit for g in upstream)
    (chosen,) = _taken(rows, raw)
    # Shares that are still scaled cannot be added where the sum is.
    into = [None if not t.numel() else t for t in (dweight, dbias)]
    sums = into if unit is None else [None if t is None else t.float() * 0 for t in into]
    dhidden = kernel.chunk_bwd(
        upstream,
        chosen,
        left,
        right,
        (bias, *of_tokens, scale, softcap),
        (-1, *_taken(rows, lse, entropy)),
        *sums,
        accumulate and unit is None,
    )
    if unit is not None:
        dhidden.div_(unit)
        for to, share in zip(into, sums, strict=True):
            if to is not None:
                to.copy_(to + share / unit if accumulate else share / unit)
    return _placed(rows, dhidden, hidden, chunked.kept_dtype(hidden))


def logits_logprobs(logits, labels, temperature, ignore_index, device):
    from fused_rl.kernels import logprobs as kernel

    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    args = (rows, None, labels, temperature, 1.0, 0.0, ignore_index)
    return kernel.fwd(*args, device.multiprocessors)[:3]


def logits_logprobs_backward(
    dlogprobs, dentropy, logits, labels, temperature, ignore_index, lse, entropy, device
):
    from fused_rl.kernels import logprobs as kernel

    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    dlogits = logits.new_empty(logits.shape)
    upstream = (dlogprobs.contiguous(), dentropy.contiguous())
    args = (rows, None, labels, temperature, 1.0, 0.0, ignore_index, lse, entropy)
    kernel.bwd(*upstream, *args, dlogits)
    return dlogits


def kl(d, value_kind, slope_kind, device):
    from fused_rl.kernels import kl as kernel

    return kernel.fwd(d, value_kind, slope_kind)


def _register(name: str) -> None:
    """The kernel of this file on cuda, under a guard of the device.

    Plain torch for float64, and where triton is not installed: `backends()` says so.
    """
    kernel, plain = globals()[name], getattr(chunked, name)

    @chunked.in_full
    def run(*args):
        tensors = [a for a in args if isinstance(a, Tensor)]
        # The first two: an lse, further on, is always float64.
        if not ops.HAS_TRITON or any(t.dtype == torch.float64 for t in tensors[:2]):
            return plain(*args)
        from fused_rl.kernels.linear_logprobs import Device

        with torch.cuda.device(tensors[0].device):
            return launch(kernel, args, Device.of(tensors[0].device))

    getattr(ops, name).register_kernel("cuda")(run)


OPERATORS = (
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_logprobs_chunk",
    "linear_logprobs_chunk_backward",
    "logits_logprobs",
    "logits_logprobs_backward",
    "kl",
)
for _name in OPERATORS:
    _register(_name)
