"""Log-probs and entropies that keep what they have of the logits: 6 NHV for any loss.

Where that is exponentials in bfloat16: half of what logits would take.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops import native, trust
from fused_rl.ops.chunk import (
    ChunkLogits,
    Sums,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
    room,
)
from fused_rl.ops.chunks import check_tokens, gradients_like, statistics_like
from fused_rl.ops.formulas import at
from fused_rl.ops.record import Given, Gradients, Head, Known, Limits, Needs, Operator, Upstream


class StoredStatistics(NamedTuple):
    """Statistics of all tokens, and what there is of the logits of those that count."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor
    rows: Tensor  # [n] int64: the tokens that count
    z: Tensor  # of ChunkStatistics, for these


class Stored(NamedTuple):
    rows: Tensor
    z: Tensor


def rows_that_count(labels: Tensor, ignore_index: int) -> Tensor:
    """All of them while a CUDA graph is captured."""
    if trust.capturing(labels.device):
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero()[:, 0]


def _kernel_of(operator: Operator, device: torch.device) -> Operator | Callable:
    """The operator itself on a CPU, for the C++ kernel; elsewhere plain torch, as a kernel that
    keeps something else of the logits stands for all of this.
    """
    return operator if device.type == "cpu" else operator.plain


@Operator
def linear_logprobs_stored(head: Head, limits: Limits) -> StoredStatistics:
    """linear_logprobs, and room for the logits of all tokens that count until the backward pass."""
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    counted = head.labels != limits.ignore_index
    rows = rows_that_count(head.labels, limits.ignore_index)
    # A chunk has labels of the vocabulary alone.
    part = head._replace(labels=head.labels.where(counted, 0)).at(rows)
    chunk = _kernel_of(linear_logprobs_chunk, head.hidden.device)
    *stats, z = chunk(part, Given(False))
    totals = [t.zero_() for t in statistics_like(head.hidden, head.weight)]
    for total, of_part in zip(totals, stats, strict=True):
        total[rows] = of_part
    return StoredStatistics(*(t.where(counted, 0.0) for t in totals), rows, z)


@linear_logprobs_stored.fake
def _(head: Head, limits: Limits) -> StoredStatistics:
    # As if all of them counted.
    z = room(head, Given(False))
    rows = head.labels.new_empty(head.labels.shape)
    return StoredStatistics(*statistics_like(head.hidden, head.weight), rows, z)


@Operator
def linear_logprobs_stored_backward(
    upstream: Upstream,
    head: Head,
    limits: Limits,
    known: Known,
    stored: Stored,
    given: Given,
    needs: Needs,
) -> Gradients:
    """In plain torch the logits are the same for a second call; a kernel leaves them so, too."""
    hidden, weight, bias, labels, *_ = head
    counted = labels != limits.ignore_index
    part = head._replace(labels=labels.where(counted, 0)).at(stored.rows)
    up = Upstream(*(g.where(counted, 0.0)[stored.rows] for g in upstream))
    size = weight.shape if needs.need_dweight else (0,)
    dweight = native.empty(weight, *size, dtype=weight.dtype)
    of_bias = bias.dtype if needs.need_dbias else weight.dtype
    dbias = weight.new_empty(weight.shape[0] if needs.need_dbias else 0, dtype=of_bias)
    of_rows = (ChunkLogits(stored.z), up, part, at(stored.rows, known), Sums(dweight, dbias, False))
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    backward = _kernel_of(linear_logprobs_chunk_backward, hidden.device)
    dhidden[stored.rows] = backward(*of_rows).to(hidden.dtype)
    return Gradients(dhidden if needs.need_dhidden else hidden.new_empty(0), dweight, dbias)


@linear_logprobs_stored_backward.fake
def _(
    upstream: Upstream,
    head: Head,
    limits: Limits,
    known: Known,
    stored: Stored,
    given: Given,
    needs: Needs,
) -> Gradients:
    return gradients_like(head, needs)


linear_logprobs_stored.differentiate(linear_logprobs_stored_backward, of="linear_logprobs")
