"""LMHead: what it refuses, and that heads read from transformers models give the models' logits."""

import math

import pytest
import torch

from fused_rl import LMHead, linear_logprobs

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.125},
    "minicpm3": {
        "dim_model_base": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    },
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2},
    "olmo2": {},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "logit_scale": 0.5},
}


def build(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            # Large enough for the softcap to bend the logits.
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_logprobs_agree_with_the_model(name):
    model = build(name)
    ids = torch.randint(3, 67, (2, 9))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    theirs = model(input_ids=ids, use_cache=False).logits.double()
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(hidden).double(), theirs, atol=2e-5, rtol=2e-5)
    stats = linear_logprobs(hidden[:, :-1], head, ids[:, 1:])
    logp = theirs[:, :-1].log_softmax(-1)
    expected = logp.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(stats.logprobs.double(), expected, atol=2e-5, rtol=2e-5)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=2e-5, rtol=2e-5)


def test_what_is_read_from_models():
    assert LMHead.from_model(build("gemma2")).softcap == 3.0
    assert LMHead.from_model(build("cohere")).scale == 0.0625
    assert LMHead.from_model(build("granite")).scale == 0.125
    assert LMHead.from_model(build("minicpm3")).scale == 0.25
    assert LMHead.from_model(build("phi")).bias is not None
    tied = build("qwen2")
    assert LMHead.from_model(tied).weight is tied.get_input_embeddings().weight


def test_tied_weights_get_the_gradients_of_both_uses():
    model = build("qwen2").double()
    ids = torch.randint(3, 67, (2, 9))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    stats = linear_logprobs(hidden[:, :-1], LMHead.from_model(model), ids[:, 1:])
    stats.logprobs.sum().backward()
    ours = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    logp.gather(-1, ids[:, 1:, None]).sum().backward()
    torch.testing.assert_close(ours, model.get_input_embeddings().weight.grad)


def test_a_head_that_is_not_a_plain_linear_layer_is_refused():
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"torch.nn.Linear, got Sequential from LlamaForCausalLM"):
        LMHead.from_model(model)


WEIGHT = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5),), r"weight must be \[V, H\] with elements, got \[5\]"),
        ((torch.zeros(0),), r"got \[0\]; a sharded parameter must be gathered first"),
        ((torch.zeros(0, 3),), r"weight must be \[V, H\] with elements, got \[0, 3\]"),
        ((WEIGHT.long(),), r"weight must be float16, .* got torch.int64"),
        (([1.0],), r"weight must be a torch.Tensor, got list"),
        ((WEIGHT, torch.zeros(3)), r"bias must be \[V\] = \[5\], got \[3\]"),
        ((WEIGHT, None, math.inf), r"scale must be finite, got inf"),
        ((WEIGHT, None, 1.0, 0.0), r"softcap must be positive or None, got 0.0"),
        ((WEIGHT, None, 1.0, -3.0), r"softcap must be positive or None, got -3.0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LMHead(*arguments)


def test_logits_of_no_tokens():
    assert LMHead(torch.randn(7, 4)).logits(torch.randn(2, 0, 4)).shape == (2, 0, 7)


def test_logits_are_float32_under_autocast():
    hidden, head = torch.randn(3, 40), LMHead(torch.randn(7, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head.logits(hidden)
    assert torch.equal(z, head.logits(hidden)) and z.dtype == torch.float32
