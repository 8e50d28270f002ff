"""Log-probs renormalised over kept sets, beside those over the vocabulary.

    kept_logprobs[n] = z[n, label] - log sum_{v in kept[n]} exp z[n, v]
    slope[n, v]      = d kept_logprobs[n] / d (hidden[n] . weight[v]),    v in kept[n]

The kernel for CPUs (csrc/kept.cpp) takes the kept logits out of the pass over the whole vocabulary.
Elsewhere the other two statistics come from the operators of linear_logprobs, whichever kernel
those have, and the kept logits are formed once more, as pairs.py has it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.chunk import Sums
from fused_rl.ops.chunks import gradients_like, statistics_like
from fused_rl.ops.kept_sets import Pairs, Sets, check_offsets, wrong_tokens
from fused_rl.ops.linear import linear_logprobs, linear_logprobs_backward
from fused_rl.ops.pairs import add_pairs, pair_logits
from fused_rl.ops.record import Gradients, Head, Known, Limits, Needs, Operator, Upstream


class KeptHead(NamedTuple):
    """Head, with a kept set beside each label."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    kept: Tensor  # [M] int64
    cu_kept: Tensor  # [N + 1] int64
    temperature: Tensor  # [N]
    scale: float
    softcap: float
    rounding: int = 0

    @classmethod
    def of(cls, head: Head, sets: Sets) -> "KeptHead":
        return cls(*head[:4], *sets, *head[4:])

    def parts(self) -> tuple[Head, Sets]:
        return Head(*self[:4], *self[6:]), Sets(self.kept, self.cu_kept)

    @property
    def dtype(self) -> torch.dtype:
        """What the logits are formed in."""
        return self.parts()[0].dtype

    def at(self, rows: Tensor | slice) -> "KeptHead":
        """The same for some of the tokens."""
        head, sets = self.parts()
        return self.of(head.at(rows), Sets(*reference.kept_at(*sets, rows)))


class KeptStatistics(NamedTuple):
    """logprobs, entropy and lse as in Statistics."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    kept_logprobs: Tensor  # [N]
    slope: Tensor  # [M]


class KeptUpstream(NamedTuple):
    dlogprobs: Tensor
    dentropy: Tensor
    dkept_logprobs: Tensor


class Slope(NamedTuple):
    slope: Tensor


@Operator
def linear_kept_logprobs(head: KeptHead, limits: Limits) -> KeptStatistics:
    """2 NHV, and 6 more in the backward pass; M H instead for a loss of kept_logprobs alone."""
    head, sets = head.parts()
    logprobs, entropy, lse, _ = linear_logprobs(head, limits)
    if not sets.kept.is_cuda:
        check_offsets(sets.cu_kept, len(sets.kept))
    if len(head.labels) == 0:
        slope = torch.empty_like(sets.kept, dtype=logprobs.dtype)
        return KeptStatistics(logprobs, entropy, lse, torch.empty_like(logprobs), slope)
    return KeptStatistics(logprobs, entropy, lse, *renormalised(head, sets, limits))


def renormalised(head: Head, sets: Sets, limits: Limits) -> tuple[Tensor, Tensor]:
    """kept_logprobs [N] and slope [M]."""
    V, labels = head.weight.shape[0], head.labels
    pairs = Pairs.of(sets, V)
    wrong = wrong_tokens(labels, sets.kept, pairs, V, limits.ignore_index)
    z = pair_logits(head, pairs.token, pairs.entry, limits.chunk_bytes).double()
    largest = pairs.over_sets(z, "max")
    weights = (z - largest[pairs.token]).exp()
    total = pairs.over_sets(weights, "sum")
    is_label = pairs.entry == labels[pairs.token]
    at_label = pairs.over_sets(z.masked_fill(~is_label, 0.0), "sum")
    kept_logprobs = (at_label - largest - total.log()).masked_fill(wrong, torch.nan)
    slope = is_label.double() - weights / total[pairs.token]
    t = head.temperature.double()[pairs.token]
    if head.softcap:
        slope = slope * (1 - (z * t / head.softcap) ** 2)
    slope = (slope * (head.scale / t)).masked_fill(wrong[pairs.token], torch.nan)
    counted = labels != limits.ignore_index
    kept_logprobs, slope = kept_logprobs.where(counted, 0.0), slope.where(counted[pairs.token], 0.0)
    return kept_logprobs.to(head.dtype), slope.to(head.dtype)


def add_to_chunk(
    dhidden: Tensor,  # [N, H]
    sums: Sums,
    dkept_logprobs: Tensor,  # [N]
    head: Head,
    sets: Sets,
    slope: Tensor,  # [M]
    limits: Limits,
) -> None:
    """Adds what dkept_logprobs is of the gradients of a chunk of tokens: M H."""
    grads = Gradients(dhidden, sums.dweight, sums.dbias)
    needs = Needs(True, sums.dweight.numel() > 0, sums.dbias.numel() > 0)
    _add(grads, dkept_logprobs, head, sets, slope, limits, needs)


def _add(
    grads: Gradients,
    dkept_logprobs: Tensor,  # [N]
    head: Head,
    sets: Sets,
    slope: Tensor,  # [M]
    limits: Limits,
    needs: Needs,
) -> None:
    pairs = Pairs.of(sets, head.weight.shape[0])
    up = dkept_logprobs.where(head.labels != limits.ignore_index, 0.0)[pairs.token]
    add_pairs(grads, head, pairs.token, pairs.entry, up * slope, up != 0, limits, needs)


@linear_kept_logprobs.fake
def _(head: KeptHead, limits: Limits) -> KeptStatistics:
    logprobs, entropy, lse, _ = statistics_like(head.hidden, head.weight)
    of_sets = (torch.empty_like(logprobs), logprobs.new_empty(head.kept.shape))
    return KeptStatistics(logprobs, entropy, lse, *of_sets)


@Operator
def linear_kept_logprobs_backward(
    upstream: KeptUpstream,
    head: KeptHead,
    limits: Limits,
    known: Known,
    slope: Slope,
    needs: Needs,
) -> Gradients:
    """Tokens whose upstream gradients are all 0 cost nothing."""
    head, sets = head.parts()
    grads = linear_logprobs_backward(Upstream(*upstream[:2]), head, limits, known, needs)
    _add(grads, upstream.dkept_logprobs, head, sets, slope.slope, limits, needs)
    return grads


@linear_kept_logprobs_backward.fake
def _(upstream, head: KeptHead, limits, known, slope, needs: Needs) -> Gradients:
    return gradients_like(head.parts()[0], needs)


linear_kept_logprobs.differentiate(linear_kept_logprobs_backward, of="linear_kept_logprobs")
