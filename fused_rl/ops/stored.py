"""Log-probs and entropies that keep what they have of the logits: 6 NHV for any loss.

Where that is exponentials in 16 bits: half of what logits would take.
"""

from collections.abc import Callable
from functools import partial
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


@Operator
def linear_logprobs_stored(head: Head, limits: Limits) -> StoredStatistics:
    """linear_logprobs, and room for the logits of all tokens that count until the backward pass."""
    return _formed(linear_logprobs_chunk.plain, head, limits)


def _formed(chunk: Callable, head: Head, limits: Limits) -> StoredStatistics:
    """chunk: linear_logprobs_chunk, or its plain function."""
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    counted = head.labels != limits.ignore_index
    rows = rows_that_count(head.labels, limits.ignore_index)
    # A chunk has labels of the vocabulary alone.
    part = head._replace(labels=head.labels.where(counted, 0)).at(rows)
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
    backward = linear_logprobs_chunk_backward.plain
    return _gradients(backward, upstream, head, limits, known, stored, needs)


def _gradients(
    backward: Callable,
    upstream: Upstream,
    head: Head,
    limits: Limits,
    known: Known,
    stored: Stored,
    needs: Needs,
) -> Gradients:
    """backward: linear_logprobs_chunk_backward, or its plain function."""
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


def _gradients_on_cpu(
    upstream: Upstream,
    head: Head,
    limits: Limits,
    known: Known,
    stored: Stored,
    _: Given,
    needs: Needs,
) -> Gradients:
    backward = linear_logprobs_chunk_backward
    return _gradients(backward, upstream, head, limits, known, stored, needs)


if native.native_missing is None:
    # The C++ kernels are those of a chunk.
    linear_logprobs_stored.kernel("cpu", partial(_formed, linear_logprobs_chunk))
    linear_logprobs_stored_backward.kernel("cpu", _gradients_on_cpu)
