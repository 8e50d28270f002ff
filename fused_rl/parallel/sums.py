"""dhidden from the summands of ranks, in an order that does not depend on where a token stands.

A ring adds up each part of its buffer from another rank on, so that from three ranks on the bits of
a token depend on its place. Here every rank gets everybody's summands of a share of the tokens,
adds them up in the order of ranks, in float32 at least, and sends the result round: 4 + 2 bytes per
number for bfloat16, where a ring of bfloat16 takes 4 and one of float32 takes 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.parallel.collectives import all_gathered, arrived, exchanged, ranks_of


class Sent(NamedTuple):
    """Summands on their way."""

    parts: Tensor  # [R, m, H]
    tokens: int  # n <= R m


def sent(part: Tensor, group: Any) -> Sent:
    """The summands [n, H] of this rank, each share of the tokens to the rank that adds it up."""
    R, n = ranks_of(group), len(part)
    padded = F.pad(part, (0, 0, 0, -n % R))
    return Sent(exchanged(padded.view(R, len(padded) // R, *part.shape[1:]), group), n)


def added(sent: Sent) -> Tensor:
    """[m, H]: this rank's share of the tokens, the summands in the order of ranks."""
    first, *rest = arrived(sent.parts).unbind(0)
    total = first.clone()
    for summand in rest:
        total += summand
    return total


def sum_of(sent: Sent, group: Any, dtype: torch.dtype) -> Tensor:
    """[n, H]: the whole sum, on every rank, rounded to dtype once."""
    return arrived(all_gathered(added(sent).to(dtype), group))[: sent.tokens]
