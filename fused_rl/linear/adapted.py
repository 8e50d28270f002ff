"""A head with adapters is a head without them, on states and a weight of a few columns more.

    [hidden, u] . [weight, up]^T        u = scaling dropout(hidden) down^T

Of the gradient of that weight the last columns are all that is trained. A factor with more digits
than what it is beside (float32 adapters on a bfloat16 model) takes the place of two columns, a high
part and a low one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.models import parts
from fused_rl.models.adapters import Adapter

# Columns of bfloat16 in 16 bytes: rows that vectors, and the vendor's products, can begin at.
_ALIGNED = 8


def are_adapters(adapters: object, weight: Tensor) -> None:
    """ValueError unless they are a tuple of adapters that fit the weight [V, H]."""
    checks.require(
        isinstance(adapters, tuple) and all(isinstance(a, Adapter) for a in adapters),
        lambda: (
            "adapters must be a tuple of fused_rl.models.adapters.Adapter, "
            f"got {checks.shown(adapters)}"
        ),
    )
    for i, adapter in enumerate(adapters):
        V, H = weight.shape
        for name in ("down", "up"):
            factor, named = getattr(adapter, name), f"adapters[{i}].{name}"
            checks.is_floating(named, factor)
            parts.is_whole(named, factor)
            if not torch.compiler.is_compiling():
                parts.has_its_gradient(named, factor)
            checks.same_device(**{"weight": weight, named: factor})
        down, up = adapter.down.shape, adapter.up.shape
        checks.require(
            len(down) == len(up) == 2 and (down[1], up[0]) == (H, V) and down[0] == up[1] > 0,
            lambda i=i, down=down, up=up, V=V, H=H: (
                f"adapters[{i}] must have down [r, H] and up [V, r] beside the weight {[V, H]}, "
                f"got down {list(down)} and up {list(up)}"
            ),
        )
        checks.is_number(f"adapters[{i}].scaling", adapter.scaling)
        checks.is_number(f"adapters[{i}].dropout", adapter.dropout)
        checks.require(
            0 <= adapter.dropout < 1,
            lambda i=i, p=adapter.dropout: f"adapters[{i}].dropout must be in [0, 1), got {p}",
        )


class Joined(NamedTuple):
    """States [..., K] and weight [V, K]; and what has their gradients where the weight is frozen:
    of all states, and of its last k columns, in the adapters' dtype where that has more digits.
    """

    states: Tensor
    weight: Tensor
    hidden: Tensor  # [..., K]
    up: Tensor  # [V, k]


def joined(
    hidden: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    autocast: torch.dtype | None = None,
) -> Joined:
    """[hidden, u] and [weight, up], differentiable: a copy of the weight.

    Args:
        hidden: [..., H], as it is before torch.autocast.
        weight: [V, H], as torch.autocast makes it.
        adapters: at least one.
        autocast: the dtype of torch.autocast, if that is on.
    """
    u = torch.cat([adapter.states(hidden) for adapter in adapters], -1)
    up = torch.cat([adapter.up for adapter in adapters], -1) if adapters[1:] else adapters[0].up
    if autocast is not None:
        hidden, up = (t if t.dtype == torch.float64 else t.to(autocast) for t in (hidden, up))
    states, rows = _halves(u, hidden.dtype), _halves(up, weight.dtype)
    # The product of two low parts is beyond the digits of the sum.
    trained = len(states) * up.shape[1]
    columns = hidden.shape[-1] + trained + len(rows[1:]) * up.shape[1]
    zeros = [-columns % _ALIGNED] if columns % _ALIGNED else []
    left = [hidden, *(hidden.new_zeros(*hidden.shape[:-1], n) for n in zeros)]
    right = [weight, *(weight.new_zeros(len(weight), n) for n in zeros)]
    of_states = torch.cat([*left, *states[:1] * len(rows[1:]), *states], -1)
    of_weight = torch.cat([*right, *rows[1:], *rows[:1] * len(states)], -1)
    if len(states) == 1:
        return Joined(of_states, of_weight, of_states, up)
    wide = (t.to(u.dtype) for t in left)
    wide = torch.cat([*wide, *[u] * len(rows), torch.zeros_like(u)], -1)
    return Joined(of_states, of_weight, wide, torch.cat([up, up], -1))


def _halves(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """x as a sum in another dtype: of one part, which has the gradient, or of two."""
    high = x.to(dtype)
    if torch.finfo(dtype).eps <= torch.finfo(x.dtype).eps:
        return [high]
    return [high, (x.detach() - high.detach().to(x.dtype)).to(dtype)]
