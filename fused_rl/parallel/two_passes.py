"""Log-probs and entropies of a spread head for any loss: 8 NHV over all ranks, 4 if not trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.derivatives import transformed
from fused_rl.parallel.spread import Spread, Total, backward, chunk, formed

# The label of an ignored token at a part. The caller's own may be that of a row there.
_NOWHERE = -1
NO_SECOND = (
    "linear_logprobs has no second derivative (create_graph): take plain torch on the logits of "
    "the few tokens it is for"
)


def statistics(head: ops.Head, limits: ops.Limits, spread: Spread) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and top, [N] each, on every rank.

    Args:
        head: flat; hidden [n, H] as spread.hidden has it, weight [V_r, H], bias [V_r], labels [N]
            of the whole vocabulary.

    Raises:
        ValueError: a label outside the vocabulary, a temperature that is not positive: on every
            rank, before any collective.
        NotImplementedError: torch.func, forward mode; at the backward pass, a second derivative.
    """
    check(head, limits, spread)
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    frozen = torch.is_grad_enabled() and head.hidden.requires_grad and not trained
    # To form the gradient with the values takes chunks of the tokens that count.
    with_unit = frozen and not torch.compiler.is_compiling()
    return _Statistics.apply(*head, limits, spread, with_unit)


def check(head: ops.Head, limits: ops.Limits, spread: Spread) -> None:
    """What statistics raises, before any collective."""
    # What is traced has no values: there a label outside has a log-prob of NaN.
    if not torch.compiler.is_compiling():
        ops.check_tokens(head.labels, head.temperature, spread.size, limits.ignore_index)
    if transformed():
        raise NotImplementedError(
            "a head that is spread over ranks has no torch.func transforms and no forward mode: "
            "take backward"
        )


class _Statistics(torch.autograd.Function):
    """The operators' own gradients know one rank: these are of all."""

    @staticmethod
    def forward(ctx, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *fields, limits, spread, with_unit = args
        head = ops.Head(*fields)
        whole, unit = spread.gathered(head), None
        if with_unit:
            stats, unit = _with_unit(whole, limits, spread)
        else:
            stats = values(whole, limits, spread)
        ctx.save_for_backward(*head[:5], stats.lse, stats.entropy, unit)
        ctx.options = (*head[5:], limits, spread)
        ctx.mark_non_differentiable(stats.top)
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy, stats.top

    @staticmethod
    def backward(ctx, dlogprobs: Tensor | None, dentropy: Tensor | None, _: None) -> tuple:
        if torch.is_grad_enabled():
            raise NotImplementedError(NO_SECOND)
        *tensors, lse, entropy, unit = ctx.saved_tensors
        *transform, limits, spread = ctx.options
        head, known = ops.Head(*tensors, *transform), ops.Known(lse, entropy)
        given = [None if d is None else d.to(entropy.dtype) for d in (dlogprobs, dentropy)]
        upstream = ops.Upstream(*(torch.zeros_like(entropy) if d is None else d for d in given))
        needs = ops.Needs(*ctx.needs_input_grad[:3])
        if unit is not None:
            with_entropy = given[1] is not None
            found = (_scaled(head, limits, spread, upstream, known, unit, with_entropy), None, None)
        elif torch.compiler.is_compiling():
            found = _at_once(head, limits, spread, upstream, known, needs)
        else:
            found = by_chunks(head, limits, spread, upstream, known, needs)
        return (*found, *[None] * 8)


def values(head: ops.Head, limits: ops.Limits, spread: Spread) -> ops.Statistics:
    """[N] each; 0 where ignored."""
    stats = spread.merged(of_rows(head, limits, spread), head)
    ignored = head.labels == limits.ignore_index
    return ops.Statistics(*(t.masked_fill(ignored, 0.0) for t in stats))


def of_rows(head: ops.Head, limits: ops.Limits, spread: Spread) -> ops.Statistics | None:
    """[N] each, of this rank's part of the vocabulary; None where that is empty."""
    if len(head.weight) == 0:
        return None
    ignored = head.labels == limits.ignore_index
    labels = spread.local(head, 0).masked_fill(ignored, _NOWHERE)
    mine = limits._replace(ignore_index=_NOWHERE)
    return ops.linear_logprobs(head._replace(labels=labels), mine)


def _with_unit(head: ops.Head, limits: ops.Limits, spread: Spread) -> tuple[ops.Statistics, Tensor]:
    """values, and this rank's summand of d logprobs[n] / d hidden[n], [N, H]."""
    stats = ops.Statistics(*(_zeros(head, t) for t in (None, None, torch.float64, None)))
    unit = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format)
    none = head.weight.new_empty(0)
    counted = (head.labels != limits.ignore_index).nonzero()[:, 0]
    for rows in counted.split(spread.chunk_tokens(head, limits.chunk_bytes)):
        part = head.at(rows)
        of_part, gradient = chunk(part, spread)
        for total, value in zip(stats, of_part, strict=True):
            total[rows] = value
        ones = torch.ones_like(of_part.entropy)
        upstream = ops.Upstream(ones, torch.zeros_like(ones))
        unit[rows] = gradient(upstream, ops.Sums(none, none.clone(), False)).to(unit.dtype)
    return stats, unit


def _zeros(head: ops.Head, dtype: torch.dtype | None) -> Tensor:
    return head.labels.new_zeros(len(head.labels), dtype=dtype or head.dtype)


def _scaled(
    head: ops.Head,
    limits: ops.Limits,
    spread: Spread,
    upstream: ops.Upstream,
    known: ops.Known,
    unit: Tensor,
    with_entropy: bool,
) -> Tensor:
    """dhidden from the unit; tokens with a gradient of the entropy form their logits again."""
    dlogprobs, dentropy = upstream
    counted = head.labels != limits.ignore_index
    # where, not the product alone: 0 * NaN is NaN.
    live = counted & (dlogprobs != 0)
    partial = (dlogprobs[:, None] * unit.to(dlogprobs.dtype)).where(live[:, None], 0.0)
    if with_entropy and (rows := (counted & (dentropy != 0)).nonzero()[:, 0]).numel():
        whole, none = spread.gathered(head), head.weight.new_empty(0)
        for at in rows.split(spread.chunk_tokens(whole, limits.chunk_bytes)):
            totals = ops.Sums(none, none.clone(), False)
            partial[at] = _again(whole, at, upstream, known, totals, spread)
    total = Total(spread, head.hidden, len(head.labels), head.hidden.dtype)
    total.add(partial, slice(None))
    return total.result()


def _again(
    head: ops.Head,
    rows: Tensor,
    upstream: ops.Upstream,
    known: ops.Known,
    totals: ops.Sums,
    spread: Spread,
) -> Tensor:
    """This rank's summand of dhidden of some of the tokens, whose logits are formed again."""
    part = head.at(rows)
    given, found = (type(record)(*(t[rows] for t in record)) for record in (upstream, known))
    return backward(formed(part, spread).z, given, part, found, totals, spread)


Found = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dhidden, dweight and dbias; None where not needed."""


def room(head: ops.Head, needs: ops.Needs, chunks: int) -> tuple[Tensor, Tensor]:
    """For dweight and dbias of so many chunks, which several add up in the dtype of the logits."""
    weight = head.weight
    dtype = head.dtype if chunks > 1 else weight.dtype
    allocate = weight.new_empty if chunks and len(weight) else weight.new_zeros
    shapes = (weight.shape if needs.need_dweight else 0, len(weight) if needs.need_dbias else 0)
    return tuple(allocate(shape, dtype=dtype) for shape in shapes)


def rounded(
    head: ops.Head, needs: ops.Needs, dhidden: Tensor | None, dweight: Tensor, dbias: Tensor
) -> Found:
    """In the dtypes of what they are the gradients of."""
    return (
        dhidden,
        dweight.to(head.weight.dtype) if needs.need_dweight else None,
        dbias.to(head.bias.dtype) if needs.need_dbias else None,
    )


def by_chunks(
    head: ops.Head,
    limits: ops.Limits,
    spread: Spread,
    upstream: ops.Upstream,
    known: ops.Known,
    needs: ops.Needs,
    beside: Tensor | None = None,
) -> Found:
    """Tokens whose upstream gradients are both 0 cost nothing.

    beside: [N, H], more of this rank's summands of dhidden.
    """
    given = (upstream.dlogprobs != 0) | (upstream.dentropy != 0)
    given &= head.labels != limits.ignore_index
    live = given.nonzero()[:, 0]
    whole = spread.gathered(head)
    chunks = live.split(spread.chunk_tokens(whole, limits.chunk_bytes)) if len(live) else ()
    rows_of = room(head, needs, len(chunks))
    total = Total(spread, head.hidden, len(head.labels), head.hidden.dtype)
    for i, rows in enumerate(chunks):
        totals = ops.Sums(*rows_of, i > 0)
        part = _again(whole, rows, upstream, known, totals, spread)
        if needs.need_dhidden:
            total.add(part if beside is None else part + beside[rows], rows)
    if needs.need_dhidden and beside is not None:
        rest = (~given).nonzero()[:, 0]
        total.add(beside[rest], rest)
    return rounded(head, needs, total.result() if needs.need_dhidden else None, *rows_of)


def _at_once(
    head: ops.Head,
    limits: ops.Limits,
    spread: Spread,
    upstream: ops.Upstream,
    known: ops.Known,
    needs: ops.Needs,
) -> Found:
    """As by_chunks, in one operator: torch.compile traces no sizes that depend on data."""
    whole, rows = spread.gathered(head), len(head.weight)
    ignored = head.labels == limits.ignore_index
    labels = spread.local(head, rows).masked_fill(ignored, _NOWHERE)
    mine = whole._replace(labels=labels)
    found = (torch.zeros_like(whole.hidden), head.weight, head.bias)
    if rows:
        here = limits._replace(ignore_index=_NOWHERE)
        found = ops.linear_logprobs_backward(upstream, mine, here, known, needs)
    total = Total(spread, head.hidden, len(head.labels), head.hidden.dtype)
    if needs.need_dhidden:
        total.add(found[0].to(head.dtype), slice(None))
    found = (total.result(), *found[1:])
    return tuple(g if n else None for g, n in zip(found, needs, strict=True))
