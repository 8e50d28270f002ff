"""A head whose vocabulary is spread over ranks: which part is here, and the operators on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.parallel import merge, sums
from fused_rl.parallel.collectives import all_gathered, arrived, ranks_of
from fused_rl.parallel.states import Hidden

Backward = Callable[[ops.Upstream, ops.Sums], Tensor]


@dataclass(frozen=True)
class Spread:
    """This rank's part of a vocabulary, and how the hidden states lie.

    Attributes:
        group: the ranks that share the vocabulary.
        start: the vocabulary entry of this rank's first row.
        size: entries of all ranks.
        hidden: how hidden states lie on the ranks.
        leading: of SEQUENCE_SHARDED: the shape of this rank's tokens.
        dim: of SEQUENCE_SHARDED: which of its dimensions is cut.
    """

    group: Any
    start: int
    size: int
    hidden: Hidden
    leading: tuple[int, ...] = ()
    dim: int = 0

    def owns(self, labels: Tensor, rows: int) -> Tensor:
        """[N] bool: the labels that lie in this rank's rows."""
        return (labels >= self.start) & (labels < self.start + rows)

    def local(self, head: ops.Head, elsewhere: int) -> Tensor:
        """[N]: the rows of this rank that the labels are; `elsewhere` for those of other ranks.

        label - start of those could be any number that means something else.
        """
        here = self.owns(head.labels, len(head.weight))
        return (head.labels - self.start).where(here, elsewhere)

    def gathered(self, head: ops.Head) -> ops.Head:
        """With the hidden states [N, H] of all tokens, in the order of the labels."""
        if self.hidden is not Hidden.SEQUENCE_SHARDED:
            return head
        H = head.hidden.shape[1]
        first = head.hidden.view(*self.leading, H).movedim(self.dim, 0)
        whole = arrived(all_gathered(first, self.group))
        return head._replace(hidden=whole.movedim(0, self.dim).reshape(-1, H))

    def scattered(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, H] of this rank's tokens from every rank's summands [N, H] of all tokens."""
        R, H = ranks_of(self.group), partial.shape[1]
        leading = list(self.leading)
        leading[self.dim] *= R
        first = partial.view(*leading, H).movedim(self.dim, 0)
        of_mine = sums.added(sums.sent(first, self.group))
        return of_mine.movedim(0, self.dim).reshape(-1, H).to(dtype)

    def chunk_tokens(self, head: ops.Head, chunk_bytes: int | None) -> int:
        """Tokens whose logits a chunk may hold: the same on all ranks, whatever rows they have."""
        rows = -(-self.size // ranks_of(self.group))
        like = torch.empty(rows, head.weight.shape[1], dtype=head.weight.dtype, device="meta")
        return ops.chunk_tokens(head.hidden, like, chunk_bytes)

    def merged(self, part: ops.Statistics | None, head: ops.Head) -> ops.Statistics:
        """The statistics of all ranks' parts: one collective, 32 bytes per token from each."""
        own = self.owns(head.labels, len(head.weight))
        valid = (head.labels >= 0) & (head.labels < self.size)
        parts = all_gathered(merge.of_part(part, own)[None], self.group)
        return merge.merged(arrived(parts), valid, head.dtype)


class Formed(NamedTuple):
    """This rank's part of a chunk: None where it has no rows."""

    stats: ops.Statistics | None
    z: Tensor | None


def formed(head: ops.Head, spread: Spread) -> Formed:
    """This rank's part of the logits of a chunk."""
    if len(head.weight) == 0:
        return Formed(None, None)
    # The operator wants a label inside: what it says of another rank's is not used.
    mine = head._replace(labels=spread.local(head, 0))
    *stats, z = ops.linear_logprobs_chunk(mine, ops.Given(True))
    return Formed(ops.Statistics(*stats), z)


def backward(
    z: Tensor | None,
    upstream: ops.Upstream,
    head: ops.Head,
    known: ops.Known,
    totals: ops.Sums,
    spread: Spread,
) -> Tensor:
    """This rank's summand of dhidden [n, H], in the dtype of the logits; adds to dweight, dbias."""
    if z is None:
        return head.hidden.new_zeros(head.hidden.shape, dtype=head.dtype)
    # A label one past the end adds nothing.
    mine = head._replace(labels=spread.local(head, len(head.weight)))
    totals = totals._replace(partial=True)
    return ops.linear_logprobs_chunk_backward(ops.ChunkLogits(z), upstream, mine, known, totals)


def chunk(head: ops.Head, spread: Spread) -> tuple[ops.Statistics, Backward]:
    """The statistics of a chunk's tokens [n], all of them counted, and their gradients' way."""
    part, z = formed(head, spread)
    stats = spread.merged(part, head)
    known = ops.Known(stats.lse, stats.entropy)

    def of_chunk(upstream: ops.Upstream, totals: ops.Sums) -> Tensor:
        return backward(z, upstream, head, known, totals, spread)

    return stats, of_chunk


class Total:
    """dhidden of all tokens, from the summands of ranks, chunk by chunk.

    What is sent for a chunk is waited for when the next one is formed: the products hide it.
    """

    def __init__(self, spread: Spread, like: Tensor, tokens: int, dtype: torch.dtype) -> None:
        """like: this rank's hidden states; dtype: of the result."""
        self.spread, self.like, self.dtype = spread, like, dtype
        whole = spread.hidden is Hidden.REPLICATED
        of_total = dtype if whole else torch.promote_types(dtype, torch.float32)
        self.total = like.new_zeros((tokens, like.shape[1]), dtype=of_total)
        self.waiting: tuple[sums.Sent, Tensor | slice] | None = None
        self.any = False

    def add(self, part: Tensor, rows: Tensor | slice) -> None:
        """This rank's summands [n, H] of the tokens at rows."""
        self.any = True
        if self.spread.hidden is not Hidden.REPLICATED:
            self.total[rows] = part
            return
        sent = sums.sent(part, self.spread.group)
        self._receive()
        self.waiting = (sent, rows)

    def _receive(self) -> None:
        if self.waiting is not None:
            sent, rows = self.waiting
            self.total[rows] = sums.sum_of(sent, self.spread.group, self.dtype)
            self.waiting = None

    def result(self) -> Tensor:
        """[n, H] of the tokens of this rank's hidden states."""
        self._receive()
        if self.spread.hidden is not Hidden.SEQUENCE_SHARDED:
            return self.total.to(self.dtype)
        if not self.any:
            return self.like.new_zeros(self.like.shape, dtype=self.dtype)
        return self.spread.scattered(self.total, self.dtype)
