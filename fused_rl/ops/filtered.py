"""Log-probs under `grad_filter`: their backward pass leaves out what hardly matters.

The forward pass keeps the largest logit of each token in each group of 512 vocabulary entries,
V / 512 numbers a token. The backward pass forms, group by group, logits and gradients of those
tokens alone that give an entry of the group a probability of at least `filter`, or have their label
in it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunks import check_tokens, chunks_of, gradients_like, statistics_like
from fused_rl.ops.formulas import at, live, log_probabilities, raw_gradient, statistics
from fused_rl.ops.record import Gradients, Head, Known, Limits, Needs, Operator, Upstream

# csrc/problem.h has the same.
FILTER_ROWS = 512


class Filter(NamedTuple):
    filter: float


class FilteredStatistics(NamedTuple):
    """Statistics, as without a filter, and peaks."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor
    peaks: Tensor  # [ceil(V / 512), N]


class Peaks(NamedTuple):
    peaks: Tensor


@Operator
def linear_filtered_logprobs(head: Head, limits: Limits, filter: Filter) -> FilteredStatistics:
    """2 NHV."""
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    *stats, peaks = _room(head)
    for tensor in stats:
        tensor.zero_()
    peaks.fill_(-torch.inf)
    for rows in chunks_of(head.labels != limits.ignore_index, head, limits.chunk_bytes):
        part = head.at(rows)
        z = part.logits()
        for total, of_part in zip(stats, statistics(z, part.labels), strict=True):
            total[rows] = of_part
        peaks[:, rows] = torch.stack([group.amax(1) for group in z.split(FILTER_ROWS, 1)])
    return FilteredStatistics(*stats, peaks)


def _room(head: Head) -> FilteredStatistics:
    hidden, weight, *_ = head
    groups = -(-weight.shape[0] // FILTER_ROWS)
    peaks = hidden.new_empty((groups, hidden.shape[0]), dtype=head.dtype)
    return FilteredStatistics(*statistics_like(hidden, weight), peaks)


@linear_filtered_logprobs.fake
def _(head: Head, limits: Limits, filter: Filter) -> FilteredStatistics:
    return _room(head)


@Operator
def linear_filtered_logprobs_backward(
    upstream: Upstream,
    head: Head,
    limits: Limits,
    filter: Filter,
    known: Known,
    peaks: Peaks,
    needs: Needs,
) -> Gradients:
    """6 NHV times the share of pairs (token, group) that take part."""
    hidden, weight, bias, labels, *_ = head
    V, dtype = weight.shape[0], head.dtype
    dhidden = hidden.new_zeros(hidden.shape, dtype=dtype)
    dweight, dbias = weight.new_zeros(weight.shape), weight.new_zeros(V, dtype=dtype)
    chosen = live(upstream, labels, limits.ignore_index)
    largest = log_probabilities(peaks.peaks.T, known).T
    # A NaN is above every bound: it must reach the gradient.
    reached = ~(largest < math.log(filter.filter))
    for g, v0 in enumerate(range(0, V, FILTER_ROWS)):
        group = slice(v0, min(v0 + FILTER_ROWS, V))
        rows = (chosen & (reached[g] | (labels // FILTER_ROWS == g))).nonzero()[:, 0]
        part = _group(head.at(rows), group)
        z, of_rows = part.logits(), at(rows, known)
        logp = log_probabilities(z, of_rows)
        draw = raw_gradient(at(rows, upstream), of_rows.entropy, part, z, logp)
        dhidden[rows] += draw @ part.weight.to(dtype)
        dweight[group] = (draw.T @ part.hidden.to(dtype)).to(weight.dtype)
        dbias[group] = draw.sum(0)
    return Gradients(
        dhidden.to(hidden.dtype) if needs.need_dhidden else hidden.new_empty(0),
        dweight if needs.need_dweight else weight.new_empty(0),
        dbias.to(bias.dtype) if needs.need_dbias else weight.new_empty(0),
    )


def _group(head: Head, group: slice) -> Head:
    """The head of some vocabulary entries, with labels counted from the first of them."""
    bias = None if head.bias is None else head.bias[group]
    return head._replace(weight=head.weight[group], bias=bias, labels=head.labels - group.start)


@linear_filtered_logprobs_backward.fake
def _(upstream, head: Head, limits, filter, known, peaks, needs: Needs) -> Gradients:
    return gradients_like(head, needs)


linear_filtered_logprobs.differentiate(linear_filtered_logprobs_backward, of="linear_logprobs")
