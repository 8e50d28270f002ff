"""The operators under `grad_filter`: log-probs whose backward pass leaves out what hardly matters.

The forward pass keeps the largest logit of each token in each group of 512 words, V / 512 numbers a
token. The backward pass forms, group by group, logits and gradients of those tokens alone that give
one of the group's words a probability of at least `filter`, or have their label in it.

Shapes: as in ops.py; peaks [ceil(V / 512), N].
"""

import math

import torch
from torch import Tensor
from torch.library import custom_op

from fused_rl import ops, reference
from fused_rl.chunked import (
    check_tokens,
    chunk_rows,
    gradients_like,
    in_full,
    log_probabilities,
    raw_gradient,
    statistics,
    statistics_like,
)
from fused_rl.derivatives import call, register_gradient
from fused_rl.reference import acc_dtype

# csrc/problem.h has the same.
FILTER_ROWS = 512


@custom_op("fused_rl::linear_filtered_logprobs", mutates_args=())
@in_full
def linear_filtered_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    filter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top, as without a filter, and peaks. 2 NHV."""
    V = weight.shape[0]
    check_tokens(labels, temperature, V, ignore_index)
    *stats, peaks = _empty(hidden, weight)
    for tensor in stats:
        tensor.zero_()
    peaks.fill_(-torch.inf)
    active = (labels != ignore_index).nonzero()[:, 0]
    for rows in active.split(chunk_rows(V, peaks.dtype, chunk_bytes)):
        z = reference.logits(hidden[rows], weight, bias, temperature[rows], scale, softcap)
        for total, part in zip(stats, statistics(z, labels[rows]), strict=True):
            total[rows] = part
        peaks[:, rows] = torch.stack([part.amax(1) for part in z.split(FILTER_ROWS, 1)])
    return (*stats, peaks)


def _empty(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    groups = -(-weight.shape[0] // FILTER_ROWS)
    peaks = hidden.new_empty((groups, hidden.shape[0]), dtype=acc_dtype(hidden, weight))
    return (*statistics_like(hidden, weight), peaks)


@linear_filtered_logprobs.register_fake
def _(hidden, weight, *rest):
    return _empty(hidden, weight)


@custom_op("fused_rl::linear_filtered_logprobs_backward", mutates_args=())
@in_full
def linear_filtered_logprobs_backward(
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
    filter: float,
    lse: Tensor,
    entropy: Tensor,
    peaks: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias; what is not needed comes back empty.

    6 NHV times the share of pairs (token, group) that take part.
    """
    V, dtype = weight.shape[0], acc_dtype(hidden, weight)
    dhidden = hidden.new_zeros(hidden.shape, dtype=dtype)
    dweight, dbias = weight.new_zeros(weight.shape), weight.new_zeros(V, dtype=dtype)
    live = (labels != ignore_index) & ((dlogprobs != 0) | (dentropy != 0))
    largest = log_probabilities(peaks.T, lse, entropy).T
    # A NaN is above every bound: it must reach the gradient.
    reached = ~(largest < math.log(filter))
    for g, v0 in enumerate(range(0, V, FILTER_ROWS)):
        group = slice(v0, min(v0 + FILTER_ROWS, V))
        rows = (live & (reached[g] | (labels // FILTER_ROWS == g))).nonzero()[:, 0]
        transform = (temperature[rows], scale, softcap)
        of_group = None if bias is None else bias[group]
        z = reference.logits(hidden[rows], weight[group], of_group, *transform)
        logp = log_probabilities(z, lse[rows], entropy[rows])
        known = (dlogprobs[rows], dentropy[rows], entropy[rows])
        draw = raw_gradient(*known, z, logp, labels[rows] - v0, *transform)
        dhidden[rows] += draw @ weight[group].to(dtype)
        dweight[group] = (draw.T @ hidden[rows].to(dtype)).to(weight.dtype)
        dbias[group] = draw.sum(0)
    return (
        dhidden.to(hidden.dtype) if need_dhidden else hidden.new_empty(0),
        dweight if need_dweight else weight.new_empty(0),
        dbias.to(bias.dtype) if need_dbias else weight.new_empty(0),
    )


@linear_filtered_logprobs_backward.register_fake
def _(dlogprobs, dentropy, hidden, weight, bias, *rest):
    return gradients_like(hidden, weight, bias, rest[-3:])


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, temperature, *ctx.options = inputs
    _, entropy, lse, top, peaks = output
    ctx.save_for_backward(hidden, weight, bias, labels, temperature, entropy, lse, peaks)
    ctx.mark_non_differentiable(lse, top, peaks)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dlogprobs, dentropy, *_):
    *inputs, entropy, lse, peaks = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    upstream = ops.materialized(entropy, dlogprobs, dentropy)
    grads = call(
        linear_filtered_logprobs_backward,
        *upstream,
        *inputs,
        *ctx.options,
        lse,
        entropy,
        peaks,
        *needs,
    )
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*wanted, *(None,) * 7)


register_gradient(
    "linear_logprobs", linear_filtered_logprobs, linear_filtered_logprobs_backward, _gradient, _save
)
