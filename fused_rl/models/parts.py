"""The parts of a transformers causal language model, and what its config says of its logits.

    hidden = backbone(model)(input_ids).last_hidden_state
    logits = described(model).logits(output_layer(model)(hidden))

The second line is what names say; `asked` finds out whether it is true.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_rl.checks import require
from fused_rl.models import adapters, quantised, sharded
from fused_rl.models.placed import is_placed
from fused_rl.models.recipes import Recipe


def name_of(thing: object) -> str:
    """The class of thing, with its module: torch.nn.modules.linear.Linear."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def unwrap(model: Any) -> Any:
    """The transformers model inside torch.compile's wrapper or a PeftModel.

    Raises:
        ValueError: a wrapper whose forward does something that would be left out, prompt learning,
            an encoder-decoder, or a module that is no language model.
    """
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return unwrap(model._orig_mod)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        require(
            not _learns_prompts(model),
            lambda: (
                f"{name_of(model)} puts virtual tokens before the input (prompt learning), which "
                "the hidden states of its base model lack: use its own logits with "
                "logprobs_from_logits"
            ),
        )
        return unwrap(model.get_base_model())
    inner = getattr(model, "module", None)
    require(
        not isinstance(inner, nn.Module),
        lambda: (
            f"{name_of(model)} wraps a {type(inner).__name__}, and what it does around the forward "
            "(gradients between ranks, gathering of weights) would be left out: give the wrapper "
            "to fused_rl.model_policy_loss; or patch_model the model before it is wrapped and call "
            "the wrapper with return_logprobs=True; or, where no gradient is wanted, pass its "
            ".module"
        ),
    )
    require(
        hasattr(model, "get_output_embeddings") and hasattr(model, "config"),
        lambda: (
            f"a causal language model of transformers is needed, got {name_of(model)}, which has "
            "no get_output_embeddings() and config: pass the model inside it, or make an "
            "LMHead(weight, bias, scale, softcap) of its parts"
        ),
    )
    require(
        not getattr(model.config, "is_encoder_decoder", False),
        lambda: (
            f"{type(model).__name__} is an encoder-decoder, which shifts the tokens of its decoder "
            "itself: use its own logits with logprobs_from_logits, or an LMHead of its parts"
        ),
    )
    return model


def _learns_prompts(peft: Any) -> bool:
    active = peft.active_adapter
    active = [active] if isinstance(active, str) else active
    return any(getattr(peft.peft_config[name], "is_prompt_learning", False) for name in active)


def output_layer(model: Any) -> nn.Linear:
    """The linear layer that gives the logits, with or without adapters, if its weight is here: all
    of it, or this rank's rows by a tensor-parallel plan.

    Raises:
        ValueError: as output_linear; a weight that is sharded over ranks or quantised.
    """
    layer = output_linear(model)
    if sharded.is_tensor_parallel(model, layer):
        return layer
    name = f"the output embeddings' weight of {type(model).__name__}"
    is_plain(name, layer.weight)
    is_whole(name, layer.weight)
    require(
        layer.weight.dim() == 2 and layer.weight.numel() > 0,
        lambda: (
            f"{name} is {list(layer.weight.shape)} here, a shard (FSDP, ZeRO-3): call "
            "fused_rl.model_policy_loss, or the model itself, patched by patch_model, in whose "
            "forward it is gathered"
        ),
    )
    return layer


def is_gathered(model: Any, layer: nn.Linear) -> None:
    """ValueError where a weight is still in shards inside the calls that gather weights."""
    weight = layer.weight
    require(
        not is_placed(weight) or sharded.is_tensor_parallel(model, layer),
        lambda: (
            f"the weight of {type(model).__name__}'s output embeddings is a DTensor that nothing "
            "gathers: where ranks have tokens of their own and these are to travel, give "
            "linear_policy_loss LMHead(weight, group=mesh.get_group(), hidden=Hidden.OWN_TOKENS)"
        ),
    )


def output_linear(model: Any) -> nn.Linear:
    """The linear layer that gives the logits, its weight perhaps sharded over ranks; where it has
    adapters, PEFT's layer of both.

    Raises:
        ValueError: no such layer; one of another class; a weight that a hook renews before every
            forward; a weight that is offloaded.
    """
    layer = sharded.linear_of(model.get_output_embeddings())
    if not (sharded.is_linear(layer) or adapters.is_adapted(layer)):
        raise ValueError(
            "LMHead.from_model needs a model whose output embeddings are a torch.nn.Linear, got "
            f"{type(layer).__name__} from {type(model).__name__} ({name_of(layer)} from "
            f"{name_of(model)}): {_way_out(layer)}"
        )
    plain = adapters.base_of(layer)
    require(
        "weight" in plain._parameters or not plain._forward_pre_hooks or sharded.is_fsdp2(plain),
        lambda: (
            f"the weight of {type(model).__name__}'s output embeddings is formed anew by a hook "
            "before every forward (weight_norm, prune): its value here may be an old one. Make it "
            "a parameter first (remove_weight_norm, prune.remove)"
        ),
    )
    require(
        not (layer.weight.is_meta and hasattr(plain, "_hf_hook")),
        lambda: (
            f"the weight of {type(model).__name__}'s output embeddings is offloaded (on the meta "
            "device): keep that layer on a device, by device_map"
        ),
    )
    return layer


def _way_out(layer: object) -> str:
    if layer is None:
        return "a model without a language-model head, such as a base model, has no logits"
    if quantised.room_of(layer) == "peft":
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        if quantised.is_quantised(base):
            return f"its base layer is a {name_of(base)}, which is quantised: {quantised.SKIP}"
        return adapters.WAY_OUT
    return or_else(layer).removeprefix(": ") or (
        "its product is not hidden @ weight.T, or not that alone"
    )


def or_else(layer: object) -> str:
    """What to do about a quantised layer, behind a colon; nothing for others."""
    weight = getattr(layer, "weight", None)
    return f": {quantised.way_out(weight)}" if quantised.is_quantised(layer) else ""


def is_plain(name: str, tensor: object) -> None:
    """ValueError for a weight whose elements are codes: their dtype would say less."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return
    require(
        quantised.room_of(tensor) != "bitsandbytes",
        lambda: (
            f"{name} is a {name_of(tensor)} {list(tensor.shape)}, quantised: "
            f"{quantised.way_out(tensor)}"
        ),
    )


_SHARDS = (
    "where every rank has tokens of its own (FSDP), call fused_rl.model_policy_loss, or the model "
    "itself, patched by patch_model, or work between unshard() and reshard() of the module that "
    "holds it, so that gradients are reduced; where all ranks have the same tokens (tensor "
    "parallelism), give LMHead the group, mesh.get_group()"
)


def is_whole(name: str, tensor: Tensor) -> None:
    """ValueError for tensors whose numbers are elsewhere: sharded over ranks, freed, or quantised.

    The mark of the former and the latter is that they are made of other tensors, which torch asks
    them for by name.
    """
    kind = type(tensor)
    # The plain ones first, so that dynamo has no more to trace.
    if kind is Tensor or kind is nn.Parameter or not hasattr(kind, "__tensor_flatten__"):
        require(
            not sharded.is_freed(tensor),
            lambda: (
                f"{name} {list(tensor.shape)} has no memory: it was gathered for a call that is "
                "over, and freed (FSDP). Form the head anew in every step and inside the forward "
                "that gathers it, or call fused_rl.model_policy_loss, which does"
            ),
        )
        return
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, sharded over ranks "
            f"({tensor.placements}): {_SHARDS}"
        )
    raise ValueError(
        f"{name} is a {name_of(tensor)}, not a plain tensor: {quantised.way_out(tensor)}"
    )


def has_its_gradient(name: str, tensor: Tensor) -> None:
    """ValueError for a trained tensor that was made of a DTensor in such a way that its gradient
    would be that of one rank's tokens or rows alone. Who says what the gradient is, is believed.
    """
    made = None if tensor.grad_fn is None else sharded.of_dtensor(tensor)
    if made is None or made.ranks == 1 or made.said is not None:
        return
    require(
        all(placement.is_replicate() for placement in made.placements),
        lambda: (
            f"{name} {list(tensor.shape)} holds the rows of this rank alone (to_local() of a "
            f"DTensor, {made.placements}): {_SHARDS}"
        ),
    )
    raise ValueError(
        f"{name} was gathered by full_tensor(), whose gradient counts as the same on all ranks. "
        "Under FSDP each rank has that of its own tokens, and nothing would average them: call "
        "fused_rl.model_policy_loss, or full_tensor(grad_placements=[Partial('avg')]). If all "
        "ranks have the same tokens, say so: full_tensor(grad_placements=[Replicate()])"
    )


def backbone(model: Any) -> nn.Module:
    """The part of a model whose last_hidden_state its output embeddings receive.

    That is `base_model` for nearly all; some name another.

    Raises:
        ValueError: as unwrap; or no part of the model is one.
    """
    model = unwrap(model)
    if isinstance(model.base_model, nn.Module) and model.base_model is not model:
        return model.base_model
    if hasattr(model, "get_decoder") and model.get_decoder() not in (None, model):
        return model.get_decoder()
    for name in ("model", "transformer", "language_model", "decoder"):
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise ValueError(
        f"{name_of(model)} has no part that gives hidden states: its base_model is itself"
    )


def described(model: Any) -> Recipe:
    """What the config says, by the names that models have for it: a hint, not the proof."""
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return Recipe(
        after=_logit_scale(config), softcap=getattr(config, "final_logit_softcapping", None)
    )


def _logit_scale(config: Any) -> float:
    if config.model_type == "mpt":
        # Its config has a logit_scale that the transformers model never applies.
        return 1.0
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    elif base := getattr(config, "dim_model_base", None):
        # MiniCPM's own code: hidden states are divided by the width relative to the base model's.
        scale *= base / config.hidden_size
    return float(scale)
