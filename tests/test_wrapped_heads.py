"""Heads that are compiled, and heads that are quantised: right, or refused with the way out."""

import re

import pytest
import torch
from lora_models import adapted
from test_head import build
from torch import nn

from fused_rl import LMHead, TokenBatch, grpo, linear_logprobs, linear_policy_loss
from fused_rl.integrations.transformers import backbone, logprobs, patched
from fused_rl.models import quantised
from fused_rl.one_pass.through import model_policy_loss

IDS = torch.arange(3, 45).reshape(3, 14)

# torch.compile.


def compiled(kind, in_place=False):
    model = build("llama") if kind == "plain" else adapted().get_base_model()
    if in_place:
        model.lm_head.compile(backend="eager")
    else:
        model.lm_head = torch.compile(model.lm_head, backend="eager")
    return model


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_a_compiled_head_is_the_head(kind, in_place):
    model = compiled(kind, in_place)
    with torch.no_grad():
        right = model(IDS).logits
        hidden = backbone(model)(IDS).last_hidden_state
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(hidden), right, atol=2e-5, rtol=1e-5)
    by_layer = linear_logprobs(hidden, model.lm_head, IDS)
    of_peft = right.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    torch.testing.assert_close(by_layer.logprobs, of_peft, atol=2e-5, rtol=1e-5)
    with patched(model):
        found = model(input_ids=IDS, return_logprobs=True).logprobs
    torch.testing.assert_close(found, logprobs(model, IDS).logprobs)
    batch = TokenBatch.padded(IDS, IDS >= 0, torch.ones(3), old_logprobs=of_peft)
    hidden.requires_grad_()
    ours = model_policy_loss(model, hidden, batch, grpo()).loss
    same = linear_policy_loss(hidden, head, batch, grpo()).loss
    torch.testing.assert_close(ours, same)
    own = [p for p in model.lm_head.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, own), torch.autograd.grad(same, own), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hook_on_what_compile_has_wrapped_is_seen_and_so_is_one_on_the_wrapper():
    for inside in (False, True):
        layer = torch.compile(nn.Linear(4, 9), backend="eager")
        hooked = layer._orig_mod if inside else layer
        hooked.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(ValueError, match="forward hooks or a forward of its own"):
            LMHead.of(layer)


def test_a_hook_beneath_adapters_is_seen():
    model = adapted()
    layer = model.get_base_model().lm_head
    layer.base_layer.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="forward hooks or a forward of its own"):
        LMHead.of(layer)


# Quantised heads.


class Codes(torch.Tensor):
    """Imitates a weight of torchao: floating by its dtype, and made of other tensors."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Codes(inner["codes"], inner["scale"])

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = lambda t: t.dequantize() if isinstance(t, Codes) else t  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **(kwargs or {}))


class Params4bit(nn.Parameter):
    """Imitates bitsandbytes': a parameter of codes, two to a byte."""


Params4bit.__module__ = "bitsandbytes.nn.modules"


class Linear4bit(nn.Linear):
    """Imitates bitsandbytes'."""


Linear4bit.__module__ = "bitsandbytes.nn.modules"


def refused(model, hidden, *said):
    """Whichever way the layer or its weight is given."""
    layer = model.lm_head
    for form in (
        lambda: LMHead.from_model(model),
        lambda: LMHead(layer.weight),
        lambda: linear_logprobs(hidden, layer, IDS),
        lambda: logprobs(model, IDS),
    ):
        with pytest.raises(ValueError) as error:
            form()
        for part in said:
            assert part in str(error.value), str(error.value)


def test_a_weight_made_of_codes_is_named_with_the_way_out():
    model = build("llama")
    weight = Codes(torch.randint(-127, 128, (67, 32), dtype=torch.int8), torch.full((67, 1), 0.01))
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    hidden = torch.randn(3, 14, 32)
    refused(model, hidden, "Codes", "weight.dequantize()", "llm_int8_skip_modules")
    right = (hidden @ weight.dequantize().T).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    found = linear_logprobs(hidden, LMHead(model.lm_head.weight.dequantize()), IDS)
    torch.testing.assert_close(found.logprobs, right)


def test_a_layer_of_codes_is_named_with_the_way_out():
    model = build("llama")
    model.lm_head.__class__ = Linear4bit
    model.lm_head.weight = Params4bit(torch.zeros(67 * 16, 1, dtype=torch.uint8), False)
    said = ("bitsandbytes.nn.modules.", "dequantize_4bit(weight.data, weight.quant_state)")
    refused(model, torch.randn(3, 14, 32), *said)


def way_of(model):
    """The weight that the error's own words give."""
    with pytest.raises(ValueError) as error:
        LMHead.from_model(model)
    found = re.search(r"w = ([^;]*);", str(error.value)).group(1)
    way, _, scb = found.partition(", scb = ")
    layer = model.lm_head
    names = {"layer": layer, "weight": layer.weight}
    if "bitsandbytes" in way:
        import bitsandbytes

        names["bitsandbytes"] = bitsandbytes
    if scb:
        names["scb"] = eval(scb, names)
    return eval(way, names)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["Linear8bitLt", "Linear4bit"])
def test_heads_of_bitsandbytes_have_the_way_out_that_is_named(name, called):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = build("llama")
    plain = model.lm_head.weight.detach()
    options = {"has_fp16_weights": False} if name == "Linear8bitLt" else {}
    layer = getattr(bnb.nn, name)(32, 67, bias=False, **options)
    kind = type(layer.weight)
    layer.weight = kind(plain.clone(), requires_grad=False, **options)
    model.lm_head = layer.to("cpu")
    if called:
        model(IDS)
    refused(model, torch.randn(3, 14, 32), "bitsandbytes.nn.modules.", "functional.")
    weight = way_of(model)
    assert weight.shape == plain.shape
    assert (weight - plain).norm() < (0.02 if options else 0.25) * plain.norm()
    hidden = torch.randn(3, 14, 32)
    found = linear_logprobs(hidden, LMHead(weight), IDS).logprobs
    right = layer(hidden).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    # The layer of 8 bits rounds hidden too.
    torch.testing.assert_close(found, right, atol=0.5 if options else 1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_heads_of_torchao_have_the_way_out_that_is_named(config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = build("llama")
    plain = model.lm_head.weight.detach().clone()
    quantization.quantize_(model.lm_head, getattr(quantization, config)())
    hidden = torch.randn(3, 14, 32)
    refused(model, hidden, type(model.lm_head.weight).__name__, "weight.dequantize()")
    weight = way_of(model)
    assert (weight - plain).norm() < 0.05 * plain.norm()
    right = model.lm_head(hidden).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    found = linear_logprobs(hidden, LMHead(weight), IDS)
    torch.testing.assert_close(found.logprobs, right, atol=1e-4, rtol=1e-4)


def test_another_layer_is_told_no_word_of_quantisation():
    assert not quantised.is_quantised(nn.Linear(3, 4)) and not quantised.is_quantised(None)
    with pytest.raises(ValueError, match=r"torch\.nn\.Linear, got torch\.nn\..*Bilinear$"):
        LMHead.of(nn.Bilinear(2, 3, 4))
