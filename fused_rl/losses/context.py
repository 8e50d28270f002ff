"""Numbers of sequences that several ranks hold parts of, as context-parallel training spreads them.

A loss of R ranks is the sum of their losses, and every rank's may depend on the whole sequence. So
what a rank's number is worth is the sum over ranks of what each makes of it: the derivative of a
sum over ranks is a sum over ranks.

torch's functional collectives, which torch.compile traces.
"""

from typing import Any

import torch
from torch import Tensor


def summed(values: Tensor, group: Any | None) -> Tensor:
    """[n]: values [n] summed over the ranks of a group, with its gradient; None: themselves."""
    return values if group is None else _Sum.apply(values, group)


def least(values: Tensor, group: Any | None) -> Tensor:
    """[n]: the least of values [n] over the ranks of a group, without gradient; None: themselves.

    NaN where a rank's is.
    """
    if group is None:
        return values
    # What a collective makes of NaN is its own affair.
    bad = _reduced(values.isnan().to(values.dtype), "max", group)
    found = _reduced(values.nan_to_num(torch.inf, torch.inf, -torch.inf), "min", group)
    return found.masked_fill(bad > 0, torch.nan)


def _reduced(values: Tensor, how: str, group: Any) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(values.contiguous(), how, group))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        return _reduced(values, "sum", group)

    @staticmethod
    def backward(ctx, dtotal):
        return _reduced(dtotal, "sum", ctx.group), None
