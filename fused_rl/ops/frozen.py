"""Log-probs and entropies from hidden states and a head that is not trained: 4 NHV for any loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunk import (
    ChunkLogits,
    ChunkStatistics,
    Sums,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
)
from fused_rl.ops.chunks import check_tokens, chunk_tokens, statistics_like
from fused_rl.ops.formulas import at
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.record import Head, Known, Limits, Needs, Operator, Upstream


class FrozenStatistics(NamedTuple):
    """Statistics, and unit[n] = d logprobs[n] / d hidden[n], which the backward pass only scales.

    Without softcap unit is scale / temperature[n] * (weight[labels[n]] - E_p[weight]).
    """

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor
    unit: Tensor  # [N, H], in the dtype of hidden


class Unit(NamedTuple):
    unit: Tensor


@Operator
def linear_logprobs_frozen(head: Head, limits: Limits) -> FrozenStatistics:
    """linear_logprobs, with the gradient of each log-prob formed while its logits are there."""
    hidden, weight, _, labels, temperature, *_ = head
    check_tokens(labels, temperature, weight.shape[0], limits.ignore_index)
    out = [t.zero_() for t in statistics_like(hidden, weight)]
    unit = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    counted = (labels != limits.ignore_index).nonzero()[:, 0]
    for rows in counted.split(chunk_tokens(hidden, weight, limits.chunk_bytes)):
        part = head.at(rows)
        stats = linear_logprobs_chunk(part)
        for total, of_part in zip(out, stats, strict=False):
            total[rows] = of_part
        unit[rows] = _unit(part, stats).to(unit.dtype)
    return FrozenStatistics(*out, unit)


def _unit(head: Head, stats: ChunkStatistics) -> Tensor:
    ones, none = torch.ones_like(stats.logprobs), head.weight.new_empty(0)
    return linear_logprobs_chunk_backward(
        ChunkLogits(stats.z),
        Upstream(ones, torch.zeros_like(ones)),
        head,
        Known(stats.lse, stats.entropy),
        Sums(none, none.clone(), False),
    )


@linear_logprobs_frozen.fake
def _(head: Head, limits: Limits) -> FrozenStatistics:
    unit = head.hidden.new_empty(head.hidden.shape)
    return FrozenStatistics(*statistics_like(head.hidden, head.weight), unit)


@Operator
def linear_logprobs_frozen_backward(
    upstream: Upstream, head: Head, limits: Limits, known: Known, unit: Unit
) -> Tensor:
    """dhidden. A gradient of the entropy is not in `unit`: its tokens form their logits again."""
    dlogprobs, dentropy = upstream
    # where, not the product alone: 0 * NaN is NaN.
    live = (head.labels != limits.ignore_index) & (dlogprobs != 0)
    scaled = dlogprobs[:, None] * unit.unit.to(dlogprobs.dtype)
    dhidden = scaled.where(live[:, None], 0.0).to(head.hidden.dtype)
    with_entropy = dentropy != 0
    if with_entropy.any():
        rows = with_entropy.nonzero()[:, 0]
        of_rows = (at(rows, upstream), head.at(rows), limits, at(rows, known))
        dhidden[rows] = linear_logprobs_backward(*of_rows, Needs(True, False, False)).dhidden
    return dhidden


@linear_logprobs_frozen_backward.fake
def _(upstream: Upstream, head: Head, limits: Limits, known: Known, unit: Unit) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape)


linear_logprobs_frozen.differentiate(linear_logprobs_frozen_backward, of="linear_logprobs")
