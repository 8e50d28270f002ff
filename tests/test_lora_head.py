"""LoRA on the head, beside PEFT's own logits: values, gradients, and what is refused."""

import pytest
import torch
from lora_models import IDS, LABELS, V, adapted, drawn, hidden_of, of_logits, peft, theirs, trained
from test_head import build
from torch import nn

from fused_rl import LMHead, TokenBatch, grpo, linear_logprobs, linear_policy_loss
from fused_rl.integrations.transformers import backbone, logprobs, patched
from fused_rl.models.adapters import Adapter
from fused_rl.one_pass.through import model_policy_loss

D = torch.float64


def double(config=None, kind="llama", **options):
    return adapted(kind, D, config, **options)


def two_adapters(model):
    """A second one of another rank, active beside the first."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"], use_rslora=True)
    model.add_adapter("second", config)
    drawn(model)
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


def one_loss(logprobs, entropy):
    w = torch.linspace(-1, 1, LABELS.numel(), dtype=logprobs.dtype).reshape(LABELS.shape)
    return (w * logprobs + w.flip(0) * entropy).sum()


def batch_of(model, hidden):
    """Tokens whose old log-probs are near the model's, some of them masked."""
    torch.manual_seed(1)
    with torch.no_grad():
        old = of_logits(theirs(model, hidden).double())[0]
    mask = torch.rand(LABELS.shape) < 0.8
    advantages = torch.randn(LABELS.shape, dtype=D)
    old = old + 0.1 * torch.randn_like(old)
    return TokenBatch.padded(LABELS, mask, advantages, old_logprobs=old)


def gradients(loss, hidden, model):
    return torch.autograd.grad(loss, (hidden, *trained(model)))


MODELS = {
    "LoRA": double,
    "rslora": lambda: double(use_rslora=True),
    "its bias": lambda: double(kind="phi", lora_bias=True),
    "its bias alone": lambda: double(lora_bias=True),
    "two": lambda: two_adapters(double()),
    "softcap": lambda: double(kind="gemma2"),
    "scale": lambda: double(kind="cohere"),
    "scaled states": lambda: double(kind="minicpm3"),
    "tied": lambda: double(kind="qwen2"),
    "beside others": lambda: double(target_modules=["lm_head", "q_proj", "embed_tokens"]),
    "the head is trained, too": lambda: double(
        modules_to_save=["lm_head"], target_modules=["q_proj"]
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("chunk_bytes", [None, 6000])
def test_values_and_gradients_are_pefts(model, chunk_bytes):
    hidden = hidden_of(model).requires_grad_()
    right = of_logits(theirs(model, hidden))
    head = LMHead.from_model(model)
    found = linear_logprobs(hidden, head, LABELS, chunk_bytes=chunk_bytes)
    for ours, of_peft in zip(found, right, strict=True):
        torch.testing.assert_close(ours, of_peft, rtol=1e-9, atol=1e-9)
    ours = gradients(one_loss(*found), hidden, model)
    for of_ours, of_peft in zip(ours, gradients(one_loss(*right), hidden, model), strict=True):
        torch.testing.assert_close(of_ours, of_peft, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "way", ["one pass", "several chunks", "two passes", "filtered", "by model"]
)
def test_a_policy_loss_is_that_of_pefts_log_probs(model, way):
    hidden = hidden_of(model).requires_grad_()
    batch, loss = batch_of(model, hidden), grpo(clip_low=0.05, clip_high=0.05, entropy_coef=0.1)
    options = {"several chunks": {"chunk_bytes": 6000}, "filtered": {"grad_filter": 1e-300}}
    form = model_policy_loss if way == "by model" else linear_policy_loss
    head = model if way == "by model" else LMHead.from_model(model)
    loss_of = (lambda stats, batch: loss(stats, batch)) if way == "two passes" else loss
    args = (head, hidden) if way == "by model" else (hidden, head)
    found = form(*args, batch, loss_of, **options.get(way, {}))
    right = linear_policy_loss_of(theirs(model, hidden), batch, loss)
    torch.testing.assert_close(found.loss, right, rtol=1e-9, atol=1e-9)
    ours = gradients(found.loss, hidden, model)
    for of_ours, of_peft in zip(ours, gradients(right, hidden, model), strict=True):
        torch.testing.assert_close(of_ours, of_peft, rtol=1e-8, atol=1e-10)


def linear_policy_loss_of(logits, batch, loss):
    from fused_rl import TokenStats

    return loss(TokenStats(*(t.flatten() for t in of_logits(logits))), batch).loss


def test_logprobs_of_the_model_and_patched(model):
    with torch.no_grad():
        right = of_logits(model(IDS).logits)
        # The state at t predicts the label at t + 1.
        labels = torch.cat([IDS[:, :1], LABELS[:, :-1]], 1)
        found = logprobs(model, IDS, labels)
        with patched(model):
            again = model(input_ids=IDS, labels=labels, return_logprobs=True)
    for ours, patched_s, of_peft in zip(found, again, right, strict=True):
        torch.testing.assert_close(ours, of_peft[:, :-1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(patched_s, ours, rtol=0, atol=0)


# States that an adapter can be in.


def test_disabled_and_merged_adapters_are_no_part_of_the_head():
    model = double()
    hidden = hidden_of(model)
    head = LMHead.from_model(model)
    own = model.get_base_model().lm_head.base_layer.weight
    assert head.weight is own and len(head.adapters) == 1
    with model.disable_adapter():
        without = LMHead.from_model(model)
        assert without.weight is own and without.adapters == ()
        torch.testing.assert_close(without.logits(hidden), theirs(model, hidden))
    before = head.logits(hidden)
    model.merge_adapter()
    merged = LMHead.from_model(model)
    assert merged.adapters == ()
    torch.testing.assert_close(merged.logits(hidden), before)
    torch.testing.assert_close(merged.logits(hidden), theirs(model, hidden))
    with model.disable_adapter(), pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        LMHead.from_model(model)
    model.unmerge_adapter()
    torch.testing.assert_close(LMHead.from_model(model).logits(hidden), before)


def test_the_copy_that_modules_to_save_has_active_is_the_head():
    model = double(modules_to_save=["lm_head"], target_modules=["q_proj"])
    wrapper = model.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.normal_()
    assert LMHead.from_model(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert LMHead.from_model(model).weight is wrapper.original_module.weight


def test_another_active_adapter_is_another_head():
    model = two_adapters(double())
    hidden = hidden_of(model)
    for name in ("second", "default"):
        model.set_adapter(name)
        head = LMHead.from_model(model)
        assert [a.up.shape[1] for a in head.adapters] == [2 if name == "second" else 3]
        torch.testing.assert_close(head.logits(hidden), theirs(model, hidden))


def test_an_adapter_on_a_model_that_has_one_already():
    inner = double().get_base_model()
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    drawn(model)
    hidden = hidden_of(model)
    torch.testing.assert_close(LMHead.from_model(model).logits(hidden), theirs(model, hidden))


def test_a_peft_layer_is_a_head():
    model = double()
    hidden, layer = hidden_of(model), model.get_base_model().lm_head
    found = linear_logprobs(hidden, layer, LABELS)
    right = of_logits(theirs(model, hidden))
    torch.testing.assert_close(found.logprobs, right[0])


# Dropout.


def test_dropout_is_pefts_in_training_and_none_in_evaluation():
    model = two_adapters(double(lora_dropout=0.4))
    hidden = hidden_of(model).requires_grad_()
    assert all(a.dropout == 0 for a in LMHead.from_model(model).adapters)
    model.train()
    head = LMHead.from_model(model)
    # Of the second adapter's none was asked.
    assert [a.dropout for a in head.adapters] == [0.4, 0.0]
    torch.manual_seed(5)
    right = of_logits(theirs(model, hidden))
    torch.manual_seed(5)
    found = linear_logprobs(hidden, head, LABELS)
    torch.testing.assert_close(found.logprobs, right[0])
    ours = gradients(one_loss(*found), hidden, model)
    for of_ours, of_peft in zip(ours, gradients(one_loss(*right), hidden, model), strict=True):
        torch.testing.assert_close(of_ours, of_peft)
    other = linear_logprobs(hidden, head, LABELS)
    assert not torch.equal(other.logprobs, found.logprobs)


# Dtypes.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16_it_is_as_near_as_pefts(factors, autocast):
    """To what float64 makes of the same numbers: the mean over three draws."""
    totals = torch.zeros(2, 5, dtype=D)
    for seed in range(3):
        model = adapted(dtype=torch.float32 if autocast else torch.bfloat16)
        model.get_base_model().lm_head.to(torch.bfloat16)
        for name, p in model.named_parameters():
            torch.manual_seed(seed)
            if "lora_" in name:
                p.data = torch.randn(p.shape).mul_(0.3).to(factors)
        hidden = hidden_of(model)
        wide = double()
        for name, p in wide.named_parameters():
            p.data = model.get_parameter(name).double()
        own, exact = (hidden.to(t).requires_grad_() for t in (torch.bfloat16, D))
        exact.data = own.detach().double()
        right = of_logits(theirs(wide, exact))
        right = (*right, *gradients(one_loss(*right), exact, wide))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            eager = of_logits(theirs(model, own).float())
            ours = linear_logprobs(own, LMHead.from_model(model), LABELS)
        for i, found in enumerate((ours, eager)):
            found = (*found, *gradients(one_loss(*found), own, model))
            off = [((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
            totals[i] += torch.stack(off)
    assert (totals[0] <= totals[1]).all(), totals


# Which gradients are formed.


def shapes_of_dweight(monkeypatch):
    """Of the sums of all chunks that are formed from now on."""
    from fused_rl.one_pass import chunks
    from fused_rl.ops import adapted, chunk

    seen, own = [], chunk.linear_logprobs_chunk_backward

    def watched(logits, upstream, head, known, sums):
        seen.append((*sums.dweight.shape,))
        return own(logits, upstream, head, known, sums)

    from fused_rl import ops

    monkeypatch.setattr(adapted, "linear_logprobs_chunk_backward", watched)
    monkeypatch.setattr(ops, "linear_logprobs_chunk_backward", watched)
    assert chunks.ops is ops
    return seen


@pytest.mark.parametrize("form", ["log-probs", "policy loss"])
def test_dweight_has_the_columns_of_the_adapters_alone(form, monkeypatch):
    model = adapted()
    hidden, head = hidden_of(model).requires_grad_(), LMHead.from_model(model)
    batch = batch_of(model, hidden)
    seen = shapes_of_dweight(monkeypatch)
    if form == "log-probs":
        one_loss(*linear_logprobs(hidden, head, LABELS, chunk_bytes=6000)).backward()
    else:
        linear_policy_loss(hidden, head, batch, grpo(), chunk_bytes=6000).loss.backward()
    assert len(seen) > 1 and set(seen) == {(V, 3)}
    assert head.weight.grad is None and head.requires_grad


@pytest.mark.parametrize("of", ["up", "down", "weight", "hidden", "none"])
def test_what_alone_is_trained_has_its_gradient(of):
    model = double()
    hidden, head = hidden_of(model), LMHead.from_model(model)
    (adapter,) = head.adapters
    named = {"up": adapter.up, "down": adapter.down, "weight": head.weight, "hidden": hidden}
    for name, t in named.items():
        t.requires_grad_(name == of)
    batch = batch_of(model, hidden)
    right = of_logits(theirs(model, hidden))
    found = linear_logprobs(hidden, head, LABELS)
    loss, of_peft = (
        linear_policy_loss(hidden, head, batch, grpo()).loss,
        linear_policy_loss_of(theirs(model, hidden), batch, grpo()),
    )
    torch.testing.assert_close(loss, of_peft)
    if of == "none":
        assert not found.logprobs.requires_grad and not loss.requires_grad
        return
    for ours, of_theirs in ((one_loss(*found), one_loss(*right)), (loss, of_peft)):
        (a,), (b,) = (torch.autograd.grad(x, named[of]) for x in (ours, of_theirs))
        torch.testing.assert_close(a, b)


def test_weight_and_adapters_may_be_trained_at_once():
    model = double()
    hidden, head = hidden_of(model).requires_grad_(), LMHead.from_model(model)
    head.weight.requires_grad_()
    right = gradients(one_loss(*of_logits(theirs(model, hidden))), hidden, model)
    found = gradients(one_loss(*linear_logprobs(hidden, head, LABELS)), hidden, model)
    assert len(found) == 4
    for ours, of_peft in zip(found, right, strict=True):
        torch.testing.assert_close(ours, of_peft)


def test_a_second_backward_pass_finds_the_same():
    model = double()
    hidden, head = hidden_of(model).requires_grad_(), LMHead.from_model(model)
    loss = linear_policy_loss(hidden, head, batch_of(model, hidden), grpo()).loss
    once = torch.autograd.grad(loss, trained(model), retain_graph=True)
    again = torch.autograd.grad(loss, trained(model))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_tokens_may_be_anything_and_none_may_count():
    model = double()
    head, hidden = LMHead.from_model(model), hidden_of(model)
    hidden[0, :2] = torch.nan
    labels = LABELS.clone()
    labels[0] = -100
    hidden.requires_grad_()
    found = linear_logprobs(hidden, head, labels)
    assert not found.logprobs[0].any() and found.logprobs.isfinite().all()
    found.logprobs[1:].sum().backward()
    assert hidden.grad[1:].isfinite().all() and not hidden.grad[0, 2:].any()
    assert head.adapters[0].up.grad.isfinite().all()
    none = linear_logprobs(hidden, head, torch.full_like(labels, -100))
    up = torch.autograd.grad(none.logprobs.sum(), head.adapters[0].up)[0]
    assert up.shape == head.adapters[0].up.shape and not up.any()
    empty = linear_logprobs(hidden[:, :0], head, labels[:, :0])
    assert empty.logprobs.shape == (3, 0)


# What is refused.


REFUSED = {
    "DoRA": (lambda: peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "Dora"),
    "IA3": (
        lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        r"peft\.tuners\.ia3\.layer\.Linear",
    ),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=["lm_head"]), r"peft\.tuners\.loha"),
    "LoKr": (lambda: peft.LoKrConfig(r=2, target_modules=["lm_head"]), r"peft\.tuners\.lokr"),
    "VeRA": (lambda: peft.VeraConfig(r=2, target_modules=["lm_head"]), r"peft\.tuners\.vera"),
    "OFT": (
        lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["lm_head"]),
        r"peft\.tuners\.oft",
    ),
    "trainable tokens": (
        lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["lm_head"]),
        r"peft\.tuners\.trainable_tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_named_with_the_way_out(kind):
    config, named = REFUSED[kind]
    model = peft.get_peft_model(build("llama"), config())
    with pytest.raises(ValueError, match=rf"{named}.*merge the adapter.*leave lm_head out"):
        LMHead.from_model(model)
    with pytest.raises(ValueError, match=r"merge the adapter|torch\.nn\.Linear"):
        linear_logprobs(hidden_of(model), model.get_base_model().lm_head, LABELS)


def test_names_of_adapters_for_each_row_are_refused():
    model = patch_and_adapt()
    with pytest.raises(ValueError, match=r"PEFT gives adapter_names .* once for each adapter"):
        model(input_ids=IDS, return_logprobs=True, adapter_names=["default", "__base__", "default"])


def patch_and_adapt():
    model = adapted()
    from fused_rl.integrations.transformers import patch_model

    return patch_model(model)


def test_adapters_that_do_not_fit_are_named():
    weight, down, up = torch.randn(9, 4), torch.randn(2, 4), torch.randn(9, 2)
    wrong = {
        r"adapters must be a tuple of fused_rl\.models\.adapters\.Adapter, got": [down],
        r"adapters\[1\] must have down \[r, H\] and up \[V, r\] beside the weight \[9, 4\], got "
        r"down \[4, 2\] and up \[9, 2\]": (Adapter(down, up), Adapter(down.T, up)),
        r"got down \[2, 4\] and up \[9, 3\]": (Adapter(down, torch.randn(9, 3)),),
        r"adapters\[0\]\.up": (Adapter(down, up.long()),),
        r"adapters\[0\]\.dropout must be in \[0, 1\), got 1.0": (Adapter(down, up, 1.0, 1.0),),
        r"adapters\[0\]\.scaling": (Adapter(down, up, "much"),),
    }
    for said, adapters in wrong.items():
        with pytest.raises(ValueError, match=said):
            LMHead(weight, adapters=adapters)
    hidden = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"hidden and weight must agree in H"):
        linear_logprobs(
            hidden, LMHead(weight, adapters=(Adapter(down, up),)), torch.zeros(5, dtype=torch.long)
        )


def test_an_adapter_with_another_product_in_it_is_refused():
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    model = adapted()
    layer = model.get_base_model().lm_head
    layer.lora_A["default"].__class__ = Squared
    with pytest.raises(ValueError, match=r"'default' on the output embeddings has a .*Squared"):
        LMHead.from_model(model)


def test_the_model_is_asked_with_its_adapters():
    """A layer that does not scale its adapters as it says is found out."""
    model = adapted()
    layer = model.get_base_model().lm_head
    own = layer.forward
    layer.forward = lambda x: own(x) + 0.5 * layer.lora_B["default"](layer.lora_A["default"](x))
    with pytest.raises(ValueError, match=r"log-probabilities of a few tokens differ by up to"):
        LMHead.from_model(model)


def test_backbone_is_that_of_the_model_inside():
    model = adapted()
    assert backbone(model) is model.get_base_model().model
