"""A loss evaluated once: at all tokens where one chunk holds them, else chunk by chunk."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.policy import Loss, LossOutput, PolicyLoss, Terms
from fused_rl.losses.statistics import Stats, chosen, differentiated, placed, with_reference


class Counted(NamedTuple):
    """The tokens that count, in chunks: where all do, views take the place of copies."""

    tokens: int  # of the batch, N
    rows: Tensor | None  # [n] int64: those that count; None: all
    chunks: list[slice] | list[Tensor]

    @classmethod
    def of(cls, loss_mask: Tensor, cut: Callable[[int], list[int]]) -> "Counted":
        """In chunks of the sizes that cut gives so many tokens."""
        rows = loss_mask.nonzero()[:, 0]
        sizes = cut(len(rows))
        if len(rows) < len(loss_mask):
            return cls(len(loss_mask), rows, list(rows.split(sizes)) if sizes else [])
        bounds = pairwise(accumulate(sizes, initial=0))
        return cls(len(loss_mask), None, [slice(*pair) for pair in bounds])

    def add(self, total: Tensor | None, part: Tensor, chunk: slice | Tensor) -> Tensor:
        """total [N, H], None at first, with part [n, H] at the tokens of a chunk."""
        if len(part) == self.tokens:
            return part
        if total is None:
            room = part.new_empty if self.rows is None else part.new_zeros
            total = room(self.tokens, *part.shape[1:])
        total[chunk] = part
        return total


class _Part(NamedTuple):
    """What one evaluation of a loss gave."""

    stats: Stats  # [n] each, of all tokens or of a chunk's
    value: Tensor  # []
    rest: Terms | dict | None
    gradients: tuple[Tensor, ...]  # of of_policy(stats), [n]


class Evaluation:
    """Collects what the chunks of a pass give, and makes one LossOutput of it."""

    def __init__(self, loss: Loss, batch: TokenBatch, counted: Counted) -> None:
        self.loss, self.batch, self.counted = loss, batch, counted
        self.several = len(counted.chunks) > 1
        # Of a subclass, as of any other function, only what it returns is known.
        self.by_token = type(loss) is PolicyLoss
        self.parts: list[_Part] = []

    def gradients(self, stats: Stats, chunk: slice | Tensor) -> tuple[Tensor, ...]:
        """Those of the policy's statistics [n] of a chunk's tokens, from the statistics [n]."""
        batch = self.batch.select(chunk) if self.several else self.batch
        if not self.several:
            stats = type(stats)(*map(self._placed, stats))
        batch = with_reference(batch, stats)
        part = _Part(stats, *differentiated(self._evaluate, stats, batch))
        self.parts.append(part)
        return part.gradients if self.several else chosen(self.counted.rows, *part.gradients)

    def output(self) -> LossOutput:
        """The loss and its metrics, when every chunk has its gradients."""
        if self.by_token or self.several:
            stats = zip(*(p.stats for p in self.parts), strict=True)
            stats = type(self.parts[0].stats)(*map(self._joined, stats))
            batch = with_reference(self.batch, stats)
        if self.by_token:
            terms = Terms(*map(self._joined, zip(*(p.rest for p in self.parts), strict=True)))
            gradients = map(self._joined, zip(*(p.gradients for p in self.parts), strict=True))
            value = terms.losses.sum() if self.several else self.parts[0].value
            return LossOutput(value, self.loss.metrics(terms, batch, tuple(gradients)))
        if self.several:
            return self.loss(stats, batch)
        (part,) = self.parts
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in part.rest.items()}
        return LossOutput(part.value, detached)

    def _evaluate(self, stats: Stats, batch: TokenBatch) -> tuple[Tensor, object]:
        if self.by_token:
            return self.loss.evaluate(stats, batch)
        return tuple(self.loss(stats, batch))

    def _joined(self, column: Sequence[Tensor | None]) -> Tensor | None:
        """[N] of what each chunk has of its tokens."""
        if not self.several or column[0] is None:
            return column[0]
        return self._placed(torch.cat(column))

    def _placed(self, values: Tensor) -> Tensor:
        return placed(values, self.counted.rows, self.counted.tokens)
