"""LMHead: what turns hidden states into logits.

z = softcap(scale * rounded(hidden . weight^T + bias))        softcap(x) = c * tanh(x / c)
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_rl import checks, reference
from fused_rl.linear.adapted import are_adapters, joined
from fused_rl.models import asked, parts, sharded
from fused_rl.models.adapters import Adapter, adapters_of, bias_of, is_adapted
from fused_rl.models.placed import is_placed, rows_of, states_of
from fused_rl.models.recipes import Recipe
from fused_rl.ops import in_full
from fused_rl.parallel.collectives import is_group, rank_in, ranks_of
from fused_rl.parallel.spread import Spread
from fused_rl.parallel.states import Hidden
from fused_rl.reference import ROUNDED


@dataclass(frozen=True, eq=False)
class LMHead:
    """The language-model head: a weight, and what the model does to its product.

    With a group the vocabulary is spread over its ranks: each has some of the rows, and a call that
    every rank makes with the same labels gives every rank the numbers of the whole vocabulary.
    linear_logprobs, linear_top_logprobs, linear_kept_logprobs and linear_policy_loss take such a
    head; collectives are in those calls and in their backward passes, none is in this constructor.
    The gradients of weight and bias are those of this rank's rows, complete. With
    Hidden.OWN_TOKENS each rank has labels of its own, and gets the numbers and gradients of those;
    the gradients of weight and bias are then divided by the number of ranks, as sharded training
    has them.

    Args:
        weight: [V, H], any floating dtype, any strides. With a group this rank's rows, [V_r, H],
            perhaps none, or a DTensor [V, H] that is cut along the vocabulary (Shard(0)) over that
            group.
        bias: [V] or None; may hold -inf for tokens that are never to be sampled. With a group as
            weight is.
        scale: multiplies the raw logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c of c * tanh(x / c) (Gemma's final_logit_softcapping), or None.
        logits_dtype: torch.bfloat16 or torch.float16 imitates an engine whose head has that dtype:
            each sum hidden . weight + bias, formed in float32, is rounded once to it, to nearest,
            ties to even. What follows is in float32, as the samplers of vLLM, SGLang and
            transformers have it; an engine that rounds after scale or softcap as well differs
            there. The gradient takes the derivative of rounding for 1, and probabilities from the
            rounded logits. What float16 has no room for is inf, as the engine's, and a logit of
            inf makes NaN. None or torch.float32: nothing is rounded.
        group: the torch.distributed.ProcessGroup whose ranks share the vocabulary, or None.
        start: the vocabulary entry of this rank's first row; None: every rank has as many rows.
        vocabulary: V, entries of all ranks; rows beyond it, with which Megatron fills the last
            ranks up, take no part. None: the rows of all ranks, where start is None.
        hidden: how hidden states lie on the ranks. Those that are a DTensor say it themselves.
        adapters: low-rank products that are added, fused_rl.models.adapters.Adapter (LoRA). Where
            they alone are trained, linear_logprobs takes 6 NHV, linear_policy_loss 4, and no
            gradient of the weight is formed; a copy of the weight, with r columns more, is in
            memory from the call to the end of its backward pass.

    Raises:
        ValueError: a shape, dtype or value that is not as above; a weight without elements or
            memory, as sharded training leaves it where the parameter is not gathered; a DTensor
            without a group, or what full_tensor() or to_local() makes of a trained one, whose
            gradient would be one rank's; a quantised tensor; a start without a vocabulary, or any
            option of a group without one; adapters beside a group, or of other sizes.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    _: KW_ONLY
    logits_dtype: torch.dtype | None = None
    group: torch.distributed.ProcessGroup | None = None
    start: int | None = None
    vocabulary: int | None = None
    hidden: Hidden = Hidden.REPLICATED
    adapters: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        self._place()
        parts.is_plain("weight", self.weight)
        checks.is_floating("weight", self.weight)
        parts.is_whole("weight", self.weight)
        if self.group is None and not torch.compiler.is_compiling():
            parts.has_its_gradient("weight", self.weight)
        # A rank may have no rows, and has no other reason for an empty weight.
        has_elements = self.weight.numel() > 0 or (self.group is not None and len(self.weight) == 0)
        checks.require(
            self.weight.dim() == 2 and has_elements,
            lambda: (
                f"weight must be [V, H] with elements, got {list(self.weight.shape)}; "
                "a sharded parameter must be gathered first, by what reduces its gradient too: "
                "call fused_rl.model_policy_loss, or form the head in a forward that gathers it"
            ),
        )
        checks.is_number("scale", self.scale)
        if self.softcap is not None:
            checks.is_number("softcap", self.softcap)
        checks.require(
            self.softcap is None or self.softcap > 0,
            lambda: f"softcap must be positive or None, got {self.softcap}",
        )
        checks.require(
            self.logits_dtype in (torch.float32, *ROUNDED),
            lambda: (
                "logits_dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got "
                f"{checks.shown(self.logits_dtype)}"
            ),
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
        are_adapters(self.adapters, self.weight)
        checks.require(
            self.group is None or not self.adapters,
            lambda: (
                "a head that is spread over ranks takes no adapters: merge them into the weight, "
                "or give the weight [weight, up] and hidden [hidden, scaling * hidden @ down.T]"
            ),
        )

    def _place(self) -> None:
        """This rank's rows, cut to the vocabulary, with start and vocabulary found."""
        checks.is_one_of("hidden", self.hidden, Hidden)
        if self.group is None:
            given = {n: getattr(self, n) for n in ("start", "vocabulary")}
            named = [n for n, value in given.items() if value is not None]
            named += [] if self.hidden is Hidden.REPLICATED else ["hidden"]
            checks.require(
                not named, lambda: f"{' and '.join(named)} need a group, whose ranks share the rows"
            )
            return
        checks.require(
            is_group(self.group),
            lambda: (
                "group must be a torch.distributed.ProcessGroup (of a mesh: its get_group()), "
                f"got {checks.shown(self.group)}"
            ),
        )
        found = {n: getattr(self, n) for n in ("weight", "bias", "start", "vocabulary")}
        for name in ("weight", "bias"):
            if is_placed(found[name]):
                rows = rows_of(name, found[name])
                checks.require(
                    rows.group == self.group,
                    lambda name=name: f"{name} is a DTensor on the mesh of another group",
                )
                found |= {name: rows.local, "start": rows.start}
                found["vocabulary"] = found["vocabulary"] or rows.size
        checks.require(
            isinstance(found["weight"], Tensor) and found["weight"].dim() == 2,
            lambda: f"weight must be [V_r, H], got {checks.shown(found['weight'])}",
        )
        count = found["weight"].shape[0]
        if found["start"] is None:
            found["start"] = rank_in(self.group) * count
            found["vocabulary"] = found["vocabulary"] or ranks_of(self.group) * count
        checks.require(
            found["vocabulary"] is not None,
            lambda: f"start is {found['start']}, and vocabulary must be given beside it",
        )
        for name in ("start", "vocabulary"):
            checks.is_integer(name, found[name])
            checks.at_least(name, found[name], 0)
        # Rows of padding must not enter the softmax.
        left = max(0, found["vocabulary"] - found["start"])
        if left < count:
            found |= {n: None if found[n] is None else found[n][:left] for n in ("weight", "bias")}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def spread(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Spread | None]:
        """This rank's hidden states, and how they and the vocabulary lie; None without a group.

        Raises:
            ValueError: hidden states that fit labels neither as they lie nor otherwise.
        """
        if self.group is None:
            return hidden, None
        how, dim = self.hidden, 0
        if is_placed(hidden):
            checks.require(
                how is not Hidden.OWN_TOKENS,
                lambda: "hidden is a DTensor: with Hidden.OWN_TOKENS give this rank's own tensor",
            )
            hidden, cut = states_of(hidden, self.group)
            how = Hidden.REPLICATED if cut is None else Hidden.SEQUENCE_SHARDED
            dim = cut or 0
        leading = tuple(hidden.shape[:-1])
        if how is Hidden.SEQUENCE_SHARDED:
            whole = list(leading)
            whole[dim : dim + 1] = [n * ranks_of(self.group) for n in leading[dim : dim + 1]]
            checks.require(
                list(labels.shape) == whole,
                lambda: (
                    f"labels are those of all tokens, {whole} for hidden {list(hidden.shape)} cut "
                    f"over {ranks_of(self.group)} ranks, got labels {list(labels.shape)}"
                ),
            )
        return hidden, Spread(self.group, self.start, self.vocabulary, how, leading, dim)

    def is_here(self, name: str) -> None:
        """ValueError, naming what was called, for a vocabulary that is spread over ranks."""
        checks.require(
            self.group is None,
            lambda: (
                f"{name} needs the whole vocabulary on one rank, and this head's is spread over "
                f"{ranks_of(self.group)}: linear_logprobs, linear_top_logprobs, "
                "linear_kept_logprobs and linear_policy_loss take it"
            ),
        )

    def joined(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """States and a head without adapters that have the same logits; a copy of the weight."""
        if not self.adapters:
            return hidden, self
        states, weight, *_ = joined(hidden, self.weight, self.adapters)
        return states, replace(self, weight=weight, adapters=())

    def of_rows(self, entries: slice) -> LMHead:
        """The same of some entries of the vocabulary."""
        bias = None if self.bias is None else self.bias[entries]
        adapters = tuple(adapter.of_rows(entries) for adapter in self.adapters)
        return replace(self, weight=self.weight[entries], bias=bias, adapters=adapters)

    def detached(self) -> LMHead:
        """The same without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        adapters = tuple(adapter.detached() for adapter in self.adapters)
        return replace(self, weight=self.weight.detach(), bias=bias, adapters=adapters)

    @property
    def requires_grad(self) -> bool:
        """Whether weight or bias is trained, or what adapters add to the weight."""
        trained = (self.weight, *(adapter.up for adapter in self.adapters))
        return any(t.requires_grad for t in (*trained, self.bias) if t is not None)

    @property
    def transform(self) -> tuple[float, float, int]:
        """scale, softcap and rounding, as ops.Head has them."""
        rounding = 0 if self.logits_dtype == torch.float32 else ROUNDED.index(self.logits_dtype)
        return float(self.scale), float(self.softcap or 0.0), rounding

    @classmethod
    def of(cls, head: LMHead | Tensor | torch.nn.Linear) -> LMHead:
        """head itself, a head of that weight alone, or of that layer's weight, bias and adapters.

        Raises:
            ValueError: a layer that is no plain torch.nn.Linear, with or without PEFT's LoRA, or
                that has forward hooks other than FSDP's or a forward of its own: its output need
                not be hidden @ weight.T + bias; one whose weight FSDP has not gathered.
        """
        if isinstance(head, LMHead):
            # It may have been formed in another step.
            parts.is_whole("weight", head.weight)
            return head
        if isinstance(head, Tensor):
            return cls(head)
        given, head = head, sharded.linear_of(head)
        checks.require(
            sharded.is_linear(head) or is_adapted(head),
            lambda: (
                "head must be an LMHead, a weight [V, H] or a torch.nn.Linear, "
                f"got {parts.name_of(given)}{parts.or_else(head)}"
            ),
        )
        checks.require(
            not sharded.has_hooks(given),
            lambda: (
                "head is a torch.nn.Linear with forward hooks or a forward of its own, so that its "
                "weight need not tell what it does: give LMHead(weight, bias) if it does"
            ),
        )
        return cls(head.weight, bias_of(head), adapters=adapters_of(head))

    @classmethod
    def from_model(
        cls, model: Any, *, ask: bool = True, logits_dtype: torch.dtype | None = None
    ) -> LMHead:
        """The head of a transformers causal language model: weight, bias, scale and softcap.

        The hidden states it fits are those that the model's own output embeddings receive:
        `integrations.transformers.backbone(model)(...).last_hidden_state`, for nearly every model
        `model.base_model(...).last_hidden_state`. Of a PeftModel it is the head of the model
        inside, whose adapters stay in place. LoRA on the head itself is a part of it, as it is when
        the head is formed: active, merged or disabled, and with dropout in training mode alone.
        modules_to_save is the copy that is active.

        The model is asked: the first call runs it three times on ten tokens, without gradient and
        without a trace, and compares its own logits with this head's. The answer is remembered as
        long as the output embeddings, the hooks on them and the numbers in the config stay the
        same. A scale, a softcap, a vocabulary that is cut or tokens that are ruled out are found
        whatever their names; whatever else is done to logits is an error.

        Args:
            model: as above; in any mode, on any device.
            ask: False takes scale and softcap from the config by their usual names, and believes
                them.
            logits_dtype: as for LMHead. What is asked is compared without it.

        Raises:
            ValueError: the model's logits are not those of any such head, by how much, in nats; an
                encoder-decoder, prompt learning, a wrapper such as DistributedDataParallel; output
                embeddings that are not a plain linear layer with a plain weight (an adapter of
                another kind on them, quantised, offloaded), or whose weight an engine keeps in
                shards: model_policy_loss has the engine gather it.
        """
        layer = parts.output_layer(parts.unwrap(model))
        recipe = asked.answer(model, ask=ask).recipe
        return cls.of_layer(recipe, layer, logits_dtype)

    @classmethod
    def of_layer(
        cls, recipe: Recipe, layer: nn.Module, logits_dtype: torch.dtype | None = None
    ) -> LMHead:
        """The head of an output layer; of a tensor-parallel one this rank's part."""
        checks.require(
            logits_dtype in (None, torch.float32) or abs(math.frexp(recipe.before)[0]) == 0.5,
            lambda: (
                f"logits_dtype is {logits_dtype}, and the model multiplies its hidden states by "
                f"{recipe.before} before its head, which rounds what comes after: give it those "
                "states, with LMHead(weight, bias, logits_dtype=...) of the parts"
            ),
        )
        layer = sharded.linear_of(layer)
        adapters, bias = adapters_of(layer), bias_of(layer)
        if not is_placed(layer.weight):
            if recipe.tokens is not None:
                adapters = tuple(a.of_rows(slice(recipe.tokens)) for a in adapters)
            options = {"adapters": adapters, "logits_dtype": logits_dtype}
            return cls(*recipe.parts(layer.weight, bias), **options)
        rows = rows_of("weight", layer.weight)
        bias = None if layer.bias is None else rows_of("bias", layer.bias).local
        local, bias, scale, softcap = recipe.of_rows(rows.local, bias, rows.start)
        options = {"group": rows.group, "start": rows.start, "vocabulary": rows.size}
        options |= {"logits_dtype": logits_dtype, "adapters": adapters}
        if recipe.tokens is not None:
            options["vocabulary"] = recipe.tokens
        return cls(local, bias, scale, softcap, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] at temperature 1, in float32 (float64 for float64 inputs).

        They are materialised: for tests, and for the few tokens one wants to look at. Under
        torch.autocast they are those of float32 operands.

        Raises:
            ValueError: a head whose vocabulary is spread over ranks.
        """
        self.is_here("logits")
        hidden, head = self.joined(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        ones = torch.ones(flat.shape[0], dtype=torch.float64, device=flat.device)
        z = in_full(reference.logits)(flat, head.weight, head.bias, ones, *head.transform)
        return z.reshape(*hidden.shape[:-1], self.weight.shape[0])
