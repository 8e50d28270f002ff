"""The operators: schema, shape rules and gradients. Which kernel runs is the dispatcher's choice.

An op without a kernel for the device at hand runs through chunked.py, in plain torch. The kernels
for CPUs (csrc/) are registered from C++ when the library is loaded, at the end of this file; those
for CUDA (kernels/) in ops_cuda.py. Nothing else in the package knows that devices exist.

Shapes: hidden [N, H], weight [V, H], bias [V], labels [N] int64, temperature [N]; results [N] in
float32, or float64 where an input is float64. A token whose label is `ignore_index` gives zeros,
costs nothing and passes no gradient. Gradients are those of logprobs and entropy.

A word whose logit is -inf has a gradient of exactly 0. A token's logits may be as large as the
dtype holds, also in every word: log_sum = lse - max, which an lse of that size has no room for, is
found again where the gradient needs it.
"""

import math
import warnings
from importlib.resources import files
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import custom_op

from fused_rl import chunked
from fused_rl.chunked import (
    check_tokens,
    chunk_rows,
    gradients_like,
    in_full,
    kept_dtype,
    padded,
    statistics_like,
)
from fused_rl.derivatives import call, register_gradient
from fused_rl.reference import acc_dtype

HAS_TRITON = find_spec("triton") is not None

# Scratch for logits when the caller names none. Constants, not a fraction of what happens to be
# free: the chunking, and with it the last bit of the result, must not change from run to run.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
# With several chunks one pass adds up dweight in fp32: it pays from so many tokens in a chunk that
# the arithmetic hides the traffic, 4 x arithmetic rate / memory bandwidth. On CPUs it never does:
# at 2048 x 896 x 151936 it takes the time of two passes, and 480 MiB more.
ONE_PASS_TOKENS = {"cuda": 735}


def scratch_bytes(device: torch.device, chunk_bytes: int | None) -> int:
    """chunk_bytes, or the device's own bound."""
    return chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])


def one_pass_tokens(device: torch.device) -> float:
    """From how many tokens in a chunk on one pass is cheaper than two, if there are several."""
    return ONE_PASS_TOKENS.get(device.type, math.inf)


def chunk_tokens(hidden: Tensor, weight: Tensor, chunk_bytes: int | None) -> int:
    """Tokens whose logits a chunk may hold."""
    scratch = scratch_bytes(hidden.device, chunk_bytes)
    dtype = acc_dtype(hidden, weight)
    if not (hidden.is_cuda and HAS_TRITON and dtype == torch.float32):
        return chunk_rows(weight.shape[0], dtype, scratch)
    from fused_rl.kernels import linear_gradients
    from fused_rl.kernels.linear_logprobs import Device

    width = hidden.element_size() if hidden.dtype == weight.dtype else 4
    multiprocessors = Device.of(hidden.device).multiprocessors
    V, H = weight.shape
    return linear_gradients.chunk_tokens(V, H, width, scratch, multiprocessors)


@custom_op("fused_rl::linear_logprobs", mutates_args=())
@in_full
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top; nothing of size V is kept. 2 NHV, 6 more in the backward pass.

    Partial vocabularies merge from these four: label logit = logprobs + lse, mean logit =
    lse - entropy, largest logit = top + lse.
    """
    return chunked.linear_logprobs(
        hidden, weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes
    )


@linear_logprobs.register_fake
def _(hidden, weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes):
    return statistics_like(hidden, weight)


@custom_op("fused_rl::linear_logprobs_backward", mutates_args=())
@in_full
def linear_logprobs_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias; what is not needed comes back empty.

    Tokens whose upstream gradients are both 0 cost nothing.
    """
    return chunked.linear_logprobs_backward(
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
    )


@linear_logprobs_backward.register_fake
def _(dlogprobs, dentropy, hidden, weight, bias, *rest):
    return gradients_like(hidden, weight, bias, rest[-3:])


def _save_inputs(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, temperature, *ctx.options = inputs
    _, entropy, lse, top, *unit = output
    ctx.save_for_backward(hidden, weight, bias, labels, temperature, entropy, lse, *unit)
    ctx.mark_non_differentiable(lse, top, *unit)
    ctx.set_materialize_grads(False)


def materialized(like: Tensor, *upstream: Tensor | None) -> tuple[Tensor, ...]:
    """Upstream gradients in the dtype of `like`; zeros where a loss does not depend on a result."""
    return tuple(torch.zeros_like(like) if g is None else g.to(like.dtype) for g in upstream)


def _linear_logprobs_grad(ctx, dlogprobs, dentropy, *_):
    hidden, weight, bias, labels, temperature, entropy, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = call(
        linear_logprobs_backward,
        *materialized(entropy, dlogprobs, dentropy),
        *(hidden, weight, bias, labels, temperature, *ctx.options),
        *(lse, entropy, *needs),
    )
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*wanted, *(None,) * 6)


register_gradient(
    "linear_logprobs",
    linear_logprobs,
    linear_logprobs_backward,
    _linear_logprobs_grad,
    _save_inputs,
)


@custom_op("fused_rl::linear_logprobs_frozen", mutates_args=())
@in_full
def linear_logprobs_frozen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top, unit, for a head that is not trained. 4 NHV for any loss.

    unit[n] = d logprobs[n] / d hidden[n], [N, H] in the dtype of hidden. Without softcap it is
    scale / temperature[n] * (weight[labels[n]] - E_p[weight]). The backward pass only scales it.
    """
    check_tokens(labels, temperature, weight.shape[0], ignore_index)
    out = [t.zero_() for t in statistics_like(hidden, weight)]
    unit = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    active = (labels != ignore_index).nonzero()[:, 0]
    for rows in active.split(chunk_tokens(hidden, weight, chunk_bytes)):
        args = (hidden[rows], weight, bias, labels[rows], temperature[rows], scale, softcap)
        *chunk, z = linear_logprobs_chunk(*args)
        for total, part in zip(out, chunk, strict=True):
            total[rows] = part
        ones, none = torch.ones_like(chunk[0]), weight.new_empty(0)
        of_chunk = linear_logprobs_chunk_backward(
            z, ones, torch.zeros_like(ones), *args, chunk[2], chunk[1], none, none.clone(), False
        )
        unit[rows] = of_chunk.to(unit.dtype)
    return (*out, unit)


@linear_logprobs_frozen.register_fake
def _(hidden, weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes):
    return (*statistics_like(hidden, weight), hidden.new_empty(hidden.shape))


@custom_op("fused_rl::linear_logprobs_frozen_backward", mutates_args=())
@in_full
def linear_logprobs_frozen_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    unit: Tensor,
) -> Tensor:
    """dhidden. A gradient of the entropy is not in `unit`: its tokens recompute their logits."""
    # where, not the product alone: 0 * NaN is NaN.
    live = (labels != ignore_index) & (dlogprobs != 0)
    scaled = dlogprobs[:, None] * unit.to(dlogprobs.dtype)
    dhidden = scaled.where(live[:, None], 0.0).to(hidden.dtype)
    with_entropy = dentropy != 0
    if with_entropy.any():
        rows = with_entropy.nonzero()[:, 0]
        tokens = (hidden[rows], weight, bias, labels[rows], temperature[rows])
        dhidden[rows], _, _ = linear_logprobs_backward(
            *(dlogprobs[rows], dentropy[rows], *tokens, scale, softcap, ignore_index, chunk_bytes),
            *(lse[rows], entropy[rows], True, False, False),
        )
    return dhidden


@linear_logprobs_frozen_backward.register_fake
def _(dlogprobs, dentropy, hidden, *rest):
    return hidden.new_empty(hidden.shape)


def _linear_logprobs_frozen_grad(ctx, dlogprobs, dentropy, *_):
    hidden, weight, bias, labels, temperature, entropy, lse, unit = ctx.saved_tensors
    dhidden = call(
        linear_logprobs_frozen_backward,
        *materialized(entropy, dlogprobs, dentropy),
        *(hidden, weight, bias, labels, temperature, *ctx.options),
        *(lse, entropy, unit),
    )
    return (dhidden, *(None,) * 8)


register_gradient(
    "linear_logprobs",
    linear_logprobs_frozen,
    linear_logprobs_frozen_backward,
    _linear_logprobs_frozen_grad,
    _save_inputs,
)


@custom_op("fused_rl::linear_logprobs_chunk", mutates_args=())
@in_full
def linear_logprobs_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top and the logits z, for the backward pass that follows at once.

    z [V * N rounded up to 16] is for linear_logprobs_chunk_backward alone: its layout is the
    kernel's own. Labels are all inside the vocabulary.
    """
    return chunked.linear_logprobs_chunk(hidden, weight, bias, labels, temperature, scale, softcap)


@linear_logprobs_chunk.register_fake
def _(hidden, weight, bias, labels, temperature, scale, softcap):
    z = hidden.new_empty(weight.shape[0] * padded(hidden.shape[0]), dtype=acc_dtype(hidden, weight))
    return (*statistics_like(hidden, weight), z)


@custom_op("fused_rl::linear_logprobs_chunk_backward", mutates_args=("dweight", "dbias"))
@in_full
def linear_logprobs_chunk_backward(
    z: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    lse: Tensor,
    entropy: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    accumulate: bool,
) -> Tensor:
    """dhidden [N, H], in float32 where hidden is float16, since the scale of the loss is still to
    come; writes dweight and dbias, or adds to them. Those that are empty are skipped.

    dweight is contiguous, in any floating dtype; dbias has the dtype it likes as well.
    """
    return chunked.linear_logprobs_chunk_backward(
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
    )


@linear_logprobs_chunk_backward.register_fake
def _(z, dlogprobs, dentropy, hidden, *rest):
    return hidden.new_empty(hidden.shape, dtype=kept_dtype(hidden))


@custom_op("fused_rl::logits_logprobs", mutates_args=())
@in_full
def logits_logprobs(
    logits: Tensor, labels: Tensor, temperature: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse from logits [N, V]; one read of them."""
    return chunked.logits_logprobs(logits, labels, temperature, ignore_index)


@logits_logprobs.register_fake
def _(logits, labels, temperature, ignore_index):
    return statistics_like(logits, logits)[:3]


@custom_op("fused_rl::logits_logprobs_backward", mutates_args=())
@in_full
def logits_logprobs_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    """dlogits [N, V], in the dtype of logits."""
    return chunked.logits_logprobs_backward(
        dlogprobs, dentropy, logits, labels, temperature, ignore_index, lse, entropy
    )


@logits_logprobs_backward.register_fake
def _(dlogprobs, dentropy, logits, *rest):
    return logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output) -> None:
    logits, labels, temperature, ctx.ignore_index = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, labels, temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _logits_logprobs_grad(ctx, dlogprobs, dentropy, _):
    logits, labels, temperature, lse, entropy = ctx.saved_tensors
    upstream = materialized(entropy, dlogprobs, dentropy)
    args = (*upstream, logits, labels, temperature, ctx.ignore_index, lse, entropy)
    return call(logits_logprobs_backward, *args), None, None, None


register_gradient(
    "logprobs_from_logits",
    logits_logprobs,
    logits_logprobs_backward,
    _logits_logprobs_grad,
    _save_logits,
)


@custom_op("fused_rl::kl", mutates_args=())
@in_full
def kl(d: Tensor, value_kind: int, slope_kind: int) -> tuple[Tensor, Tensor]:
    """The estimator `value_kind` at d, and the derivative of the estimator `slope_kind` there."""
    return chunked.kl(d, value_kind, slope_kind)


@kl.register_fake
def _(d, value_kind, slope_kind):
    return d.new_empty(d.shape), d.new_empty(d.shape)


def _save_slope(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


@custom_op("fused_rl::kl_backward", mutates_args=())
@in_full
def kl_backward(dvalue: Tensor, slope: Tensor) -> Tensor:
    """dvalue * slope; an op, so that a second derivative, which slope does not hold, raises."""
    return dvalue * slope


@kl_backward.register_fake
def _(dvalue, slope):
    return torch.empty_like(dvalue * slope)


def _kl_grad(ctx, dvalue, _):
    (slope,) = ctx.saved_tensors
    return call(kl_backward, dvalue, slope), None, None


register_gradient("kl_penalty", kl, kl_backward, _kl_grad, _save_slope)


def _load_native() -> str | None:
    """Registers the CPU kernels; returns why they are missing, or None."""
    library = files("fused_rl") / "libfused_rl_cpu.so"
    if not library.is_file():
        return "the C++ library was not built with this installation"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = f"the C++ library does not load into torch {torch.__version__}: {error}"
        warnings.warn(f"fused_rl: {reason}; CPU tensors take the reference", stacklevel=2)
        return reason
    return None


native_missing = _load_native()
