"""One forward of a model that is not ours: what passes through it, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fused_rl.models.placed import placed_like, whole
from fused_rl.models.sharded import is_fsdp1

# Elements: counters, statistics and tables of positions, but not weights that are kept as buffers.
_SMALL = 2**20


@dataclass
class Seen:
    """What was seen of one forward."""

    logits: Any = None
    hidden: Tensor | None = None  # what the backbone gave
    into: Tensor | None = None  # what the output layer received
    product: Tensor | None = None  # what it gave, or what was put in its place
    calls: int = 0  # of the output layer
    autocast: torch.dtype | None = None  # inside the backbone


def at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


@contextmanager
def watched(layer: nn.Linear, body: nn.Module, reads: Reads, put: Tensor | None) -> Iterator[Seen]:
    """Sees what the backbone gives and what the output layer receives and gives.

    Where `put` is to stand in the place of the layer's product, the hidden states are widened to
    float32, so that what scales them is seen without rounding.
    """
    seen = Seen()

    def gives(module: nn.Module, args: tuple, output: Any) -> None:
        seen.hidden = getattr(output, "last_hidden_state", None)
        if put is not None and isinstance(seen.hidden, Tensor):
            seen.hidden = output.last_hidden_state = at_least_float(seen.hidden)
        kind = layer.weight.device.type
        if torch.is_autocast_enabled(kind):
            seen.autocast = torch.get_autocast_dtype(kind)
        reads.look()
        reads.open = True

    def receives(module: nn.Module, args: tuple) -> tuple | None:
        if not args:
            return None
        seen.into = whole(args[0])
        return args[0].to(layer.weight.dtype), *args[1:]

    def makes(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen.calls += 1
        seen.product = whole(output) if put is None else put
        # The model may write into it.
        return placed_like(seen.product, output).clone()

    handles = [
        body.register_forward_hook(gives),
        layer.register_forward_pre_hook(receives),
        # Before the hooks of others, which are then seen as what the model does.
        layer.register_forward_hook(makes, prepend=True),
    ]
    try:
        yield seen
    finally:
        reads.open = False
        for handle in handles:
            handle.remove()


class Reads(TorchFunctionMode):
    """Notes which parameters and floating buffers torch's functions are given while it is open."""

    def __init__(self, model: nn.Module, layer: nn.Linear) -> None:
        super().__init__()
        self.open = False
        self.found: set[str] = set()
        self.model, self.layer = model, layer
        self.look()

    def look(self) -> None:
        """Takes the parameters as they are now: FSDP2 puts others in their place for a forward."""
        # Kept, so that no tensor that comes while a module is loaded and offloaded has its number.
        self.tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        # FSDP1 gathers a unit's parameters into one, of which the layer's are views.
        named = [(n, t) for n, t in self.tensors if not n.endswith("_flat_param")]
        self.names = {id(t): name for name, t in named if t.is_floating_point()}
        # With those of its adapters.
        for own in self.layer.parameters():
            self.names.pop(id(own), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reading a dtype or a device is a function too.
        if self.open and getattr(func, "__name__", "") != "__get__":
            given = (id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.found |= {self.names[i] for i in given if i in self.names}
        return func(*args, **(kwargs or {}))


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation without gradient, compilation or autocast, of which no trace remains."""
    modules = list(model.modules())
    training = [(m, m.training) for m in modules]
    # FSDP1 keeps its own state on itself, begun by its first forward.
    modules = [m for m in modules if not is_fsdp1(m)]
    kept = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
    buffers = {id(b): b for b in model.buffers() if b.numel() <= _SMALL and not b.is_inference()}
    values = [(b, b._version, b.clone()) for b in buffers.values()]
    devices = [] if device.type in ("cpu", "meta") else [device]
    for module, _ in training:
        vars(module)["training"] = False
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
            # A weight that is cast here must not be found in the cache by a forward with gradients.
            torch.autocast(device.type, enabled=False, cache_enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, attributes, own_buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(own_buffers)
        for module, mode in training:
            vars(module)["training"] = mode
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
