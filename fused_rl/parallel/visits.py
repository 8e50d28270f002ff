"""Tokens that travel: each rank has tokens of its own, and does its rows for everybody's.

A turn takes c tokens of each rank, of one that has fewer left what there is, and zeros:

    hidden, label, temperature                  all-gather    everybody's tokens, here
    their lse, entropy, log-prob, top           all-to-all    my tokens', by every part
    the loss, where its tokens are at home
    dlogprob, dentropy, lse, entropy            all-gather    everybody's
    dhidden                                     all-to-all    my tokens' summands, added up in order

With w bytes of a hidden number and summands in float32, a token costs H (w + 4) + 76 bytes. The
gradients that come back are divided by the number of ranks, and dhidden is multiplied by it: rows
of dweight are those of the ranks' mean loss, as sharded training has them, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.derivatives import transformed
from fused_rl.parallel import merge, sums
from fused_rl.parallel.collectives import all_gathered, arrived, exchanged, ranks_of
from fused_rl.parallel.spread import Backward, Spread, backward, formed
from fused_rl.parallel.states import Hidden


@contextmanager
def told(group: Any, hidden: Hidden, device: torch.device) -> Iterator[None]:
    """A ValueError of one rank, raised before its Journey, becomes one of every rank.

    The others are in Journey.met, and wait for this rank's numbers.
    """
    try:
        yield
    except ValueError:
        if hidden is Hidden.OWN_TOKENS:
            _numbers(group, device, 0, False, True)
        raise


def _numbers(
    group: Any, device: torch.device, tokens: int, differentiated: bool, failed: bool
) -> list[list[int]]:
    """Every rank's three."""
    mine = torch.tensor([[tokens, differentiated, failed]], device=device)
    return arrived(all_gathered(mine, group)).tolist()


@dataclass(frozen=True)
class Journey:
    """How many tokens of each rank travel.

    Attributes:
        spread: which rows are here.
        counts: the tokens of each rank.
        most: how many of a rank travel in a turn.
    """

    spread: Spread
    counts: tuple[int, ...]
    most: int

    @classmethod
    def met(
        cls, head: ops.Head, ignore_index: int, spread: Spread, chunk_bytes: int | None
    ) -> Journey:
        """Of the tokens that are not ignored: one collective, which the host waits for.

        Raises:
            ValueError: on every rank, a label outside the vocabulary or a temperature that is not
                positive on one of them, hidden states with a gradient on some ranks only.
            NotImplementedError: torch.compile, torch.func, forward mode.
        """
        if torch.compiler.is_compiling() or transformed():
            raise NotImplementedError(
                "Hidden.OWN_TOKENS has no torch.compile, no torch.func transforms and no forward "
                "mode: ranks agree on their numbers of tokens before the first product"
            )
        device = head.hidden.device
        with told(spread.group, spread.hidden, device):
            ops.check_tokens(head.labels, head.temperature, spread.size, ignore_index)
        tokens = int((head.labels != ignore_index).sum())
        differentiated = torch.is_grad_enabled() and head.hidden.requires_grad
        numbers = _numbers(spread.group, device, tokens, differentiated, False)
        if failed := [rank for rank, (_, _, wrong) in enumerate(numbers) if wrong]:
            raise ValueError(f"wrong arguments on ranks {failed} of the group, which say what")
        if len({needs for _, needs, _ in numbers}) == 2:
            without = [rank for rank, (_, needs, _) in enumerate(numbers) if not needs]
            raise ValueError(
                "hidden must require a gradient on every rank or on none, and does not on ranks "
                f"{without} of the group; one without tokens, too, takes part in the backward pass"
            )
        most = spread.chunk_tokens(head, chunk_bytes) // ranks_of(spread.group)
        return cls(spread, tuple(count for count, _, _ in numbers), max(1, most))

    def again(self, tokens: int, device: torch.device) -> Journey:
        """Of so many tokens of this rank, in a backward pass."""
        numbers = _numbers(self.spread.group, device, tokens, True, False)
        return Journey(self.spread, tuple(count for count, _, _ in numbers), self.most)

    @property
    def sizes(self) -> list[int]:
        """Of the turns, the same on every rank."""
        return ops.chunk_sizes(max(self.counts), self.most)

    def shares(self, tokens: int) -> list[int]:
        """How many of this rank's tokens travel in each turn."""
        return [max(0, min(c, tokens - start)) for start, c in _started(self.sizes)]

    def turn(self, i: int, device: torch.device) -> Turn:
        start, c = list(_started(self.sizes))[i]
        here = [max(0, min(c, count - start)) for count in self.counts]
        if min(here) == c:
            return Turn(self.spread, c, None)
        ranges = (torch.arange(r * c, r * c + n, device=device) for r, n in enumerate(here))
        return Turn(self.spread, c, torch.cat(list(ranges)))


def _started(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Each size, and the sum of those before it."""
    start = 0
    for size in sizes:
        yield start, size
        start += size


class Turn(NamedTuple):
    """Which tokens travel at once.

    size: c, of each rank. places: [m], those of the R c places that hold a token; None: all.
    """

    spread: Spread
    size: int
    places: Tensor | None

    def gathered(self, mine: Tensor) -> Tensor:
        """[m, ...] of everybody's tokens, from [n, ...] of this rank's, n <= c."""
        missing = mine.new_zeros(self.size - len(mine), *mine.shape[1:])
        padded = torch.cat([mine, missing]) if len(missing) else mine
        of_all = arrived(all_gathered(padded, self.spread.group))
        return of_all if self.places is None else of_all[self.places]

    def by_rank(self, everybodys: Tensor) -> Tensor:
        """[R, c, ...] by the rank whose tokens they are, from [m, ...]; 0 where no token is."""
        R = ranks_of(self.spread.group)
        if self.places is not None:
            whole = everybodys.new_zeros(R * self.size, *everybodys.shape[1:])
            everybodys = whole.index_copy_(0, self.places, everybodys)
        return everybodys.view(R, self.size, *everybodys.shape[1:])

    def visitors(self, head: ops.Head) -> ops.Head:
        """Everybody's tokens at this rank's rows."""
        hidden, labels, temperature = map(
            self.gathered, (head.hidden, head.labels, head.temperature)
        )
        return head._replace(hidden=hidden, labels=labels, temperature=temperature)

    def home(
        self, part: ops.Statistics | None, visitors: ops.Head, mine: ops.Head
    ) -> ops.Statistics:
        """The statistics of this rank's tokens [n], from those of everybody's at its rows."""
        own = self.spread.owns(visitors.labels, len(visitors.weight))
        parts = self.by_rank(merge.of_part(part, own).T.contiguous())
        of_mine = arrived(exchanged(parts, self.spread.group))[:, : len(mine.labels)]
        valid = (mine.labels >= 0) & (mine.labels < self.spread.size)
        return merge.merged(of_mine.transpose(1, 2), valid, mine.dtype)


def chunk(mine: ops.Head, turn: Turn) -> tuple[ops.Statistics, Backward]:
    """The statistics of this rank's tokens [n], all of them counted, and their gradients' way.

    What it gives is [R, c, H]: this rank's summands of dhidden, for DHidden.
    """
    visitors = turn.visitors(mine)
    part, z = formed(visitors, turn.spread)
    stats = turn.home(part, visitors, mine)
    known = ops.Known(stats.lse, stats.entropy)

    def of_chunk(upstream: ops.Upstream, totals: ops.Sums) -> Tensor:
        return returned(z, upstream, visitors, known, totals, turn)

    return stats, of_chunk


def returned(
    z: Tensor | None,
    upstream: ops.Upstream,
    visitors: ops.Head,
    known: ops.Known,
    totals: ops.Sums,
    turn: Turn,
) -> Tensor:
    """Summands of dhidden [R, c, H], from what this rank knows of its own tokens [n].

    They are of 1 / R of the loss; so are dweight and dbias, which are added to.
    """
    R, dtype = ranks_of(turn.spread.group), visitors.dtype
    given = [d.double() / R for d in upstream] + [t.double() for t in known]
    dlogprobs, dentropy, lse, entropy = turn.gathered(torch.stack(given, 1)).T.contiguous()
    of_all = ops.Upstream(dlogprobs.to(dtype), dentropy.to(dtype))
    found = ops.Known(lse, entropy.to(dtype))
    return turn.by_rank(backward(z, of_all, visitors, found, totals, turn.spread))


class DHidden:
    """dhidden of this rank's tokens [N, H], from the summands of ranks, turn by turn.

    What is sent in a turn is waited for when the next one is formed: the products hide it.
    """

    def __init__(self, spread: Spread, total: Tensor) -> None:
        """total: zeros, or what tokens that do not travel have."""
        self.spread, self.total = spread, total
        self.waiting: tuple[sums.Sent, Tensor | slice] | None = None

    def add(self, part: Tensor, rows: Tensor | slice) -> None:
        """This rank's summands [R, c, H] of a turn, in which its own tokens at rows travel."""
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        sent = sums.Sent(exchanged(part, self.spread.group), n)
        self._receive()
        self.waiting = (sent, rows)

    def _receive(self) -> None:
        if self.waiting is not None:
            sent, rows = self.waiting
            whole = sums.added(sent)[: sent.tokens] * ranks_of(self.spread.group)
            self.total[rows] = whole.to(self.total.dtype)
            self.waiting = None

    def result(self) -> Tensor:
        self._receive()
        return self.total
