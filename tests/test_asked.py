"""What LMHead.from_model finds out by asking: right, or a ValueError; and nothing is disturbed."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from test_head import build
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fused_rl import LMHead
from fused_rl.models import asked, parts

V, H = 67, 32


class Odd(LlamaForCausalLM):
    """A Llama whose `between` and `after` do more than its output layer."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(H, bias=False)
        self.extra = nn.Linear(H, H)
        self.learned = nn.Parameter(torch.ones(()))
        self.register_buffer("final_bias", torch.zeros(V))

    def between(self, hidden):
        return hidden

    def after(self, logits):
        return logits

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.after(self.lm_head(self.between(hidden))))


def odd(between=None, after=None, large=True, bias=False):
    """A fresh model of that kind; `large` draws the weight so that a softcap bends the logits."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=1)
    model = Odd(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    if bias:
        model.lm_head = nn.Linear(H, V)
    with torch.no_grad():
        for parameter in model.lm_head.parameters() if large else ():
            parameter.copy_(torch.randn_like(parameter))
    for name, function in (("between", between), ("after", after)):
        if function is not None:
            setattr(model, name, lambda x, function=function: function(model, x))
    return model


@torch.no_grad()
def assert_head_is_the_models(model, tolerance=2e-5):
    ids = torch.randint(3, V, (2, 9))
    hidden = parts.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    theirs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    ours = LMHead.from_model(model).logits(hidden).double().log_softmax(-1)
    possible = theirs > -1e8
    assert torch.equal(possible, ours > -1e8)
    gap = (ours - theirs).abs()[possible].max().item()
    assert gap <= tolerance


def rule_out(logits, ids):
    logits[..., ids] = torch.finfo(logits.dtype).min
    return logits


FOUND = {
    "a softcap of another name": dict(after=lambda m, z: 3.0 * torch.tanh(z / 3.0)),
    "a scale before the cap and one behind it": dict(
        after=lambda m, z: 0.5 * 4.0 * torch.tanh(0.7 * z / 4.0)
    ),
    "a muP divisor of the logits": dict(after=lambda m, z: z / 5.3),
    "a muP divisor of the hidden states, and a bias": dict(between=lambda m, h: h / 3, bias=True),
    "both": dict(between=lambda m, h: h * 0.7, after=lambda m, z: z / 3, bias=True),
    "a vocabulary cut after the head": dict(after=lambda m, z: z[..., :61]),
    "tokens ruled out": dict(after=lambda m, z: rule_out(z, [5, 60])),
    "tokens ruled out, with a bias, cut and scaled": dict(
        after=lambda m, z: rule_out(0.25 * z, [5, 60])[..., :63], bias=True
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_whatever_its_name(kind):
    assert_head_is_the_models(odd(**FOUND[kind]))
    assert_head_is_the_models(odd(**FOUND[kind]).double(), 1e-6)


def test_a_softcap_that_fresh_logits_are_too_small_to_show():
    model = odd(after=lambda m, z: 30 * torch.tanh(z / 30), large=False)
    assert LMHead.from_model(model).softcap == pytest.approx(30, rel=1e-6)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    assert_head_is_the_models(model)


def test_names_in_a_config_that_the_model_does_not_apply():
    for name, value in (("final_logit_softcapping", 3.0), ("logit_scale", 0.1)):
        model = build("llama")
        setattr(model.config, name, value)
        head = LMHead.from_model(model)
        assert (head.scale, head.softcap) == (1.0, None)
        believed = LMHead.from_model(model, ask=False)
        assert value in (believed.scale, believed.softcap)


def test_gradients_reach_the_rows_that_are_kept_and_the_bias():
    model = odd(**FOUND["tokens ruled out, with a bias, cut and scaled"]).double()
    hidden = torch.randn(4, H, dtype=torch.float64)
    labels = torch.tensor([1, 7, 30, 62])
    head = LMHead.from_model(model)
    head.logits(hidden).log_softmax(-1)[range(4), labels].sum().backward()
    ours = [p.grad.clone() for p in model.lm_head.parameters()]
    model.zero_grad()
    logits = model.after(model.lm_head(hidden))
    logits.log_softmax(-1)[range(4), labels].sum().backward()
    for mine, parameter in zip(ours, model.lm_head.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
        assert not mine[5].any() and not mine[63:].any()


REFUSED = {
    "a dense layer": (dict(between=lambda m, h: m.extra(h)), r"reads extra.bias, extra.weight"),
    "a norm that changes nothing yet": (dict(between=lambda m, h: m.norm(h)), r"reads norm.weight"),
    "a learned scale of 1": (dict(after=lambda m, z: z * m.learned), r"reads learned"),
    "a bias outside, of zeros": (dict(after=lambda m, z: z + m.final_bias), r"reads final_bias"),
    "another curve": (
        dict(after=lambda m, z: torch.sinh(z / 9)),
        r"differ by up to [0-9.e+]+ nats",
    ),
    "a curve that shows on large logits": (
        dict(after=lambda m, z: z.clamp(max=100.0)),
        r"and more where the product of its output embeddings is large",
    ),
    "something per token": (
        dict(after=lambda m, z: z * torch.arange(1, 1 + z.shape[1])[:, None]),
        r"not those of its output embeddings",
    ),
    "a cap, then tokens ruled out": (
        dict(after=lambda m, z: rule_out(3 * torch.tanh(z / 3), [4])),
        r"not those of its output embeddings",
    ),
    "a softmax": (dict(after=lambda m, z: z.softmax(-1)), r"not those of its output embeddings"),
    "a reversal": (dict(after=lambda m, z: z.flip(-1)), r"test_asked.Odd"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_head_cannot_be_is_refused(kind):
    arguments, message = REFUSED[kind]
    model = odd(**arguments)
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(model)
    assert LMHead.from_model(model, ask=False).weight is model.lm_head.weight


def test_the_largest_difference_is_named():
    model = odd(after=lambda m, z: z + 2 * torch.arange(V).eq(7))
    gap = 0.0
    with torch.no_grad():
        for ids in asked._tokens(model, model.lm_head):
            y = model.lm_head(model.model(ids[None]).last_hidden_state).log_softmax(-1)
            gap = max(gap, (y - model(ids[None]).logits.log_softmax(-1)).abs().max().item())
    with pytest.raises(ValueError, match=rf"differ by up to {gap:.2g}\d* nats"):
        LMHead.from_model(model)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["forward", "pre", "instance"])
def test_hooks_on_the_head(kind, early):
    """Those that change its product are refused, also when they come later; others are let be."""
    model = build("llama")
    layer = model.lm_head
    if not early:
        LMHead.from_model(model)
    harmless = layer.register_forward_hook(lambda *_: None)
    assert LMHead.from_model(model).weight is layer.weight
    harmless.remove()
    if kind == "forward":
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "pre":
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM are not those of its output embeddings"
    ):
        LMHead.from_model(model)


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_renews(kind):
    model = build("llama")
    if kind == "weight_norm":
        nn.utils.weight_norm(model.lm_head)
    else:
        prune.random_unstructured(model.lm_head, "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"formed anew by a hook .* LlamaFor|LlamaFor.* formed anew"
    ):
        LMHead.from_model(model)


def forwards(model) -> list:
    calls = []
    parts.backbone(model).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_model_is_asked_once():
    model = build("gemma2")
    calls = forwards(model)
    for _ in range(3):
        LMHead.from_model(model)
    assert len(calls) == 3
    LMHead.from_model(build("gemma2"), ask=False)
    model.config.final_logit_softcapping = 2.0
    assert LMHead.from_model(model).softcap == 2.0 and len(calls) == 6
    model.double()
    model.train()
    assert LMHead.from_model(model).softcap == 2.0 and len(calls) == 6
    model.resize_token_embeddings(70)
    assert LMHead.from_model(model).weight.shape[0] == 70 and len(calls) == 9
    model.set_output_embeddings(nn.Linear(H, 70, dtype=torch.float64))
    assert LMHead.from_model(model).bias is not None and len(calls) == 12


def test_ask_false_runs_nothing():
    model = build("gemma2")
    calls = forwards(model)
    assert LMHead.from_model(model, ask=False).softcap == 3.0 and not calls


def test_threads_that_ask_at_once():
    model = build("gemma2").train()
    calls, found = forwards(model), []

    def ask():
        found.append(LMHead.from_model(model).softcap)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3.0] * 4 and len(calls) == 3
    assert all(module.training for module in model.modules())


def test_what_is_remembered_keeps_no_model_alive():
    model = build("llama")
    LMHead.from_model(model)
    alive = weakref.ref(model)
    assert model in asked._answers
    del model
    gc.collect()
    assert alive() is None


class Counting(Odd):
    """Dropout, random numbers, and state that every forward changes."""

    def __init__(self, config):
        super().__init__(config)
        self.statistics = nn.BatchNorm1d(H, affine=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.cache = None

    def forward(self, input_ids, **kwargs):
        self.statistics(torch.rand(4, H))
        self.count += 1
        self.cache = self.latest = self.model(input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(self.drop(self.cache)))


def test_nothing_is_disturbed():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=2)
    model = Counting(config).train()
    model.gradient_checkpointing_enable()
    model.model.norm.eval()
    modules = dict(model.named_modules())
    attributes = {n: dict(vars(m)) for n, m in modules.items()}
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        LMHead.from_model(model)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), random)
    for name, module in modules.items():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    model(torch.ones(1, 3, dtype=torch.int64))
    assert model.count == 1 and model.cache is not None


def test_training_flags_are_those_from_before():
    model = build("llama").train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    LMHead.from_model(model)
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2


def test_dropout_before_the_head_is_not_seen_as_a_difference():
    assert_head_is_the_models(build("gpt2").train().eval())
    LMHead.from_model(build("gpt2").train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "minicpm3", "cohere"])
def test_half_precision(name, dtype):
    """The numbers are those of the config to the last digit."""
    model = build(name).to(dtype)
    believed, found = LMHead.from_model(model, ask=False), LMHead.from_model(model)
    assert (found.scale, found.softcap) == (believed.scale, believed.softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_nothing(dtype):
    model = odd(after=lambda m, z: 1.02 * z).to(dtype)
    assert LMHead.from_model(model).scale == pytest.approx(1.02, rel=1e-5)
    with pytest.raises(ValueError, match="are not those"):
        LMHead.from_model(odd(after=lambda m, z: z + 0.1 * torch.arange(V)).to(dtype))


def test_a_head_of_another_dtype():
    model = build("llama").bfloat16()
    model.lm_head.float()
    assert LMHead.from_model(model).weight.dtype == torch.float32


def test_inference_mode_and_a_copy():
    model = build("llama")
    with torch.inference_mode():
        LMHead.from_model(model)
    assert LMHead.from_model(copy.deepcopy(model)).scale == 1.0


def test_a_model_on_the_meta_device_has_nothing_to_say():
    assert LMHead.from_model(build("gemma2").to("meta")).softcap == 3.0
    offloaded = build("llama")
    offloaded.lm_head.to("meta")._hf_hook = object()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's output embeddings is offloaded"):
        LMHead.from_model(offloaded)


def test_a_model_that_cannot_be_asked():
    model = odd(after=lambda m, z: z.no_such_thing)
    with pytest.raises(ValueError, match=r"Odd was asked .* AttributeError: .*no_such_thing"):
        LMHead.from_model(model)


def test_what_is_no_causal_language_model():
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"torch.nn.parallel.data_parallel.DataParallel wraps a Llam"
    ):
        LMHead.from_model(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"got torch.nn.modules.linear.Linear, which has no"):
        LMHead.from_model(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"got NoneType from LlamaModel .* no logits"):
        LMHead.from_model(model.model)


def test_an_encoder_decoder_is_refused():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        LMHead.from_model(BartForConditionalGeneration(config))


def test_a_weight_that_is_made_of_others():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.zeros(5, 3), torch.zeros(5, 3))
    with pytest.raises(
        ValueError, match=r"weight is a torch.testing._internal.two_tensor.TwoTensor"
    ):
        LMHead(weight)
    model = build("llama")
    model.lm_head.weight = nn.Parameter(TwoTensor(torch.zeros(V, H), torch.zeros(V, H)))
    with pytest.raises(
        ValueError, match=r"weight of LlamaForCausalLM is a .*TwoTensor.*dequantise"
    ):
        LMHead.from_model(model)


def test_a_weight_that_is_sharded_over_ranks():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = build("llama")
        sharded = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"weight is a torch.*DTensor, sharded .*unshard\(\)"):
            LMHead(sharded)
        model.lm_head.weight = nn.Parameter(sharded)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is a .*DTensor") as error:
            LMHead.from_model(model)
        assert "full_tensor" not in str(error.value)
    finally:
        torch.distributed.destroy_process_group()
