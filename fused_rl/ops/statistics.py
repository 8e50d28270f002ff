"""Log-probs and entropies, and what else is asked of the logits while they are there: 2 NHV.

    collision[n]  = sum_v p[n, v]^2
    mean_logit[n] = 1/V sum_v z[n, v]
    top_ids[n]    = the entries with the largest logits, from the largest on

Of these none has a gradient. lse has one, dz = dlse p: that of a token whose log-prob has dlogprobs
at its label and dlogprobs - dlse at p, which is what at.py has for any number of entries. So a loss
that leaves lse alone has the backward pass of linear_logprobs, or of linear_logprobs_stored, and
one that does not that of linear_logprobs_at.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.at import AtHead, AtLogits, AtUpstream, linear_logprobs_at_backward
from fused_rl.ops.chunk import room
from fused_rl.ops.chunks import check_tokens, chunks_of, gradients_like, statistics_like
from fused_rl.ops.formulas import add_gradients, at, log_probabilities, of_product, statistics
from fused_rl.ops.frozen import Unit, linear_logprobs_frozen_backward
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.record import Given, Gradients, Head, Known, Limits, Needs, Operator, Upstream
from fused_rl.ops.stored import Stored, linear_logprobs_stored, linear_logprobs_stored_backward


class Asked(NamedTuple):
    """top: how many of the most likely entries."""

    with_collision: bool
    with_mean_logit: bool
    top: int


class AskedStatistics(NamedTuple):
    """As in Statistics; what was not asked for is empty."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    collision: Tensor  # [N]
    mean_logit: Tensor  # [N]
    top_ids: Tensor  # [N, top] int64; of ties the first, on CUDA any
    top_logprobs: Tensor  # [N, top]


class FrozenAskedStatistics(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    collision: Tensor
    mean_logit: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    unit: Tensor  # [N, H]: see frozen.py


class StoredAskedStatistics(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    collision: Tensor
    mean_logit: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    rows: Tensor  # with z: see StoredStatistics
    z: Tensor


class AskedUpstream(NamedTuple):
    dlogprobs: Tensor
    dentropy: Tensor
    dlse: Tensor


class KnownLabels(NamedTuple):
    """Known, and the log-probs, from which the labels' logits are had again."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor

    @property
    def known(self) -> Known:
        return Known(self.lse, self.entropy)

    def at_labels(self) -> Tensor:  # [N], the logits
        return (self.logprobs + self.lse).to(self.logprobs.dtype)


class AskedGiven(NamedTuple):
    """Whether a loss depends on these at all."""

    has_dentropy: bool
    has_dlse: bool


def asked_like(head: Head, asked: Asked) -> AskedStatistics:
    """Uninitialised."""
    logprobs, entropy, lse, _ = statistics_like(head.hidden, head.weight)
    N = len(head.labels)
    return AskedStatistics(
        *(logprobs, entropy, lse),
        logprobs.new_empty(N if asked.with_collision else 0),
        logprobs.new_empty(N if asked.with_mean_logit else 0),
        head.labels.new_empty(N, asked.top),
        logprobs.new_empty(N, asked.top),
    )


def of_logits(z: Tensor, labels: Tensor, asked: Asked) -> AskedStatistics:
    """Of logits [N, V], in plain torch."""
    logprobs, entropy, lse, _ = statistics(z, labels)
    none = z.new_empty(0)
    collision = (2 * torch.log_softmax(z, -1)).exp().sum(-1) if asked.with_collision else none
    mean_logit = z.mean(-1) if asked.with_mean_logit else none.clone()
    values, ids = largest(z, asked.top)
    of_top = log_probabilities(values, Known(lse, entropy))
    return AskedStatistics(logprobs, entropy, lse, collision, mean_logit, ids, of_top)


def largest(z: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row [N, top], in order, and their places; of ties the first."""
    if top == 1:
        return z.max(-1, keepdim=True)
    if top == 0:
        return z[:, :0], torch.empty_like(z[:, :0], dtype=torch.int64)
    # Stable, as topk is not.
    values, ids = z.sort(stable=True, dim=-1, descending=True)
    return values[:, :top], ids[:, :top]


def put(total: tuple[Tensor, ...], rows: Tensor, part: tuple[Tensor, ...]) -> None:
    """What was found of some tokens, where those are among all; not what was not asked for."""
    for to, of_part in zip(total, part, strict=True):
        if len(to):
            to[rows] = of_part.to(to.dtype)


@Operator
def linear_statistics(head: Head, asked: Asked, limits: Limits) -> AskedStatistics:
    """Nothing of size V is kept."""
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    out = AskedStatistics(*(t.zero_() for t in asked_like(head, asked)))
    for rows in chunks_of(head.labels != limits.ignore_index, head, limits.chunk_bytes):
        part = head.at(rows)
        put(out, rows, of_logits(part.logits(), part.labels, asked))
    return out


@linear_statistics.fake
def _(head: Head, asked: Asked, limits: Limits) -> AskedStatistics:
    return asked_like(head, asked)


@Operator
def linear_statistics_backward(
    upstream: AskedUpstream,
    head: Head,
    limits: Limits,
    known: KnownLabels,
    given: AskedGiven,
    needs: Needs,
) -> Gradients:
    """Tokens whose upstream gradients are all 0 cost nothing."""
    dlogprobs, dentropy, dlse = upstream
    if not given.has_dlse:
        of_two = Upstream(dlogprobs, dentropy)
        return linear_logprobs_backward(of_two, head, limits, known.known, needs)
    return linear_logprobs_at_backward(
        AtUpstream(dlogprobs[:, None], dlse, dentropy),
        AtHead.of(head, head.labels[:, None]),
        limits,
        known.known,
        AtLogits(known.at_labels()[:, None]),
        needs,
    )


@linear_statistics_backward.fake
def _(upstream, head: Head, limits, known, given, needs: Needs) -> Gradients:
    return gradients_like(head, needs)


linear_statistics.differentiate(linear_statistics_backward, of="linear_statistics")


@Operator
def linear_statistics_stored(head: Head, asked: Asked, limits: Limits) -> StoredAskedStatistics:
    """linear_statistics, and what there is of the logits for the backward pass: 2 NHV on CPUs.

    In plain torch 4 NHV, of two operators.
    """
    stats, stored = linear_statistics(head, asked, limits), linear_logprobs_stored(head, limits)
    return StoredAskedStatistics(*stats, stored.rows, stored.z)


@linear_statistics_stored.fake
def _(head: Head, asked: Asked, limits: Limits) -> StoredAskedStatistics:
    # As if all tokens counted.
    rows, z = head.labels.new_empty(head.labels.shape), room(head, Given(False))
    return StoredAskedStatistics(*asked_like(head, asked), rows, z)


@Operator
def linear_statistics_stored_backward(
    upstream: AskedUpstream,
    head: Head,
    limits: Limits,
    known: KnownLabels,
    stored: Stored,
    given: AskedGiven,
    needs: Needs,
) -> Gradients:
    """With a gradient of lse, that of linear_statistics: the logits are formed again."""
    if given.has_dlse:
        return linear_statistics_backward(upstream, head, limits, known, given, needs)
    of_two, has = Upstream(upstream.dlogprobs, upstream.dentropy), Given(given.has_dentropy)
    return linear_logprobs_stored_backward(of_two, head, limits, known.known, stored, has, needs)


@linear_statistics_stored_backward.fake
def _(upstream, head: Head, limits, known, stored, given, needs: Needs) -> Gradients:
    return gradients_like(head, needs)


linear_statistics_stored.differentiate(linear_statistics_stored_backward, of="linear_statistics")


@Operator
def linear_statistics_frozen(head: Head, asked: Asked, limits: Limits) -> FrozenAskedStatistics:
    """linear_statistics, and the gradient of each log-prob while its logits are there: 4 NHV."""
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    none = head.weight.new_empty(0)
    out = _frozen_like(head, asked)
    out = FrozenAskedStatistics(*(t.zero_() for t in out))
    for rows in chunks_of(head.labels != limits.ignore_index, head, limits.chunk_bytes):
        part = head.at(rows)
        z = part.logits()
        found = of_logits(z, part.labels, asked)
        one = Upstream(torch.ones_like(found.entropy), torch.zeros_like(found.entropy))
        unit = add_gradients(one, Known(found.lse, found.entropy), part, z, none, none)
        put(out, rows, (*found, unit))
    return out


def _frozen_like(head: Head, asked: Asked) -> FrozenAskedStatistics:
    unit = head.hidden.new_empty(head.hidden.shape)
    return FrozenAskedStatistics(*asked_like(head, asked), unit)


@linear_statistics_frozen.fake
def _(head: Head, asked: Asked, limits: Limits) -> FrozenAskedStatistics:
    return _frozen_like(head, asked)


@Operator
def linear_statistics_frozen_backward(
    upstream: AskedUpstream,
    head: Head,
    limits: Limits,
    known: KnownLabels,
    unit: Unit,
    given: AskedGiven,
) -> Tensor:
    """dhidden. d lse / d hidden is what the gradient of the label's logit has more than `unit`.

    A gradient of the entropy is not in `unit`: its tokens form their logits again. Without one of
    lse it is all that of linear_logprobs_frozen, a few rows at a time.
    """
    if not given.has_dlse:
        of_two, has = Upstream(*upstream[:2]), Given(given.has_dentropy)
        return linear_logprobs_frozen_backward(of_two, head, limits, known.known, unit, has)
    counted = head.labels != limits.ignore_index
    dlogprobs, dentropy, dlse = (g.where(counted, 0.0) for g in upstream)
    of_label = dlse.to(dlogprobs.dtype)
    rows = (dlogprobs - of_label)[:, None]
    dhidden = (rows * unit.unit).masked_fill_(rows == 0, 0.0)
    inside = head.labels.where(counted, 0)
    slope = of_product(of_label[:, None], head, known.at_labels()[:, None])
    at_label = slope * head.weight[inside]
    dhidden += at_label.masked_fill_(of_label[:, None] == 0, 0.0)
    dhidden = dhidden.to(head.hidden.dtype)
    if not given.has_dentropy:
        return dhidden
    chosen = (counted & (dentropy != 0)).nonzero()[:, 0]
    formed = linear_statistics_backward(
        *(at(chosen, AskedUpstream(dlogprobs, dentropy, dlse)), head.at(chosen), limits),
        *(at(chosen, known), given, Needs(True, False, False)),
    )
    return dhidden.index_copy_(0, chosen, formed.dhidden)


@linear_statistics_frozen_backward.fake
def _(upstream, head: Head, limits, known, unit, given) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape)


linear_statistics_frozen.differentiate(linear_statistics_frozen_backward, of="linear_statistics")
