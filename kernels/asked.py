"""What else is asked of the logits, from tiles of them: ops/statistics.py names it.

    squares = sum exp(2 (z - max)),   total = sum z,   and the largest logits with their places

The vendor's library writes a tile of fp32 products that stays in L2, as for `tiled_statistics` of
linear_logprobs.py; the row kernel reads it there for the softmax, and torch for the rest. Parts of
the vocabulary merge in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_logprobs, logprobs

# By the number of logprobs.rounded.
_ROUNDED = (None, torch.bfloat16, torch.float16)


class Found(NamedTuple):
    """[N] each, the last two [N, top]; None for what was not asked for."""

    statistics: tuple[Tensor, Tensor, Tensor, Tensor]  # logprobs, entropy, lse, top
    collision: Tensor | None
    mean_logit: Tensor | None
    ids: Tensor | None
    logits: Tensor | None


class _Tile(NamedTuple):
    """Of the entries of one tile, as above."""

    largest: Tensor
    squares: Tensor
    total: Tensor


def transform(
    raw: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    scale: float,
    softcap: float,
    rounding: int,
) -> Tensor:
    """Logits [n, columns] from their products, in place."""
    if bias is not None:
        raw += bias.float()
    if rounding:
        raw.copy_(raw.to(_ROUNDED[rounding]))
    raw *= scale
    if softcap:
        raw.div_(softcap).tanh_().mul_(softcap)
    return raw.div_(temperature[:, None])


def _of_tile(z: Tensor, with_collision: bool, with_mean_logit: bool) -> _Tile:
    none = z.new_empty(0)
    total = z.sum(-1) if with_mean_logit else none
    if not with_collision:
        return _Tile(none, none, total)
    largest = z.amax(-1)
    # Of nothing but -inf: -inf - -inf would be NaN.
    reference = largest.masked_fill(largest == -torch.inf, 0.0)
    squares = (z - reference[:, None]).mul_(2).exp_().sum(-1)
    return _Tile(largest, squares, total)


def _collision(tiles: list[_Tile], top: Tensor) -> Tensor:
    """[n] from the parts; top: the log-probability of the largest logit."""
    largest = torch.stack([tile.largest for tile in tiles]).double()
    of_all = largest.amax(0)
    shift = (largest - of_all.masked_fill(of_all == -torch.inf, 0.0)).mul_(2).exp_()
    squares = torch.stack([tile.squares for tile in tiles]).double()
    # A part of NaN alone has a NaN sum, which must not be lost.
    sums = squares.where(squares.isnan(), shift * squares).sum(0)
    return (sums * (2 * top.double()).exp()).float()


def fwd(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    with_collision: bool,
    with_mean_logit: bool,
    top: int,
    ignore_index: int,
) -> Found:
    """Of all tokens, those that are ignored as well but for the statistics."""
    V = len(weight)
    parts: list[Found] = []
    for rows, tiles in linear_logprobs.tiles_of(hidden, weight):
        at = temperature[rows]
        found, best = [], None
        partial = []
        for v0, columns, raw in tiles:
            of_bias = None if bias is None else bias[columns]
            part = torch.empty(1, 4, len(raw), dtype=torch.float32, device=raw.device)
            options = (scale, softcap, rounding, v0)
            logprobs.partial_statistics(raw, of_bias, labels[rows], at, part, *options)
            partial.append(part)
            z = transform(raw, of_bias, at, scale, softcap, rounding)
            found.append(_of_tile(z, with_collision, with_mean_logit))
            if top:
                values, ids = z.topk(min(top, z.shape[1]))
                best = _better(best, (values, ids + v0), top)
        statistics = logprobs.merge(torch.cat(partial), labels[rows], V, ignore_index)
        parts.append(
            Found(
                statistics,
                _collision(found, statistics[3]) if with_collision else None,
                sum(t.total.double() for t in found).div(V).float() if with_mean_logit else None,
                *((best[1], best[0]) if best else (None, None)),
            )
        )
    statistics = tuple(map(torch.cat, zip(*(part.statistics for part in parts), strict=True)))
    rest = zip(*(part[1:] for part in parts), strict=True)
    return Found(statistics, *(None if x[0] is None else torch.cat(x) for x in rest))


def _better(
    best: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor], top: int
) -> tuple[Tensor, Tensor]:
    """The `top` largest of both, or all; values and ids."""
    if best is None:
        return more
    values, ids = (torch.cat(both, 1) for both in zip(best, more, strict=True))
    values, at = values.topk(min(top, values.shape[1]))
    return values, ids.gather(1, at)
