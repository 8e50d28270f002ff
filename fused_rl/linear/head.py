"""LMHead: what turns hidden states into logits.

z = softcap(scale * (hidden . weight^T + bias))        softcap(x) = c * tanh(x / c)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rl import checks, reference
from fused_rl.models import asked, parts
from fused_rl.ops import in_full


@dataclass(frozen=True, eq=False)
class LMHead:
    """The language-model head: a weight, and what the model does to its product.

    Args:
        weight: [V, H], any floating dtype, any strides.
        bias: [V] or None; may hold -inf for tokens that are never to be sampled.
        scale: multiplies the raw logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c of c * tanh(x / c) (Gemma's final_logit_softcapping), or None.

    Raises:
        ValueError: a shape, dtype or value that is not as above; a weight without elements, as
            sharded training leaves it when the parameter is not gathered; a DTensor or a quantised
            tensor.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.is_floating("weight", self.weight)
        parts.is_whole("weight", self.weight)
        checks.require(
            self.weight.dim() == 2 and self.weight.numel() > 0,
            lambda: (
                f"weight must be [V, H] with elements, got {list(self.weight.shape)}; "
                "a sharded parameter must be gathered first"
            ),
        )
        checks.is_number("scale", self.scale)
        if self.softcap is not None:
            checks.is_number("softcap", self.softcap)
        checks.require(
            self.softcap is None or self.softcap > 0,
            lambda: f"softcap must be positive or None, got {self.softcap}",
        )
        if self.bias is not None:
            checks.is_floating("bias", self.bias)
            parts.is_whole("bias", self.bias)
            checks.require(
                self.bias.shape == self.weight.shape[:1],
                lambda: (
                    f"bias must be [V] = {list(self.weight.shape[:1])}, got {list(self.bias.shape)}"
                ),
            )
            checks.same_device(weight=self.weight, bias=self.bias)

    @property
    def requires_grad(self) -> bool:
        """Whether weight or bias is trained."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @classmethod
    def of(cls, head: LMHead | Tensor | torch.nn.Linear) -> LMHead:
        """head itself, a head of that weight alone, or of that layer's weight and bias.

        Raises:
            ValueError: a layer that is no plain torch.nn.Linear, or that has forward hooks or a
                forward of its own: its output need not be hidden @ weight.T + bias.
        """
        if isinstance(head, LMHead):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        checks.require(
            type(head) is torch.nn.Linear,
            lambda: (
                "head must be an LMHead, a weight [V, H] or a torch.nn.Linear, "
                f"got {type(head).__module__}.{type(head).__qualname__}"
            ),
        )
        own = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
        checks.require(
            not own,
            lambda: (
                "head is a torch.nn.Linear with forward hooks or a forward of its own, so that its "
                "weight need not tell what it does: give LMHead(weight, bias) if it does"
            ),
        )
        return cls(head.weight, head.bias)

    @classmethod
    def from_model(cls, model: Any, *, ask: bool = True) -> LMHead:
        """The head of a transformers causal language model: weight, bias, scale and softcap.

        The hidden states it fits are those that the model's own output embeddings receive:
        `integrations.transformers.backbone(model)(...).last_hidden_state`, for nearly every model
        `model.base_model(...).last_hidden_state`. Of a PeftModel it is the head of the model
        inside, whose adapters stay in place.

        The model is asked: the first call runs it three times on ten tokens, without gradient and
        without a trace, and compares its own logits with this head's. The answer is remembered as
        long as the output embeddings, the hooks on them and the numbers in the config stay the
        same. A scale, a softcap, a vocabulary that is cut or tokens that are ruled out are found
        whatever their names; whatever else is done to logits is an error.

        Args:
            model: as above; in any mode, on any device.
            ask: False takes scale and softcap from the config by their usual names, and believes
                them.

        Raises:
            ValueError: the model's logits are not those of any such head, by how much, in nats; an
                encoder-decoder, prompt learning, a wrapper such as DistributedDataParallel; output
                embeddings that are not a plain linear layer with a plain weight (an adapter on
                them, quantised, sharded, offloaded).
        """
        recipe = asked.answer(model, ask=ask).recipe
        layer = parts.output_layer(parts.unwrap(model))
        return cls(*recipe.parts(layer.weight, layer.bias))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] at temperature 1, in float32 (float64 for float64 inputs).

        They are materialised: for tests, and for the few tokens one wants to look at. Under
        torch.autocast they are those of float32 operands.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        ones = torch.ones(flat.shape[0], dtype=torch.float64, device=flat.device)
        options = (ones, self.scale, self.softcap or 0.0)
        z = in_full(reference.logits)(flat, self.weight, self.bias, *options)
        return z.reshape(*hidden.shape[:-1], self.weight.shape[0])
