"""What engines of data-parallel training do to a model whose weights they keep in shards.

    FSDP2         the module's class becomes a subclass; weights are DTensors between calls
    FSDP1, DDP    a module around the model, or around parts of it
    DeepSpeed     an engine around the model; under ZeRO-3 weights are empty between calls

All of them gather weights, and reduce gradients, by what runs around a module's own call.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fused_rl.models.placed import is_placed


def is_fsdp2(module: object) -> bool:
    """Whether fully_shard was called on it."""
    # Where nobody has imported it, nobody has called it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_fsdp1(module: object) -> bool:
    return _is_of(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_ddp(module: object) -> bool:
    return _is_of(module, "torch.nn.parallel.distributed", "DistributedDataParallel")


def is_deepspeed(module: object) -> bool:
    return _is_of(module, "deepspeed", "DeepSpeedEngine")


def _is_of(module: object, room: str, name: str) -> bool:
    kinds = type(module).__mro__
    return any(kind.__name__ == name and kind.__module__.startswith(room) for kind in kinds)


def inside(model: Any) -> Any:
    """The model that engines, and torch.compile, have been put around."""
    while (inner := _peeled(model)) is not model:
        model = inner
    return model


def _peeled(model: Any) -> Any:
    """Without the outermost of them, if there is one."""
    if _is_compiled(model):
        return model._orig_mod
    return model.module if is_fsdp1(model) or is_ddp(model) or is_deepspeed(model) else model


def runs(model: Any) -> Any:
    """The module whose call runs the model with its weights gathered: FSDP1's, or the model."""
    while not is_fsdp1(model) and (inner := _peeled(model)) is not model:
        model = inner
    return model


def linear_of(layer: Any) -> Any:
    """The layer that FSDP1, torch.compile or PEFT's modules_to_save has wrapped, with adapters that
    are on it; else the layer itself.
    """
    while (inner := _unwrapped(layer)) is not layer:
        layer = inner
    return layer


def _unwrapped(layer: Any) -> Any:
    """Without the outermost of them, if there is one."""
    if is_fsdp1(layer):
        return layer.module
    if _is_compiled(layer):
        return layer._orig_mod
    if _is_of(layer, "peft.", "ModulesToSaveWrapper"):
        active = () if layer.disable_adapters else layer.active_adapters
        return layer.modules_to_save[active[0]] if active else layer.original_module
    return layer


def _is_compiled(module: object) -> bool:
    return isinstance(getattr(module, "_orig_mod", None), nn.Module)


def is_linear(layer: object) -> bool:
    """A torch.nn.Linear, as it is or as fully_shard makes it; no other subclass."""
    kind = type(layer)
    return kind is nn.Linear or (is_fsdp2(layer) and nn.Linear in kind.__bases__)


def has_hooks(layer: nn.Module) -> bool:
    """Whether it, what it wraps, or a layer beneath its adapters, has forward hooks or a forward of
    its own; those of engines gather its weight.
    """
    if (inner := _unwrapped(layer)) is layer:
        inner = getattr(layer, "base_layer", layer)
    if inner is not layer and has_hooks(inner):
        return True
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    rooms = [getattr(hook, "__module__", None) or "" for hook in hooks]
    foreign = [r for r in rooms if not r.startswith(("torch.distributed.fsdp", "deepspeed."))]
    # torch.compile's forward is that of what it wraps.
    return bool(foreign or ("forward" in vars(layer) and not _is_compiled(layer)))


def is_here(tensor: Tensor) -> bool:
    """Whether the numbers of a weight [V, H] are on this rank: not in shards, not freed."""
    if is_placed(tensor):
        return False
    # FSDP1's shards are flat, ZeRO-3's empty.
    return tensor.dim() == 2 and tensor.numel() > 0 and not is_freed(tensor)


def is_freed(tensor: Tensor) -> bool:
    """Whether FSDP has given the memory of this tensor back: a shape is left of it."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return tensor.numel() > 0 and _has_storage(tensor) and tensor.untyped_storage().size() == 0


def _has_storage(tensor: Tensor) -> bool:
    # What torch.func puts around tensors has none.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_tensor_parallel(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer's weight is cut along the vocabulary over ranks that share their tokens.

    The weight of an FSDP2 unit looks alike while it is in shards, on the unit's own mesh. A plan
    leaves hooks, or a forward, that bring the columns together.
    """
    weight = layer.weight
    if not is_placed(weight) or weight.device_mesh.ndim != 1 or not has_hooks(layer):
        return False
    units = (module for module in model.modules() if is_fsdp2(module))
    return all(weight.device_mesh != mesh for unit in units for mesh in _meshes(unit))


def in_forward(module: nn.Module) -> bool:
    """Whether a forward of the FSDP2 model that the module is part of is under way."""
    return is_fsdp2(module) and module._get_fsdp_state()._state_ctx.iter_forward_root is not None


def gathers(layer: nn.Module) -> bool:
    """Whether the layer's own call gathers its weight, and reduces its gradient."""
    return is_fsdp1(layer) or is_fsdp2(layer) or hasattr(layer.weight, "ds_id")


def is_called_out_of_turn(layer: nn.Module) -> bool:
    """Whether FSDP2 would take a call of the layer for one of its group, and reshard too early.

    A group of several modules, [norm, lm_head], runs once through: a call of the last one alone
    would give back the norm's weight before the norm's backward pass. And where a tensor-parallel
    plan has hooks on the layer, they expect its output.
    """
    if not is_fsdp2(layer):
        return False
    state = layer._get_fsdp_state()
    closed = len(state._modules) > 1 and layer not in state._modules_to_run_forward
    return closed or _is_parallel(layer.weight, layer)


def _is_parallel(weight: Tensor, unit: nn.Module) -> bool:
    """Whether a weight is cut by more than the FSDP2 of its unit."""
    if not is_placed(weight):
        return False
    return all(weight.device_mesh != mesh for mesh in _meshes(unit))


def _meshes(unit: nn.Module) -> list[Any]:
    state = unit._get_fsdp_state()
    # One group before torch 2.13.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group.mesh_info.mesh for group in groups if group is not None]


def around(model: Any, layer: nn.Module) -> list[nn.Module]:
    """The modules whose own calls gather the layer's weight, or have gradients averaged, from the
    outside in; the layer itself, where `gathers`, is not among them.

    Raises:
        ValueError: a weight that is in shards, and nothing here that gathers it.
    """
    calls = []
    while (inner := _peeled(model)) is not model:
        calls += [model] if is_fsdp1(model) or is_ddp(model) else []
        model = inner
    weight = linear_of(layer).weight
    if gathers(layer) or is_here(weight) or any(map(is_fsdp1, calls)):
        return calls
    units = [m for m in _above(model, layer) if is_fsdp2(m) or is_fsdp1(m)]
    if is_tensor_parallel(model, linear_of(layer)):
        # Its rows are a head's as they are.
        return calls
    if not units:
        raise ValueError(_NOBODY.format(type(model).__name__))
    gathered = is_fsdp2(units[-1]) and weight.device_mesh.ndim == 1
    return calls if gathered and _is_parallel(weight, units[-1]) else [*calls, units[-1]]


_NOBODY = (
    "the weight of {}'s output embeddings is in shards here, and the module that gathers it is "
    "around the model that was given: give model_policy_loss that module, or call it inside its "
    "forward (of FSDP2 also a method, by register_fsdp_forward_method), or shard that module with "
    "reshard_after_forward=False. Where nothing gathers it and tokens are to travel, give "
    "linear_policy_loss LMHead(weight, group=mesh.get_group(), hidden=Hidden.OWN_TOKENS)"
)


def _above(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules of the model that the layer is in, from the outside in."""
    path = next(name for name, module in model.named_modules() if module is layer)
    found = [model]
    for name in path.split(".")[:-1]:
        found.append(getattr(found[-1], name))
    return found


class Made(NamedTuple):
    """How a tensor was made of a DTensor."""

    placements: tuple  # of what full_tensor() or to_local() took
    said: tuple | None  # the placements that its gradient is said to have
    ranks: int


def of_dtensor(weight: Tensor) -> Made | None:
    """Of a trained weight, if it was made of a DTensor by full_tensor() or to_local()."""
    node = weight.grad_fn
    # Casts, views and slices lie in between. What another function in Python makes of a gradient,
    # the mean over ranks for one, is its own affair.
    while node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction):
        before = [n for n, _ in node.next_functions if n is not None]
        node = before[0] if len(before) == 1 else None
    if type(node).__name__ != "_ToTorchTensorBackward":
        return None
    spec = node.dtensor_spec
    return Made(spec.placements, node.grad_placements, spec.mesh.size())
