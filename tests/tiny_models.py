"""A language model of every type that transformers knows, made tiny by the names in its config.

Sizes fit together where they must: a width of 32 is 4 heads of 8; 2 of them have keys. What a
config needs beyond its names is in EXTRA.
"""

import copy
import re
from typing import Any

import torch

VOCABULARY, LARGEST = 99, 10_000_000
# The first pattern that is the whole of a name gives its value.
RULES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size", 2),
    (r".*vocab_size.*", VOCABULARY),
    (r"hidden_size_per_layer_input", 4),
    (
        r"hidden_size|(text|out|image_text|encoder|projector|downsample|attention|global)_hidden_size",
        32,
    ),
    (r"hidden_size_.*|d_model|n_embd|embed_dim|embedding_size|dim|adapter_out_dim|emb_dim", 32),
    (r".*intermediate_size|.*ffn_(hidden_)?(size|dim)|d_ff|n_inner|hidden_dim|mlp_dim", 48),
    (r"out(put)?_dim|projection_dim|word_embed_proj_dim|dim_model_base", 32),
    (r"(num_)?(hidden_|encoder_|decoder_)?(hidden_)?layers|n_layers?|depth", 2),
    (r".*num_key_value_heads|multi_query_group_num", 2),
    (r".*attention_heads|num_heads|n_heads?", 4),
    (r"(swa_|global_|attention_|qk_nope_|v_|linear_key_|linear_value_|linear_|kda_)?head_dim", 8),
    (r"d_kv|dim_head|qk_rope_head_dim|rotary_dim|index_head_dim|kv_channels", 8),
    (r"qk_head_dim", 16),
    (r"(kv|q|o)_lora_rank", 8),
    (r"linear_num_.*heads", 2),
    (r"(n_routed_|num_local_|num_|moe_num_)experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|max_source_positions", 128),
    (r"mamba_d_ssm|lru_width", 32),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"mamba_head_dim|mamba_d_head", 8),
    (r"(ssm_)?state_size|mamba_d_state", 8),
    (r"(mamba_)?chunk_size", 8),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"sliding_window(_size)?|window_size", 16),
    (r"query_pre_attn_scalar", 8),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"codebook_size", 64),
    (r"(pad|bos|eos)_token_id", None),
)
# Rotary positions of three axes: sections of the 4 rotations of a head of 8.
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_VL = {"text_config": {"rope_parameters": _AXES}}
_THINKER = {**_VL, "vision_start_token_id": 70}
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga"), _VL),
    "paddleocr_vl": _VL,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_AXES, "partial_rotary_factor": 1.0}}},
    "qwen2_5_omni_thinker": _THINKER,
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {
        "vocabulary_map": {"<image>": 98, "IMGIMGBAZ": 90, "IMGIMGBBZ": 91, "IMGIMGBCZ": 92},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "resolution": 32},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "mistral4": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 3.0},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xlstm": {"num_heads": 4, "chunk_size": 64, "output_logit_soft_cap": 3.0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1},
    },
    "qwen3_omni_moe": {"thinker_config": {"vision_start_token_id": 70}},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "llama4": {"pad_token_id": 0},
    "emu3": {"pad_token_id": 0},
    "reformer": {
        **{"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
        **{"attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    },
}


def types() -> list[str]:
    """Every type of causal, image-text-to-text and multimodal language models."""
    return sorted(set().union(*_mappings()))


def _mappings() -> list[dict[str, str]]:
    from transformers.models.auto import modeling_auto

    kinds = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    return [getattr(modeling_auto, f"MODEL_FOR_{k}_MAPPING_NAMES", {}) for k in kinds]


def build(kind: str) -> torch.nn.Module:
    """A model in evaluation, its head drawn from N(0, 1), on which a softcap shows.

    Raises:
        ValueError: a model of more than LARGEST parameters.
        Exception: whatever transformers raises at such a config.
    """
    import transformers

    name = next(m[kind] for m in _mappings() if kind in m)
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in head.parameters() if head is not None else ():
            parameter.copy_(torch.randn_like(parameter))
    return model


def tiny_config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[kind]().to_dict()
    return CONFIG_MAPPING[kind](**merged(shrunk(default, iter(range(80, 99))), EXTRA.get(kind, {})))


def merged(options: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            value = merged(options[name], value)
        options[name] = value
    return options


def shrunk(config: dict[str, Any], ids: Any) -> dict[str, Any]:
    """The options that make a config tiny; every special token but the first three gets an id."""
    found: dict[str, Any] = {}
    layers = next(
        (config[n] for n in ("num_hidden_layers", "num_layers", "n_layer") if n in config), 0
    )
    for name, value in config.items():
        if name == "rope_parameters" and isinstance(value, dict):
            found[name] = _rope(value)
        elif isinstance(value, dict) and "model_type" in value:
            found[name] = {**shrunk(value, ids), "model_type": value["model_type"]}
        elif (
            isinstance(value, list) and len(value) == layers and value and isinstance(value[0], str)
        ):
            # One layer of each kind, and two at least.
            kinds = list(dict.fromkeys(value))
            found[name] = kinds if len(kinds) > 1 else kinds * 2
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            found[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif re.fullmatch(r".*_token_(id|index)", name) and type(value) is int:
            found[name] = next(ids)
        elif type(value) in (int, float):
            for pattern, small in RULES:
                if re.fullmatch(pattern, name):
                    found[name] = small
                    break
    lists = [v for v in found.values() if isinstance(v, list)]
    if lists and "num_hidden_layers" in found:
        found["num_hidden_layers"] = longest = max(len(v) for v in lists)
        for value in lists:
            value.extend(value[-1:] * (longest - len(value)))
    if "kv_lora_rank" in config and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections of a head of 8, whose rotations are 4."""
    if "mrope_section" in parameters:
        return {**parameters, "mrope_section": [2, 1, 1]}
    return {k: _rope(v) if isinstance(v, dict) else v for k, v in parameters.items()}


def word_tokenizer(size: int):
    """One token per word, `size` of them; made here, since nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(size - 3))]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, padding_side="left", **special)


def qwen2(vocab_size: int, seed: int | None = None, **options: Any) -> torch.nn.Module:
    """A Qwen2 of one layer, 16 wide, with random weights; options are Qwen2Config's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if seed is not None:
        torch.manual_seed(seed)
    config = {"vocab_size": vocab_size, **narrow, **heads, **options}
    return Qwen2ForCausalLM(Qwen2Config(**config))
