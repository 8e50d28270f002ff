"""Low-rank adapters on an output layer (LoRA), and how PEFT keeps them.

    y = hidden . weight^T + bias + sum_i scaling_i (dropout_i(hidden) . down_i^T) . up_i^T

They are read anew whenever a head is formed: which are active, merged or disabled may change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from fused_rl.checks import require
from fused_rl.models import sharded


@dataclass(frozen=True, eq=False)
class Adapter:
    """A product of low rank that is added to a head's.

    Args:
        down: [r, H], any floating dtype (PEFT's lora_A.weight).
        up: [V, r], any floating dtype (PEFT's lora_B.weight).
        scaling: multiplies their product.
        dropout: the probability with which elements of hidden are 0 before `down`, drawn anew in
            every call; 0 where the model is not in training mode.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0
    dropout: float = 0.0

    def states(self, hidden: Tensor) -> Tensor:
        """What `up` is multiplied by, [..., r], of hidden [..., H]."""
        # In the wider of the two dtypes, or that of torch.autocast.
        wide = torch.promote_types(hidden.dtype, self.down.dtype)
        x = hidden.to(wide)
        if self.dropout:
            x = dropout(x, self.dropout)
        return linear(x, self.down.to(wide)) * self.scaling

    def product(self, hidden: Tensor) -> Tensor:
        """What is added to the head's product, [..., V]: for few tokens."""
        u = self.states(hidden)
        return linear(u, self.up.to(u.dtype))

    def of_rows(self, entries: slice) -> Adapter:
        """For some entries of the vocabulary."""
        return replace(self, up=self.up[entries])

    def detached(self) -> Adapter:
        return replace(self, down=self.down.detach(), up=self.up.detach())


def is_adapted(layer: object) -> bool:
    """Whether it is PEFT's LoRA of a linear layer, as PEFT or fully_shard makes it."""
    kinds = type(layer).__bases__ if sharded.is_fsdp2(layer) else (type(layer),)
    # PEFT need not be imported to know.
    ours = any(k.__module__ == "peft.tuners.lora.layer" and k.__name__ == "Linear" for k in kinds)
    return ours and (sharded.is_linear(layer.base_layer) or is_adapted(layer.base_layer))


def base_of(layer: nn.Module) -> nn.Linear:
    """The linear layer beneath adapters; one without them is it itself."""
    return layer if sharded.is_linear(layer) else base_of(layer.base_layer)


def names_in(layer: nn.Module) -> tuple[str, ...]:
    """Of the adapters that take part in the layer's product: none where they are disabled, or
    merged into the weight.

    Raises:
        ValueError: adapters of another kind than those of the formula; a call of the layer that
            PEFT gives more than hidden states; a weight that is to be unmerged first.
    """
    if layer.disable_adapters:
        require(
            not layer.merged_adapters,
            lambda: (
                f"adapters {layer.merged_adapters} of the output embeddings are merged into the "
                "weight and disabled at once, and PEFT takes them out only in the layer's own "
                "call: unmerge_adapter() first"
            ),
        )
        return ()
    for hook in layer._forward_pre_hooks.values():
        given = _GIVEN.get(getattr(getattr(hook, "func", hook), "__name__", ""))
        require(
            given is None,
            lambda given=given: (
                f"PEFT gives {given} to the adapters of the output embeddings, by which they "
                "differ from token to token: call the model without, once for each adapter"
            ),
        )
    if layer.merged_adapters:
        return ()
    names = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    for name in names:
        _is_plain(layer, name)
    return names


_GIVEN = {
    "_adapter_names_pre_forward_hook": "adapter_names",
    "_alora_offsets_pre_forward_hook": "alora_offsets",
}


def _is_plain(layer: nn.Module, name: str) -> None:
    """ValueError for what is called LoRA, and is another formula."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is None and getattr(layer, "use_dora", {}).get(name):
        variant = "DoRA"
    require(
        variant is None,
        lambda: (
            f"the adapter {name!r} on the output embeddings is no plain LoRA but a "
            f"{_name_of(variant)}, whose product is not a sum: {WAY_OUT}"
        ),
    )
    for factor in (layer.lora_A[name], layer.lora_B[name]):
        require(
            sharded.is_linear(factor) and not sharded.has_hooks(factor),
            lambda factor=factor: (
                f"the adapter {name!r} on the output embeddings has a {_name_of(factor)} where a "
                f"plain torch.nn.Linear is needed: {WAY_OUT}"
            ),
        )
    drop = layer.lora_dropout[name]
    require(
        type(drop) in (nn.Dropout, nn.Identity),
        lambda: (
            f"the adapter {name!r} on the output embeddings has a {_name_of(drop)} as its dropout: "
            f"{WAY_OUT}"
        ),
    )


WAY_OUT = (
    "merge the adapter (merge_and_unload, merge_adapter), or leave lm_head out of target_modules; "
    "plain LoRA and modules_to_save are taken"
)


def _name_of(thing: Any) -> str:
    if isinstance(thing, str):
        return thing
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def adapters_of(layer: nn.Module) -> tuple[Adapter, ...]:
    """Those that take part in the layer's product, in its order.

    Raises:
        ValueError: as names_in.
    """
    if sharded.is_linear(layer):
        return ()
    found = adapters_of(layer.base_layer)
    for name in names_in(layer):
        drop = layer.lora_dropout[name]
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        factors = layer.lora_A[name].weight, layer.lora_B[name].weight
        found = (*found, Adapter(*factors, float(layer.scaling[name]), rate))
    return found


def bias_of(layer: nn.Module) -> Tensor | None:
    """The layer's bias, with those of its adapters (PEFT's lora_bias)."""
    if sharded.is_linear(layer):
        return layer.bias
    bias = bias_of(layer.base_layer)
    for name in names_in(layer):
        if (own := layer.lora_B[name].bias) is not None:
            own = own * layer.scaling[name]
            bias = own if bias is None else bias + own
    return bias


def state_of(layer: nn.Module) -> tuple:
    """What says which adapters a layer has: quickly made, quickly compared."""
    if sharded.is_linear(layer):
        return ()
    parts = ((id(layer.lora_A[n]), id(layer.lora_B[n]), layer.scaling[n]) for n in names_in(layer))
    return (*state_of(layer.base_layer), *parts)
