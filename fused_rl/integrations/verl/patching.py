"""Our head in the place of verl's, our losses in its registry; and everything put back."""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import torch

from fused_rl.integrations.verl.heads import FusedLinearForPPO, linear_cross_entropy
from fused_rl.integrations.verl.losses import policy_losses

# Where verl has what, and what stands there while it is patched.
_HEADS = {
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): linear_cross_entropy,
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"): FusedLinearForPPO,
}
_REGISTRY = ("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY")

# (theirs, ours), while patched.
_replaced: list[tuple[Any, Any]] = []


def patch() -> None:
    """Our head in verl's place, and our losses in its registry as "fused_<name>", until `unpatch`.

    Models whose forward has been patched by verl look the head up when they are called, and change
    over. It changes the process it is called in alone: see fused_rl.integrations.verl.worker for
    those of verl's workers. A second call does nothing.

    Raises:
        RuntimeError: verl is not installed, has not these names in these places, or calls what is
            there with other arguments than we know. Nothing is changed then.
    """
    if _replaced:
        return
    found = [(_found(*place), ours) for place, ours in _HEADS.items()]
    registry = _found(*_REGISTRY)
    for (module, name), (theirs, ours) in zip(_HEADS, found, strict=True):
        _takes_what_ours_takes(f"{module}.{name}", theirs, ours)
    if "vanilla" in registry:
        theirs, ours = registry["vanilla"], policy_losses["vanilla"]
        _takes_what_ours_takes("the policy loss 'vanilla'", theirs, ours)
    for theirs, ours in found:
        _swap(theirs, ours)
    registry.update({f"fused_{name}": loss for name, loss in policy_losses.items()})
    _replaced.extend(found)


def unpatch() -> None:
    """Everything as it was before `patch`: the very objects."""
    if not _replaced:
        return
    for theirs, ours in _replaced:
        _swap(ours, theirs)
    _replaced.clear()
    registry = _found(*_REGISTRY)
    for name in policy_losses:
        registry.pop(f"fused_{name}", None)


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RuntimeError(f"{module} cannot be imported: is verl installed? {error}") from error
    except AttributeError as error:
        raise RuntimeError(f"verl {_version()} has no {name} in {module}: it has moved") from error


def _version() -> str:
    return getattr(sys.modules.get("verl"), "__version__", "of unknown version")


def _swap(old: object, new: object) -> None:
    """Every name in verl's modules that is bound to `old` becomes one of `new`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "verl" and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _takes_what_ours_takes(place: str, theirs: Any, ours: Any) -> None:
    """RuntimeError where theirs may be called with an argument that ours does not have."""
    for their_names, our_names in zip(_parameters(theirs), _parameters(ours), strict=True):
        if their_names != our_names[: len(their_names)]:
            raise RuntimeError(
                f"verl {_version()} is not one that fused_rl can patch: {place} takes "
                f"({', '.join(their_names)}), not ({', '.join(our_names)}). Those of 0.8.0, 0.9.0 "
                "and 0.9.1 are known: use one of them, or verl without the patch"
            )


def _parameters(thing: Any) -> list[tuple[str, ...]]:
    """The names of what it is called with; of a module, also of what its forward is."""
    owner = getattr(thing, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        # Its apply says (*args); the first parameter of forward is the context.
        return [tuple(inspect.signature(owner.forward).parameters)[1:]]
    if isinstance(thing, type):
        forward = tuple(inspect.signature(thing.forward).parameters)[1:]
        return [tuple(inspect.signature(thing).parameters), forward]
    return [tuple(inspect.signature(thing).parameters)]
