"""Log-probs at several vocabulary entries per token, and the logits of those entries alone.

    logprobs[n, k] = z[n, ids[n, k]] - lse[n]
    dz[n, v]       = sum_k dlogprobs[n, k] 1[v = ids[n, k]] - total[n] p - dentropy[n] p (log p + H)
    total[n]       = sum_k dlogprobs[n, k] - dlse[n]

So over the whole vocabulary it is the gradient of linear_logprobs for an upstream gradient of
total, without a label; the rest lies at the pairs (token, id). The kernel for CPUs (csrc/at.cpp)
takes the logits at the ids out of the pass over the vocabulary, and adds their terms to its draw.
On CUDA that pass is the one of linear_logprobs, whichever kernel it has, and the logits are formed
once more, as pairs.py has it. The gradient is then rounded once more than it need be, where both
parts meet.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunks import check_tokens, chunks_of, gradients_like, statistics_like
from fused_rl.ops.formulas import (
    add_products,
    at,
    live,
    log_probabilities,
    of_product,
    softmax_gradient,
    statistics,
)
from fused_rl.ops.kept import Slope
from fused_rl.ops.linear import linear_logprobs, linear_logprobs_backward
from fused_rl.ops.pairs import add_pairs, pair_logits
from fused_rl.ops.record import Gradients, Head, Known, Limits, Needs, Operator, Upstream

# Labels that no vocabulary has: of a token that counts and has none, and of one that does not.
NO_LABEL, IGNORED = -1, -2


class AtHead(NamedTuple):
    """Head, with several ids in the place of the label."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ids: Tensor  # [N, K] int64
    temperature: Tensor  # [N]
    scale: float
    softcap: float
    rounding: int = 0

    @classmethod
    def of(cls, head: Head, ids: Tensor) -> "AtHead":
        return cls(*head[:3], ids, *head[4:])

    def labelled(self, label: int, ignore_index: int) -> Head:
        """The head with this label for every token that has an id."""
        counted = (self.ids != ignore_index).any(-1)
        labels = torch.full_like(counted, IGNORED, dtype=torch.long).masked_fill(counted, label)
        return Head(*self[:3], labels, *self[4:])


class Chosen(NamedTuple):
    """The ids as pairs (token, entry), safe to index with, [N * K] each."""

    token: Tensor
    entry: Tensor
    counted: Tensor  # bool: not ignored
    wrong: Tensor  # bool: counted, and outside the vocabulary

    @classmethod
    def of(cls, ids: Tensor, vocabulary: int, ignore_index: int) -> "Chosen":
        N, K = ids.shape
        token = torch.arange(N, device=ids.device).repeat_interleave(K)
        entry = ids.reshape(-1)
        counted, inside = entry != ignore_index, entry.clamp(0, vocabulary - 1)
        return cls(token, inside, counted, counted & (entry != inside))


class AtStatistics(NamedTuple):
    """lse and entropy as in Statistics; logits are for the backward pass."""

    logprobs: Tensor  # [N, K]
    lse: Tensor
    entropy: Tensor
    logits: Tensor  # [N, K]


class AtUpstream(NamedTuple):
    dlogprobs: Tensor
    dlse: Tensor
    dentropy: Tensor


class AtLogits(NamedTuple):
    logits: Tensor


class Picked(NamedTuple):
    """[N, K] each. slope is the derivative of a logit with respect to its product."""

    logits: Tensor
    slope: Tensor


class PickedUpstream(NamedTuple):
    dlogits: Tensor


@Operator
def linear_logprobs_at(head: AtHead, limits: Limits) -> AtStatistics:
    """2 NHV, and 6 more in the backward pass; N K H instead where only pairs have a gradient."""
    ids = _checked(head, limits).entry.view(head.ids.shape)
    labelled = head.labelled(0, limits.ignore_index)
    check_tokens(labelled.labels, head.temperature, head.weight.shape[0], IGNORED)
    out = AtStatistics(*(t.zero_() for t in _statistics_like(head)))
    for rows in chunks_of(labelled.labels != IGNORED, labelled, limits.chunk_bytes):
        part = labelled.at(rows)
        z = part.logits()
        _, entropy, lse, _ = statistics(z, part.labels)
        counted = head.ids[rows] != limits.ignore_index
        picked = z.gather(-1, ids[rows]).where(counted, 0.0)
        logprobs = log_probabilities(picked, Known(lse, entropy)).where(counted, 0.0)
        for total, of_part in zip(out, (logprobs, lse, entropy, picked), strict=True):
            total[rows] = of_part
    return out


def by_pairs(head: AtHead, limits: Limits) -> AtStatistics:
    """linear_logprobs_at from the pass of linear_logprobs, and logits formed once more."""
    # Any entry of the vocabulary is a label: what belongs to it is not used.
    of_label = linear_logprobs(head.labelled(0, limits.ignore_index), _limits(limits))
    z = _picked_logits(head, _checked(head, limits), limits)
    logprobs = log_probabilities(z, Known(of_label.lse, of_label.entropy))
    logprobs = logprobs.where(head.ids != limits.ignore_index, 0.0)
    return AtStatistics(logprobs, of_label.lse, of_label.entropy, z)


linear_logprobs_at.kernel("cuda", by_pairs)


def _statistics_like(head: AtHead) -> AtStatistics:
    of_token, entropy, lse, _ = statistics_like(head.hidden, head.weight)
    logprobs, logits = (of_token.new_empty(head.ids.shape) for _ in range(2))
    return AtStatistics(logprobs, lse, entropy, logits)


def _limits(limits: Limits) -> Limits:
    return Limits(IGNORED, limits.chunk_bytes)


def _checked(head: AtHead, limits: Limits) -> Chosen:
    """ValueError at the first id outside the vocabulary; not on CUDA: see check_tokens."""
    chosen = Chosen.of(head.ids, head.weight.shape[0], limits.ignore_index)
    if not head.ids.is_cuda and chosen.wrong.any():
        i = int(chosen.wrong.nonzero()[0])
        raise ValueError(
            f"ids[{i}] is {int(head.ids.reshape(-1)[i])}, outside the vocabulary "
            f"[0, {head.weight.shape[0]}) and not ignore_index ({limits.ignore_index})"
        )
    return chosen


def _picked_logits(head: AtHead, chosen: Chosen, limits: Limits) -> Tensor:  # [N, K]
    of_label = head.labelled(NO_LABEL, limits.ignore_index)
    z = pair_logits(of_label, chosen.token, chosen.entry, limits.chunk_bytes)
    z = z.masked_fill(chosen.wrong, torch.nan).where(chosen.counted, 0.0)
    return z.view(head.ids.shape)


@linear_logprobs_at.fake
def _(head: AtHead, limits: Limits) -> AtStatistics:
    return _statistics_like(head)


def _slope(head: AtHead, z: Tensor) -> Tensor:
    """d z / d (hidden . weight), [N, K]."""
    t = head.temperature.to(z.dtype)
    return of_product(torch.ones_like(z), head.labelled(NO_LABEL, 0)._replace(temperature=t), z)


@Operator
def linear_logprobs_at_backward(
    upstream: AtUpstream,
    head: AtHead,
    limits: Limits,
    known: Known,
    picked: AtLogits,
    needs: Needs,
) -> Gradients:
    """Tokens whose upstream gradients are all 0 cost nothing."""
    hidden, weight, bias, *_ = head
    of_all, dlogprobs = _upstream(upstream, head, limits)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape if needs.need_dweight else 0, dtype=dlogprobs.dtype)
    dbias = weight.new_zeros(weight.shape[0] if needs.need_dbias else 0, dtype=torch.float64)
    ids = Chosen.of(head.ids, weight.shape[0], limits.ignore_index).entry.view(head.ids.shape)
    no_label = head.labelled(NO_LABEL, limits.ignore_index)
    chosen = live(of_all, no_label.labels, IGNORED) | (dlogprobs != 0).any(-1)
    for rows in chunks_of(chosen, no_label, limits.chunk_bytes):
        part = no_label.at(rows)
        z = part.logits()
        of_part = (at(rows, of_all), known.entropy[rows], torch.log_softmax(z, -1), part.labels)
        dz = softmax_gradient(*of_part).scatter_add(-1, ids[rows], dlogprobs[rows])
        draw = of_product(dz, part, z)
        dhidden[rows] = add_products(draw, part, dweight, dbias).to(hidden.dtype)
    return Gradients(
        dhidden if needs.need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype),
        dbias.to(bias.dtype if needs.need_dbias else weight.dtype),
    )


def by_pairs_backward(
    upstream: AtUpstream,
    head: AtHead,
    limits: Limits,
    known: Known,
    picked: AtLogits,
    needs: Needs,
) -> Gradients:
    """The backward pass of linear_logprobs, and what belongs to the pairs added to it."""
    of_all, dlogprobs = _upstream(upstream, head, limits)
    no_label = head.labelled(NO_LABEL, limits.ignore_index)
    grads = linear_logprobs_backward(of_all, no_label, _limits(limits), known, needs)
    _add_at(grads, head, dlogprobs * _slope(head, picked.logits), dlogprobs != 0, limits, needs)
    return grads


linear_logprobs_at_backward.kernel("cuda", by_pairs_backward)


def _upstream(upstream: AtUpstream, head: AtHead, limits: Limits) -> tuple[Upstream, Tensor]:
    """What reaches the whole vocabulary, as if of a label; and dlogprobs, 0 where ignored."""
    dlogprobs = upstream.dlogprobs.where(head.ids != limits.ignore_index, 0.0)
    total = dlogprobs.double().sum(-1) - upstream.dlse
    return Upstream(total.to(dlogprobs.dtype), upstream.dentropy), dlogprobs


def _add_at(
    grads: Gradients, head: AtHead, draw: Tensor, live: Tensor, limits: Limits, needs: Needs
) -> None:
    """Adds what belongs to draw [N, K], the gradients of the products at the ids."""
    chosen = Chosen.of(head.ids, head.weight.shape[0], limits.ignore_index)
    draw = draw.reshape(-1).masked_fill(chosen.wrong, torch.nan)
    no_label = head.labelled(NO_LABEL, limits.ignore_index)
    pairs = (chosen.token, chosen.entry, draw, live.reshape(-1) & chosen.counted)
    add_pairs(grads, no_label, *pairs, limits, needs)


@linear_logprobs_at_backward.fake
def _(upstream, head: AtHead, limits: Limits, known, picked, needs: Needs) -> Gradients:
    return gradients_like(head.labelled(NO_LABEL, limits.ignore_index), needs)


linear_logprobs_at.differentiate(linear_logprobs_at_backward, of="linear_logprobs_at")


@Operator
def linear_logits_at(head: AtHead, limits: Limits) -> Picked:
    """N K H: no pass over the vocabulary, and none in the backward pass."""
    chosen = _checked(head, limits)
    no_label = head.labelled(0, limits.ignore_index)
    check_tokens(no_label.labels, head.temperature, head.weight.shape[0], IGNORED)
    z = _picked_logits(head, chosen, limits)
    return Picked(z, _slope(head, z).where(chosen.counted.view(z.shape), 0.0))


@linear_logits_at.fake
def _(head: AtHead, limits: Limits) -> Picked:
    of_token = statistics_like(head.hidden, head.weight).logprobs
    return Picked(*(of_token.new_empty(head.ids.shape) for _ in range(2)))


@Operator
def linear_logits_at_backward(
    upstream: PickedUpstream, head: AtHead, limits: Limits, picked: Slope, needs: Needs
) -> Gradients:
    """Zeros, and the products at the ids."""
    no_label = head.labelled(NO_LABEL, limits.ignore_index)
    grads = Gradients(*(g.zero_() for g in gradients_like(no_label, needs)))
    draw = upstream.dlogits * picked.slope
    _add_at(grads, head, draw, upstream.dlogits != 0, limits, needs)
    return grads


@linear_logits_at_backward.fake
def _(upstream, head: AtHead, limits: Limits, picked, needs: Needs) -> Gradients:
    return gradients_like(head.labelled(NO_LABEL, limits.ignore_index), needs)


linear_logits_at.differentiate(linear_logits_at_backward, of="linear_logits_at")
