"""Log-probs from transformers models, against log_softmax of the logits that the models give."""

import copy
import inspect
import textwrap

import pytest
import torch
from test_head import MODELS as HEADS
from test_head import TINY
from torch import Tensor

from fused_rl import TokenStats
from fused_rl.integrations import transformers as integration
from fused_rl.integrations.transformers import logprobs, patch_model, patched, unpatch_model

MODELS = {
    **{name: HEADS[name] for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2")},
    **{name: HEADS[name] for name in ("gemma3_text", "cohere", "granite", "olmo2", "gpt2")},
    "phi3": {},
    "deepseek_v3": {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    },
}
# One of every kind of head: plain, tied, softcap, scale, absolute positions.
KINDS = ("llama", "qwen2", "gemma2", "cohere", "gpt2")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Everything here is small: more of them would only wait for each other."""
    torch.set_num_threads(1)


def build(name: str, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY, **MODELS[name], **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            # Large enough for the softcap to bend the logits.
            parameter.copy_(torch.randn_like(parameter))
    return model


def tokens(B: int = 3, T: int = 9) -> Tensor:
    return torch.randint(3, 67, (B, T))


def naive(model, ids: Tensor, temperature: float | Tensor = 1.0, **inputs) -> TokenStats:
    """[B, T - 1], from logits, in float64."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1].double()
    logp = torch.log_softmax(logits / temperature, -1)
    chosen = logp.gather(-1, ids[:, 1:, None])[..., 0]
    return TokenStats(chosen, -(logp.exp() * logp).sum(-1))


def assert_close(stats: TokenStats, expected: TokenStats, tolerance: float = 2e-5) -> None:
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


def gradients(model, stats: TokenStats, weights: Tensor) -> dict[str, Tensor]:
    """Of every parameter, of a loss that both statistics are in."""
    model.zero_grad()
    (weights * stats.logprobs + 0.3 * weights.square() * stats.entropy).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    """No parameter is left out: one whose gradient is missing has one of zeros."""
    for name in ours.keys() | theirs.keys():
        pair = [found.get(name, torch.zeros(())) for found in (ours, theirs)]
        pair = torch.broadcast_tensors(*pair)
        torch.testing.assert_close(*pair, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_statistics_are_those_of_the_logits(name):
    model, ids = build(name), tokens()
    assert_close(logprobs(model, ids), naive(model, ids))
    assert_close(logprobs(model, ids, temperature=0.7), naive(model, ids, 0.7))
    with patched(model):
        assert_close(model(input_ids=ids, return_logprobs=True), naive(model, ids))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_all_parameters_in_float64(name):
    model, ids = build(name).double(), tokens()
    weights = torch.randn(3, 8, dtype=torch.float64)
    ours = gradients(model, logprobs(model, ids, temperature=0.8), weights)
    theirs = gradients(model, naive(model, ids, 0.8), weights)
    assert set(ours) == set(dict(model.named_parameters()))
    assert_same(ours, theirs, atol=1e-10, rtol=1e-8)


def test_the_state_of_a_token_predicts_the_next_one():
    """By hand: the last state is of no consequence, the first token has no log-prob."""
    model, ids = build("llama"), tokens(1, 4)
    logp = model(input_ids=ids).logits.log_softmax(-1)
    stats = logprobs(model, ids)
    assert stats.logprobs.shape == stats.entropy.shape == (1, 3)
    for t in range(3):
        assert stats.logprobs[0, t].item() == pytest.approx(logp[0, t, ids[0, t + 1]].item(), 1e-4)
    with_other_end = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 67], dim=1)
    assert torch.equal(logprobs(model, with_other_end).logprobs[:, :-1], stats.logprobs[:, :-1])
    assert logprobs(model, ids[:, :1]).logprobs.shape == (1, 0)


def test_labels_are_shifted_here_and_minus_100_is_ignored():
    model, ids = build("llama"), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    stats, every = logprobs(model, ids, labels), logprobs(model, ids)
    assert not stats.logprobs[:, :3].any() and not stats.entropy[:, :3].any()
    assert torch.equal(stats.logprobs[:, 3:], every.logprobs[:, 3:])
    other = torch.full_like(ids, 5)
    logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1, 5]
    torch.testing.assert_close(logprobs(model, ids, other).logprobs, logp, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_padded_batch_is_its_sequences(name, side):
    """Each as if it were alone; padding, and what would be predicted from it, is 0."""
    model, ids = build(name), tokens()
    lengths, mask = (9, 4, 6), torch.zeros(3, 9, dtype=torch.int64)
    spans = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    for i, span in enumerate(spans):
        mask[i, span] = 1
    stats = logprobs(model, ids.where(mask != 0, 0), attention_mask=mask)
    for i, span in enumerate(spans):
        row, first = ids[i : i + 1, span], span.start
        alone, last = logprobs(model, row), first + row.shape[1] - 1
        assert_close(TokenStats(*(t[i : i + 1, first:last] for t in stats)), alone)
        assert not stats.logprobs[i, :first].any() and not stats.logprobs[i, last:].any()


def test_padding_has_no_gradient():
    model, ids = build("llama"), tokens()
    mask = (torch.arange(9) >= torch.tensor([0, 5, 3])[:, None]).long()
    embedding = model.get_input_embeddings().weight
    stats = logprobs(model, ids.where(mask != 0, 0), attention_mask=mask)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert not embedding.grad[0].any() and embedding.grad.any()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_completion_mask_chooses_tokens(kind):
    """Of K columns it is of the last K tokens, and so is the result."""
    model, ids = build("qwen2"), tokens()
    every = logprobs(model, ids)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    stats = logprobs(model, ids, completion_mask=mask.to(kind))
    for ours, full in zip(stats, every, strict=True):
        assert ours.shape == (3, 4)
        torch.testing.assert_close(ours, full[:, -4:] * mask)
    wide = torch.cat([torch.zeros(3, 5, dtype=torch.int64), mask], dim=1)
    for ours, full in zip(logprobs(model, ids, completion_mask=wide), every, strict=True):
        torch.testing.assert_close(ours, full * wide[:, 1:])


def test_tokens_outside_the_completion_cost_nothing_in_the_head(monkeypatch):
    """Their states may be NaN: the head never reads them."""
    model, ids = build("llama"), tokens()
    expected = logprobs(model, ids).logprobs[:, -2:]

    def poison(module, args, output):
        output.last_hidden_state[:, :-3] = torch.nan

    hook = model.base_model.register_forward_hook(poison)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, -2:] = True
    with torch.no_grad():
        stats = logprobs(model, ids, completion_mask=mask)
    hook.remove()
    torch.testing.assert_close(stats.logprobs[:, -2:], expected)
    assert not stats.logprobs[:, :-2].any()


def test_gradients_of_a_completion_alone():
    model, ids = build("gemma2").double(), tokens()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    weights = torch.randn(3, 4, dtype=torch.float64)
    ours = gradients(model, logprobs(model, ids, completion_mask=mask), weights)
    expected = TokenStats(*(t[:, -4:] * mask for t in naive(model, ids)))
    assert_same(ours, gradients(model, expected, weights), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 1), (3, 8), (8,), ()])
@torch.no_grad()
def test_temperatures_that_differ(shape):
    model, ids = build("granite"), tokens()
    temperature = torch.rand(shape) + 0.5
    expected = naive(model, ids, temperature.expand(3, 8)[..., None].double())
    assert_close(logprobs(model, ids, temperature=temperature), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name):
    model, ids, weights = build(name), tokens(), torch.randn(3, 8)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model, logprobs(model, ids), weights)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same(gradients(model, logprobs(model, ids), weights), plain)


def test_autocast_runs_and_is_near():
    model, ids = build("qwen2"), tokens()
    exact = naive(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        stats = logprobs(model, ids)
    assert stats.logprobs.dtype == torch.float32
    assert (stats.logprobs - exact.logprobs).abs().max() < 0.1 * exact.logprobs.abs().max()
    stats.logprobs.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


def test_a_frozen_head_gets_no_gradient():
    model, ids = build("llama"), tokens()
    weights = torch.randn(3, 8)
    whole = gradients(model, logprobs(model, ids), weights)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = None
    ours = gradients(model, logprobs(model, ids), weights)
    assert "lm_head.weight" not in ours
    del whole["lm_head.weight"]
    assert_same(ours, whole, atol=1e-4, rtol=1e-4)


# Patching.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_patched_model_does_what_it_did(name):
    model, ids = build(name), tokens()
    signature = inspect.signature(model.forward)
    before = model(ids, labels=ids, use_cache=False)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    with patched(model) as same:
        assert same is model
        assert inspect.signature(model.forward) == signature
        after = model(ids, labels=ids, use_cache=False)
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


def test_unpatching_restores_the_exact_objects():
    model = build("llama")
    contents, forward = dict(vars(model)), type(model).forward
    patch_model(patch_model(model))
    assert type(model).forward is forward
    with patched(model):
        pass
    assert model(input_ids=tokens(), return_logprobs=True).logprobs.shape == (3, 8)
    unpatch_model(model)
    assert vars(model).keys() == contents.keys()
    assert all(vars(model)[name] is thing for name, thing in contents.items())
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched"):
        unpatch_model(model)


def test_a_forward_that_someone_else_put_there_is_kept():
    """As accelerate does."""
    model, calls = build("llama"), []
    inner = model.forward

    def outer(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.forward = outer
    # The model is asked through it, once.
    logprobs(model, tokens())
    calls.clear()
    with patched(model):
        model(input_ids=tokens())
        model(input_ids=tokens(), return_logprobs=True)
    assert len(calls) == 1 and model.forward is outer


def test_a_forward_that_was_replaced_since_is_not_unpatched():
    model = patch_model(build("llama"))
    model.forward = other = lambda: None
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_model(model)
    assert model.forward is other


def test_a_patched_model_inside_distributed_data_parallel():
    """Its gradients come through the wrapper's forward, which is what synchronises them."""
    from torch.nn.parallel import DistributedDataParallel

    model, ids, weights = build("qwen2"), tokens(), torch.randn(3, 8)
    expected = gradients(model, logprobs(model, ids), weights)
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        wrapped = DistributedDataParallel(patch_model(model))
        stats = wrapped(input_ids=ids, return_logprobs=True)
        assert type(stats) is TokenStats
        assert_same(gradients(model, stats, weights), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_inside_unpatches():
    model = build("llama")
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert "forward" not in vars(model)


def test_a_deep_copy_is_patched_by_itself():
    """A reference model is made so: its log-probs must be its own."""
    model, ids = patch_model(build("llama")), tokens()
    reference = copy.deepcopy(model)
    expected = logprobs(model, ids).logprobs
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(reference(input_ids=ids, return_logprobs=True).logprobs, expected)
    assert not torch.equal(model(input_ids=ids, return_logprobs=True).logprobs, expected)
    torch.testing.assert_close(reference(ids).logits, unpatch_model(reference)(ids).logits)


def test_a_positional_attention_mask_is_not_taken_for_labels():
    model, ids = build("llama"), tokens()
    with patched(model), pytest.raises(TypeError, match="positional argument"):
        model(ids, torch.ones_like(ids), return_logprobs=True)


IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, T\], got \[5\]"),
        ({"input_ids": IDS.float()}, r"labels must be an int64 or int32 tensor, got torch.float32"),
        ({"labels": IDS[:, 1:]}, r"labels must have the shape of input_ids, got labels \[2, 4\]"),
        (
            {"attention_mask": IDS[:1]},
            r"attention_mask must have the shape of input_ids, .*\[1, 5\]",
        ),
        ({"completion_mask": IDS[0]}, r"completion_mask must be \[2, K\] .* got \[5\]"),
        ({"completion_mask": torch.ones(2, 6)}, r"with 0 < K <= 5, got \[2, 6\]"),
        ({"logits_to_keep": 3}, r"logits_to_keep is of logits: give a completion_mask \[B, K\]"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0.0"),
        ({"labels": IDS + 90}, r"label"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        logprobs(build("llama"), **{"input_ids": IDS, **arguments})


def test_the_usage_in_the_docstring_runs():
    lines = inspect.getdoc(integration).split("\n\n", 1)[1].split("\nHidden states")[0]
    model, ids = build("qwen2"), tokens()
    names = {
        "model": model,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.ones(3, 4, dtype=torch.bool),
    }
    exec(textwrap.dedent(lines), names)
    assert torch.equal(names["same"].logprobs, names["stats"].logprobs)
    assert names["tokens"].shape == (3, 13)
    assert "forward" not in vars(model)
