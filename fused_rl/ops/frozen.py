"""Log-probs and entropies from hidden states and a head that is not trained: 4 NHV for any loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops import native
from fused_rl.ops.chunk import ChunkLogits, linear_logprobs_chunk, linear_logprobs_chunk_unit
from fused_rl.ops.chunks import check_tokens, chunk_tokens, counted_rows, statistics_like
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.record import Given, Head, Known, Limits, Needs, Operator, Upstream


class FrozenStatistics(NamedTuple):
    """Statistics, and unit[n] = d logprobs[n] / d hidden[n], which the backward pass only scales.

    Without softcap unit is scale / temperature[n] * (weight[labels[n]] - E_p[weight]).
    """

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor
    unit: Tensor  # [N, H], in the dtype of hidden


def walks_once(device: torch.device) -> bool:
    """Whether linear_logprobs_frozen holds no logits there: the C++ kernels, in whatever dtype."""
    return device.type == "cpu" and native.native_missing is None


# Tokens whose gradient is scaled at a time on a CPU.
SCALED_ROWS = 256


class Unit(NamedTuple):
    unit: Tensor


@Operator
def linear_logprobs_frozen(head: Head, limits: Limits) -> FrozenStatistics:
    """linear_logprobs, with the gradient of each log-prob formed while its logits are there."""
    hidden, weight, _, labels, temperature, *_ = head
    check_tokens(labels, temperature, weight.shape[0], limits.ignore_index)
    totals = [t.zero_() for t in statistics_like(hidden, weight)]
    totals.append(torch.zeros_like(hidden, memory_format=torch.contiguous_format))
    counted = labels != limits.ignore_index
    chunks = counted_rows(counted, chunk_tokens(hidden, weight, limits.chunk_bytes))
    all_there = any(isinstance(rows, slice) for rows in chunks)
    # A chunk has labels of the vocabulary alone.
    head = head._replace(labels=labels.where(counted, 0)) if all_there else head
    for rows in chunks:
        for total, of_part in zip(totals, _statistics(head.at(rows)), strict=True):
            total[rows] = of_part.to(total.dtype)
    if all_there:
        *vectors, unit = totals
        totals = [*(t.where(counted, 0.0) for t in vectors), unit.where(counted[:, None], 0.0)]
    return FrozenStatistics(*totals)


def _statistics(head: Head) -> FrozenStatistics:
    """Of a chunk."""
    *stats, z = linear_logprobs_chunk(head, Given(False))
    _, entropy, lse, _ = stats
    return FrozenStatistics(
        *stats, linear_logprobs_chunk_unit(ChunkLogits(z), head, Known(lse, entropy))
    )


@linear_logprobs_frozen.fake
def _(head: Head, limits: Limits) -> FrozenStatistics:
    unit = head.hidden.new_empty(head.hidden.shape)
    return FrozenStatistics(*statistics_like(head.hidden, head.weight), unit)


@Operator
def linear_logprobs_frozen_backward(
    upstream: Upstream, head: Head, limits: Limits, known: Known, unit: Unit, given: Given
) -> Tensor:
    """dhidden. A gradient of the entropy is not in `unit`: its tokens form their logits again."""
    dlogprobs, dentropy = upstream
    live = (head.labels != limits.ignore_index) & (dlogprobs != 0)
    dhidden = torch.empty_like(unit.unit)
    # A part at a time on a CPU: in float32 the whole would be twice what it is rounded to.
    rows = SCALED_ROWS if dhidden.device.type == "cpu" else max(1, len(dhidden))
    for to, by, of, alive in zip(
        *(t.split(rows) for t in (dhidden, dlogprobs, unit.unit, live)), strict=True
    ):
        # Not the product alone: 0 * NaN is NaN.
        to.copy_((by[:, None] * of).masked_fill_(~alive[:, None], 0.0))
    if not given.has_dentropy:
        return dhidden
    # Those without one have no upstream gradient at all here, and cost nothing.
    with_entropy = dentropy != 0
    of_these = Upstream(dlogprobs.where(with_entropy, 0.0), dentropy)
    formed = linear_logprobs_backward(of_these, head, limits, known, Needs(True, False, False))
    return torch.where(with_entropy[:, None], formed.dhidden, dhidden)


@linear_logprobs_frozen_backward.fake
def _(
    upstream: Upstream, head: Head, limits: Limits, known: Known, unit: Unit, given: Given
) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape)


linear_logprobs_frozen.differentiate(linear_logprobs_frozen_backward, of="linear_logprobs")
