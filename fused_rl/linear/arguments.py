"""What every function of a head begins with: its arguments checked, and flattened to [N, ...].

And what it ends with where something is wrong: errors that name a token by its place in the
caller's shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.linear.adapted import Joined, joined
from fused_rl.linear.head import LMHead
from fused_rl.models.placed import is_placed
from fused_rl.parallel.spread import Spread
from fused_rl.parallel.states import Hidden
from fused_rl.reference import acc_dtype


def flat_arguments(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: float | Tensor, whose: str = ""
) -> ops.Head:
    """What every op of the linear head begins with: checked, flattened to [N, ...].

    whose: what the arguments' names begin with, for the errors.
    """
    _are_here(hidden, head, labels, whose)
    return _flattened(hidden, head, labels, temperature, whose)[0]


def _are_here(hidden: Tensor, head: LMHead, labels: Tensor, whose: str) -> None:
    head.is_here("this function")
    checks.is_floating(f"{whose}hidden", hidden)
    checks.require(
        not is_placed(hidden),
        lambda: (
            f"{whose}hidden is a DTensor ({hidden.placements}), and the head's weight is not "
            "spread over its ranks: give the head their group, or hidden.to_local() where all is "
            "here"
        ),
    )
    checks.is_labels(labels)
    checks.leading_shape(f"{whose}hidden", hidden, labels)


def spread_arguments(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: float | Tensor
) -> tuple[ops.Head, Spread | None]:
    """flat_arguments of heads whose vocabulary may be spread over ranks; hidden is this rank's."""
    if head.group is None:
        return flat_arguments(hidden, head, labels, temperature), None
    checks.is_floating("hidden", hidden)
    checks.is_labels(labels)
    hidden, spread = head.spread(hidden, labels)
    if spread.hidden is not Hidden.SEQUENCE_SHARDED:
        checks.leading_shape("hidden", hidden, labels)
    return _flattened(hidden, head, labels, temperature, "")[0], spread


def own_arguments(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: float | Tensor
) -> tuple[ops.Head | ops.AdaptedHead, Spread | None]:
    """spread_arguments, for what knows heads of which adapters alone are trained."""
    if not head.adapters:
        return spread_arguments(hidden, head, labels, temperature)
    _are_here(hidden, head, labels, "")
    flat, of = _flattened(hidden, head, labels, temperature, "")
    alone = of.up.requires_grad and not head.weight.requires_grad
    if not alone or not torch.is_grad_enabled() or transformed():
        return flat, None
    states, weight, *rest = flat
    own = of.hidden.reshape(states.shape)
    return ops.AdaptedHead(own, of.up, *rest, states.detach(), weight.detach()), None


def _flattened(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: float | Tensor, whose: str
) -> tuple[ops.Head, Joined | None]:
    """The head; and what it is made of, where it has adapters."""
    name = f"{whose}hidden"
    checks.require(
        hidden.shape[-1] == head.weight.shape[1],
        lambda: (
            f"{name} and {whose}weight must agree in H, got {name} {list(hidden.shape)} "
            f"and {whose}weight {list(head.weight.shape)}"
        ),
    )
    checks.same_device(**{name: hidden, f"{whose}weight": head.weight, "labels": labels})
    states, weight, of, autocast = hidden, head.weight, None, None
    kind = hidden.device.type
    if ops.autocasts(kind):
        autocast = torch.get_autocast_dtype(kind)
        states, weight = (_autocast(t, autocast) for t in (hidden, weight))
    if head.adapters:
        # Their dropout is of the states as they are given.
        of = joined(hidden, weight, head.adapters, autocast)
        states, weight, *_ = of
    hidden = states
    flat = hidden.reshape(-1, hidden.shape[-1])
    t = flat_temperature(temperature, labels, acc_dtype(hidden, weight), whose)
    return ops.Head(flat, weight, head.bias, labels.reshape(-1).long(), t, *head.transform), of


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def flat_temperature(
    temperature: float | Tensor, labels: Tensor, dtype: torch.dtype, whose: str = ""
) -> Tensor:
    """One temperature per token, [N]."""
    name = f"{whose}temperature"
    if not isinstance(temperature, Tensor):
        checks.is_positive(name, temperature)
        return labels.new_full((labels.numel(),), float(temperature), dtype=dtype)
    checks.is_floating(name, temperature)
    checks.require(
        not temperature.requires_grad,
        lambda: f"{name} gets no gradient here, but the tensor requires one: detach it",
    )
    checks.same_device(**{name: temperature, "labels": labels})
    try:
        expanded = temperature.to(dtype).expand(labels.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must broadcast to labels, got {name} {list(temperature.shape)} "
            f"and labels {list(labels.shape)}"
        ) from error
    return expanded.reshape(-1)


def named(op: Callable, *args: object, shape: torch.Size) -> Any:
    """op(*args); what it says of a token [n] names the token's place in the caller's shape."""
    try:
        return op(*args)
    except ValueError as error:
        raise ValueError(checks.placed(str(error), shape)) from error
