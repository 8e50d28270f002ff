"""Log-probs and entropies of tokens that travel, for any loss: 8 NHV, 4 if the head is not trained.

N is here the mean number of tokens of a rank. hidden travels again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.parallel.spread import formed
from fused_rl.parallel.two_passes import NO_SECOND, Found, of_rows, room, rounded
from fused_rl.parallel.visits import DHidden, Journey, Turn, chunk, returned


def statistics(
    head: ops.Head, limits: ops.Limits, journey: Journey
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and top, [N] each, of this rank's tokens."""
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    with_unit = torch.is_grad_enabled() and head.hidden.requires_grad and not trained
    return _Statistics.apply(*head, limits, journey, with_unit)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *fields, limits, journey, with_unit = args
        head = ops.Head(*fields)
        stats, unit = _values(head, limits, journey, with_unit)
        ctx.save_for_backward(*head[:5], stats.lse, stats.entropy, unit)
        ctx.options = (*head[5:], limits, journey)
        ctx.mark_non_differentiable(stats.top)
        return stats.logprobs, stats.entropy, stats.top

    @staticmethod
    def backward(ctx, dlogprobs: Tensor, dentropy: Tensor, _: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError(NO_SECOND)
        *tensors, lse, entropy, unit = ctx.saved_tensors
        *transform, limits, journey = ctx.options
        head, known = ops.Head(*tensors, *transform), ops.Known(lse, entropy)
        upstream = ops.Upstream(dlogprobs, dentropy)
        needs = ops.Needs(*ctx.needs_input_grad[:3])
        found = _gradients(head, limits, journey, upstream, known, unit, needs)
        return (*found, *[None] * 8)


def _values(
    head: ops.Head, limits: ops.Limits, journey: Journey, with_unit: bool
) -> tuple[ops.Statistics, Tensor | None]:
    """[N] each, 0 where ignored; and the unit d logprobs[n] / d hidden[n], [N, H]."""
    zeros = head.labels.new_zeros
    dtypes = (head.dtype, head.dtype, torch.float64, head.dtype)
    stats = ops.Statistics(*(zeros(len(head.labels), dtype=dtype) for dtype in dtypes))
    unit = DHidden(journey.spread, zeros(head.hidden.shape, dtype=head.hidden.dtype))
    none = head.weight.new_empty(0)
    for i, rows in enumerate(_cut(head.labels != limits.ignore_index, journey)):
        turn, part = journey.turn(i, rows.device), head.at(rows)
        if with_unit:
            of_part, gradient = chunk(part, turn)
            ones = torch.ones_like(of_part.entropy)
            upstream = ops.Upstream(ones, torch.zeros_like(ones))
            unit.add(gradient(upstream, ops.Sums(none, none.clone(), False)), rows)
        else:
            visitors = turn.visitors(part)
            of_part = turn.home(of_rows(visitors, limits, journey.spread), visitors, part)
        for total, value in zip(stats, of_part, strict=True):
            total[rows] = value
    return stats, unit.result() if with_unit else None


def _cut(chosen: Tensor, journey: Journey) -> tuple[Tensor, ...]:
    """The tokens of this rank that are chosen [N], by turns."""
    rows = chosen.nonzero()[:, 0]
    shares = journey.shares(len(rows))
    return rows.split(shares) if shares else ()


def _gradients(
    head: ops.Head,
    limits: ops.Limits,
    journey: Journey,
    upstream: ops.Upstream,
    known: ops.Known,
    unit: Tensor | None,
    needs: ops.Needs,
) -> Found:
    """Of hidden, weight and bias. Tokens whose upstream gradients are both 0 stay at home; with
    the unit, those whose gradient of the entropy is.
    """
    dlogprobs, dentropy = upstream
    counted = head.labels != limits.ignore_index
    if unit is None:
        chosen = counted & ((dlogprobs != 0) | (dentropy != 0))
        dhidden = head.hidden.new_zeros(head.hidden.shape)
    else:
        chosen, live = counted & (dentropy != 0), counted & (dlogprobs != 0)
        # where, not the product alone: 0 * NaN is NaN.
        scaled = (dlogprobs[:, None] * unit.to(head.dtype)).where(live[:, None], 0.0)
        dhidden = scaled.to(head.hidden.dtype)
    journey = journey.again(int(chosen.sum()), chosen.device)
    chunks = _cut(chosen, journey)
    rows_of = room(head, needs, len(chunks))
    total = DHidden(journey.spread, dhidden)
    for i, rows in enumerate(chunks):
        totals = ops.Sums(*rows_of, i > 0)
        part = _again(head, rows, upstream, known, totals, journey.turn(i, rows.device))
        if needs.need_dhidden:
            total.add(part, rows)
    return rounded(head, needs, total.result() if needs.need_dhidden else None, *rows_of)


def _again(
    head: ops.Head,
    rows: Tensor,
    upstream: ops.Upstream,
    known: ops.Known,
    totals: ops.Sums,
    turn: Turn,
) -> Tensor:
    """This rank's summands of dhidden [R, c, H] of a turn, whose logits are formed again."""
    visitors = turn.visitors(head.at(rows))
    given, found = (type(record)(*(t[rows] for t in record)) for record in (upstream, known))
    return returned(formed(visitors, turn.spread).z, given, visitors, found, totals, turn)
