"""The parts of a transformers causal language model, and what its config says of its logits.

    hidden = backbone(model)(input_ids).last_hidden_state
    logits = described(model).logits(output_layer(model)(hidden))

The second line is what names say; `asked` finds out whether it is true.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_rl.checks import require
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
            "(gradients between ranks, gathering of weights) would be left out: patch_model the "
            "model before it is wrapped and call the wrapper with return_logprobs=True, or, where "
            "no gradient is wanted, pass its .module"
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


def has_hooks(layer: nn.Module) -> bool:
    """Whether there is more to its call than its class's forward."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def output_layer(model: Any) -> nn.Linear:
    """The linear layer that gives the logits, if its weight is all there is to it.

    Raises:
        ValueError: no such layer; one of another class; a weight that a hook renews before every
            forward; a weight that is offloaded, sharded over ranks or quantised.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ValueError(
            "LMHead.from_model needs a model whose output embeddings are a torch.nn.Linear, got "
            f"{type(layer).__name__} from {type(model).__name__} ({name_of(layer)} from "
            f"{name_of(model)}): {_way_out(layer)}"
        )
    require(
        "weight" in layer._parameters or not layer._forward_pre_hooks,
        lambda: (
            f"the weight of {type(model).__name__}'s output embeddings is formed anew by a hook "
            "before every forward (weight_norm, prune): its value here may be an old one. Make it "
            "a parameter first (remove_weight_norm, prune.remove)"
        ),
    )
    require(
        not (layer.weight.is_meta and hasattr(layer, "_hf_hook")),
        lambda: (
            f"the weight of {type(model).__name__}'s output embeddings is offloaded (on the meta "
            "device): keep that layer on a device, by device_map"
        ),
    )
    if not is_tensor_parallel(model, layer):
        is_whole(f"the output embeddings' weight of {type(model).__name__}", layer.weight)
    return layer


def is_tensor_parallel(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer's weight is cut along the vocabulary over ranks that share their tokens.

    The weight of an FSDP unit looks alike while it is sharded: its ranks have tokens of their own.
    A plan leaves hooks, or a forward, that bring the columns together.
    """
    if not is_placed(layer.weight) or len(layer.weight.placements) != 1 or not has_hooks(layer):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not any(isinstance(module, FSDPModule) for module in model.modules())


def _way_out(layer: object) -> str:
    room = type(layer).__module__.partition(".")[0]
    if layer is None:
        return "a model without a language-model head, such as a base model, has no logits"
    if room == "peft":
        return "merge the adapter, or leave lm_head out of target_modules and modules_to_save"
    if room in {"bitsandbytes", "torchao", "optimum", "hqq", "auto_gptq", "awq", "gptqmodel"}:
        return "leave lm_head out of the quantisation, or dequantise it"
    if room == "torch" and "fsdp" in type(layer).__module__:
        return "leave it in the unit of the whole model, and call that, patched by patch_model"
    return "its product is not hidden @ weight.T, or not that alone"


def is_whole(name: str, tensor: Tensor) -> None:
    """ValueError for tensors whose numbers are elsewhere: sharded over ranks, or quantised.

    Their mark is that they are made of other tensors, which torch asks them for by name.
    """
    kind = type(tensor)
    # The plain ones first, so that dynamo has no more to trace.
    if kind is Tensor or kind is nn.Parameter or not hasattr(kind, "__tensor_flatten__"):
        return
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, sharded over ranks "
            f"({tensor.placements}): under FSDP2 call the model itself, patched by patch_model, or "
            "work between unshard() and reshard() of the module that holds it, so that gradients "
            "are reduced; a tensor-parallel lm_head must be left out of the plan"
        )
    raise ValueError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, not a plain tensor: dequantise it, or "
        "leave it out of the quantisation"
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
