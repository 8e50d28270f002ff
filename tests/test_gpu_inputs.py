"""What people really have, on a CUDA device: NaN, infinities, ties, odd sizes, 2^31 elements."""

import pytest
import torch
from by_name import loss_of

import fused_rl
from fused_rl import (
    LMHead,
    TokenBatch,
    TokenStats,
    linear_logprobs,
    linear_policy_loss,
    logprobs_from_logits,
)
from fused_rl.losses.named import NAMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = [torch.float16, torch.bfloat16]


def relative(ours, exact) -> float:
    exact = exact.double().cpu()
    return ((ours.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("N", [40, 700])
@pytest.mark.parametrize("ignored", [False, True])
def test_nan_in_one_row(N, ignored):
    """It poisons that token alone; an ignored one reaches nothing."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 64).bfloat16().cuda(), torch.randn(999, 64).bfloat16().cuda()
    labels = torch.randint(0, 999, (N,)).cuda()
    hidden[3] = torch.nan
    if ignored:
        labels[3] = -100
    stats = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), labels)
    others = torch.arange(N).cuda() != 3
    for values in stats:
        assert values[others].isfinite().all()
        assert values[3] == 0 if ignored else values[3].isnan()
    dhidden, dweight = torch.autograd.grad(stats.logprobs.sum(), (hidden, weight))
    assert dhidden[others].isfinite().all()
    assert bool(dweight.isfinite().all()) == ignored


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_words_that_are_ruled_out_have_no_gradient(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64).to(dtype).cuda(), torch.randn(2000, 64).to(dtype).cuda()
    bias = torch.zeros(2000, device="cuda").index_fill(
        0, torch.arange(1000, 2000).cuda(), -torch.inf
    )
    labels = torch.randint(0, 1000, (50,)).cuda()
    stats = linear_logprobs(hidden, LMHead(weight.requires_grad_(), bias), labels)
    (dweight,) = torch.autograd.grad((stats.logprobs + stats.entropy).sum(), weight)
    assert (dweight[1000:] == 0).all() and (dweight[:1000] != 0).any()


@pytest.mark.parametrize("value", [-1e15, torch.finfo(torch.float32).min, -1e9])
def test_a_row_that_is_masked_from_end_to_end(value):
    logits = torch.full((4, 300), value, device="cuda").requires_grad_()
    labels = torch.tensor([3, 7, 0, 299]).cuda()
    (grad,) = torch.autograd.grad(logprobs_from_logits(logits, labels).logprobs.sum(), logits)
    exact = torch.nn.functional.one_hot(labels, 300) - 1 / 300
    torch.testing.assert_close(grad, exact, atol=2e-6, rtol=2e-6)


def test_logits_that_tie():
    logits = torch.zeros(1, 300, device="cuda")
    logits[0, [3, 7]] = 1e20
    (grad,) = torch.autograd.grad(
        logprobs_from_logits(logits.requires_grad_(), torch.tensor([3]).cuda()).logprobs.sum(),
        logits,
    )
    assert grad[0, [3, 7]].tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("V", [50257, 32001, 128257])
def test_vocabularies_that_eight_does_not_divide(dtype, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 128).to(dtype).cuda(), torch.randn(V, 128).to(dtype).cuda()
    labels = torch.randint(0, V, (300,)).cuda()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    stats = linear_logprobs(*leaves, labels)
    exact = logprobs_from_logits(wide[0] @ wide[1].T, labels)
    for a, b in zip(stats, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=2e-6)
    for a, b in zip(
        torch.autograd.grad(stats.logprobs.sum(), leaves),
        torch.autograd.grad(exact.logprobs.sum(), wide),
        strict=True,
    ):
        budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
        assert relative(a, b) < budget


@pytest.mark.parametrize("N", [40, 700])
def test_vectors_are_read_as_they_are_stored(N):
    """An expanded upstream gradient and temperature, every second label and bias."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    labels = torch.randint(0, 500, (2 * N,), device="cuda")[::2]
    bias = torch.randn(1000, device="cuda")[::2]
    temperature = torch.tensor(0.7, device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    stats = linear_logprobs(hidden, LMHead(weight, bias), labels, temperature=temperature)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = logprobs_from_logits((wide[0] @ wide[1].T + bias) / 0.7, labels)
    torch.testing.assert_close(stats.logprobs.double(), exact.logprobs, atol=5e-5, rtol=2e-6)
    found = torch.autograd.grad(stats.logprobs.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(exact.logprobs.sum(), wide), strict=True):
        assert relative(a, b) < 1e-5


def test_more_than_two_to_the_31_logits():
    N, V = 14200, 151936
    assert N * V > 2**31
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    labels = torch.randint(0, V, (N,), device="cuda")
    stats = logprobs_from_logits(logits, labels)
    last = logits[-3:].detach().double().requires_grad_()
    exact = logprobs_from_logits(last, labels[-3:])
    torch.testing.assert_close(stats.logprobs[-3:].double(), exact.logprobs, atol=2e-5, rtol=2e-6)
    (grad,) = torch.autograd.grad(stats.logprobs[-3:].sum(), logits)
    (expected,) = torch.autograd.grad(exact.logprobs.sum(), last)
    assert relative(grad[-3:], expected) < 3e-3
    assert (grad[:5] == 0).all()


def test_float16_beside_a_token_with_500_times_the_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128).half().cuda(), torch.randn(8192, 128).half().cuda() / 8
    labels = torch.randint(0, 8192, (64,)).cuda()
    up = torch.ones(64, device="cuda")
    up[0] = 500
    leaf, wide = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    weight.requires_grad_()
    (grad,) = torch.autograd.grad((linear_logprobs(leaf, weight, labels).logprobs * up).sum(), leaf)
    exact = logprobs_from_logits(wide @ weight.detach().double().T, labels).logprobs
    (expected,) = torch.autograd.grad((exact * up.double()).sum(), wide)
    assert relative(grad[1:], expected[1:]) < 1e-3


def policy_batch(shape=(4, 8), V=500):
    noise = torch.Generator().manual_seed(0)
    logprobs = {
        f"{name}_logprobs": (-6 - torch.rand(shape, generator=noise)).cuda()
        for name in ("old", "ref", "rollout")
    }
    labels = torch.randint(0, V, shape, generator=noise).cuda()
    mask = (torch.rand(shape, generator=noise) < 0.8).cuda()
    return TokenBatch.padded(labels, mask, torch.randn(4, generator=noise).cuda(), **logprobs)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_one_pass_is_two_passes(name):
    batch = policy_batch()
    loss = loss_of(name)
    hidden = torch.randn(4, 8, 32, device="cuda").requires_grad_()
    weight = torch.randn(500, 32, device="cuda").requires_grad_()
    stats = linear_logprobs(hidden, weight, batch.labels.reshape(4, 8))
    exact = loss(TokenStats(*(t.reshape(-1) for t in stats)), batch).loss
    found = linear_policy_loss(hidden, weight, batch, loss).loss
    torch.testing.assert_close(found, exact)
    pairs = (torch.autograd.grad(value, (hidden, weight)) for value in (found, exact))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"clip_cov", "kl_cov"}))
def test_a_loss_waits_for_nothing(name):
    batch = policy_batch()
    loss = loss_of(name)
    logprobs = torch.full((32,), -6.5, device="cuda").requires_grad_()
    stats = TokenStats(logprobs, torch.ones(32, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = loss(stats, batch)
        (grad,) = torch.autograd.grad(output.loss, logprobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in output.metrics.values())


def test_nan_from_the_engine_is_no_nan_in_the_loss():
    batch = policy_batch()
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        getattr(batch, name)[5] = torch.nan
    logprobs = torch.full((32,), -6.5, device="cuda").requires_grad_()
    output = fused_rl.grpo(beta=0.1)(TokenStats(logprobs, torch.ones(32, device="cuda")), batch)
    assert output.loss.isfinite() and output.metrics["unknown_fraction"] > 0
    (grad,) = torch.autograd.grad(output.loss, logprobs)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers(dtype):
    transformers = pytest.importorskip("transformers")
    from fused_rl.integrations.transformers import logprobs

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.Gemma2ForCausalLM(config).cuda().to(dtype).eval()
    ids = torch.randint(3, 300, (2, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        stats = logprobs(model, ids, attention_mask=mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        raw = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
    exact = raw.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    there = (mask[:, 1:] & mask[:, :-1]).bool()
    bound = 2e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(stats.logprobs[there], exact[there], atol=bound, rtol=0)


def test_saved_tensors_may_live_on_the_host():
    batch = policy_batch()
    hidden = torch.randn(4, 8, 32, device="cuda").requires_grad_()
    weight = torch.randn(500, 32, device="cuda").requires_grad_()

    def gradients():
        loss = linear_policy_loss(hidden, weight, batch, fused_rl.grpo()).loss
        return torch.autograd.grad(loss, (hidden, weight))

    with torch.autograd.graph.save_on_cpu():
        found = gradients()
    for a, b in zip(found, gradients(), strict=True):
        assert torch.equal(a, b)
