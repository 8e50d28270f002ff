"""Log-probs renormalised over kept sets whose entries are spread over ranks.

    kept_logprobs[n] = z[n, label] - log sum_r sum_{v in kept[n], v on rank r} exp z[n, v]

Every rank forms the logits of the kept entries that it has; three numbers per token are merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.ops.kept_sets import Pairs, Sets, check_offsets, wrong_tokens
from fused_rl.ops.pairs import add_pairs, pair_logits
from fused_rl.ops.record import Gradients
from fused_rl.parallel.collectives import all_gathered, arrived
from fused_rl.parallel.spread import Spread
from fused_rl.parallel.two_passes import by_chunks, check, values


def kept_statistics(
    head: ops.Head, sets: Sets, limits: ops.Limits, spread: Spread
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and kept_logprobs, [N] each, on every rank.

    Raises:
        ValueError: as ops.linear_kept_logprobs, on every rank, before any collective.
        NotImplementedError: as two_passes.statistics.
    """
    check(head, limits, spread)
    return _Kept.apply(*head, *sets, limits, spread)


class Mine(NamedTuple):
    """The pairs (token, vocabulary entry) whose entry this rank has."""

    at: Tensor  # [m]: where they stand among all pairs
    token: Tensor  # [m], rising
    entry: Tensor  # [m]: rows of this rank's weight

    @classmethod
    def of(cls, pairs: Pairs, spread: Spread, rows: int) -> Mine:
        at = spread.owns(pairs.entry, rows).nonzero()[:, 0]
        return cls(at, pairs.token[at], pairs.entry[at] - spread.start)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *fields, kept, cu_kept, limits, spread = args
        head, sets = ops.Head(*fields), Sets(kept, cu_kept)
        pairs, wrong = _checked(head, sets, limits, spread)
        whole = spread.gathered(head)
        stats = values(whole, limits, spread)
        kept_logprobs, slope = _renormalised(whole, pairs, wrong, limits, spread)
        tensors = (*head[:5], *sets, stats.lse, stats.entropy, slope)
        ctx.save_for_backward(*tensors)
        ctx.options = (*head[5:], limits, spread)
        return stats.logprobs, stats.entropy, kept_logprobs

    @staticmethod
    def backward(ctx, dlogprobs: Tensor, dentropy: Tensor, dkept_logprobs: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_kept_logprobs has no second derivative")
        *tensors, kept, cu_kept, lse, entropy, slope = ctx.saved_tensors
        *transform, limits, spread = ctx.options
        head, needs = ops.Head(*tensors, *transform), ops.Needs(*ctx.needs_input_grad[:3])
        whole = spread.gathered(head)
        mine = Mine.of(Pairs.of(Sets(kept, cu_kept), spread.size), spread, len(head.weight))
        up = dkept_logprobs.where(head.labels != limits.ignore_index, 0.0)[mine.token]
        # dhidden by the pairs, which joins that by the rest before the sum over ranks.
        beside = torch.zeros_like(whole.hidden, dtype=head.dtype)
        upstream, known = ops.Upstream(dlogprobs, dentropy), ops.Known(lse, entropy)
        of_pairs = (whole, mine.token, mine.entry, up * slope, up != 0, limits)
        none = head.weight.new_empty(0)
        add_pairs(
            Gradients(beside, none, none),
            *of_pairs,
            ops.Needs(needs.need_dhidden, False, False),
        )
        found = by_chunks(head, limits, spread, upstream, known, needs, beside)
        of_rows = ops.Needs(False, needs.need_dweight, needs.need_dbias)
        add_pairs(Gradients(*found), *of_pairs, of_rows)
        return (*found, *[None] * 9)


def _checked(
    head: ops.Head, sets: Sets, limits: ops.Limits, spread: Spread
) -> tuple[Pairs, Tensor]:
    """The pairs of all ranks, and which tokens have no valid set, [N] bool."""
    if not sets.kept.is_cuda:
        check_offsets(sets.cu_kept, len(sets.kept))
    pairs = Pairs.of(sets, spread.size)
    return pairs, wrong_tokens(head.labels, sets.kept, pairs, spread.size, limits.ignore_index)


def _renormalised(
    head: ops.Head, pairs: Pairs, wrong: Tensor, limits: ops.Limits, spread: Spread
) -> tuple[Tensor, Tensor]:
    """kept_logprobs [N], and d kept_logprobs / d (hidden . weight) at this rank's pairs [m]."""
    mine = Mine.of(pairs, spread, len(head.weight))
    z = pair_logits(head, mine.token, mine.entry, limits.chunk_bytes).double()
    of_all = z.new_full(pairs.token.shape, -torch.inf).index_put((mine.at,), z)
    is_label = pairs.entry == head.labels[pairs.token]
    largest = pairs.over_sets(of_all, "max")
    weights = (of_all - largest[pairs.token]).exp().where(of_all > -torch.inf, 0.0)
    part = torch.stack(
        [
            largest,
            pairs.over_sets(weights, "sum"),
            pairs.over_sets(of_all.masked_fill(~is_label, -torch.inf), "max"),
        ]
    )
    lse, at_label = _merged(arrived(all_gathered(part[None], spread.group)))
    counted = head.labels != limits.ignore_index
    kept_logprobs = (at_label - lse).masked_fill(wrong, torch.nan).where(counted, 0.0)
    slope = is_label[mine.at].double() - (z - lse[mine.token]).exp()
    t = head.temperature.double()[mine.token]
    if head.softcap:
        slope = slope * (1 - (z * t / head.softcap) ** 2)
    slope = (slope * (head.scale / t)).masked_fill(wrong[mine.token], torch.nan)
    slope = slope.where(counted[mine.token], 0.0)
    return kept_logprobs.to(head.dtype), slope.to(head.dtype)


def _merged(parts: Tensor) -> tuple[Tensor, Tensor]:
    """lse over the kept set and the label's logit, [N] each, from [R, 3, N] of all ranks."""
    largest, total, at_label = parts.unbind(1)
    log_total = torch.where(total > 0, total.log(), -torch.inf)
    return torch.where(total > 0, largest + log_total, -torch.inf).logsumexp(0), at_label.amax(0)
