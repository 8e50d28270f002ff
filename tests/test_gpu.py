"""The ops on a CUDA device, through the public functions; skipped where there is none."""

import decisions
import pytest
import torch

import fused_rl
from fused_rl import (
    TokenBatch,
    linear_logprobs,
    linear_policy_loss,
    linear_top_logprobs,
    logprobs_from_logits,
    ops,
)
from fused_rl.linear import Statistic
from fused_rl.models.adapters import Adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BUDGET = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}


def build(dtype, device, N=130, H=72, V=1003, trained=True):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    labels = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.8, -100)
    hidden = hidden.to(device).requires_grad_()
    return hidden, weight.to(device).requires_grad_(trained), labels.to(device)


def relative(ours, exact) -> float:
    exact = exact.double().cpu()
    return ((ours.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 130, 700])
@pytest.mark.parametrize("trained", [True, False])
def test_linear_logprobs_agrees_with_the_cpu_in_float64(dtype, N, trained):
    hidden, weight, labels = build(dtype, "cuda", N, trained=trained)
    h, w = hidden.detach().double().cpu().requires_grad_(), weight.detach().double().cpu()
    w.requires_grad_(trained)
    exact = linear_logprobs(h, w, labels.cpu())
    ours = linear_logprobs(hidden, weight, labels)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=2e-5, rtol=2e-6)
    leaves = [(hidden, h), (weight, w)] if trained else [(hidden, h)]
    for stat in range(2):
        got = torch.autograd.grad(ours[stat].sum(), [a for a, _ in leaves], retain_graph=True)
        true = torch.autograd.grad(exact[stat].sum(), [b for _, b in leaves], retain_graph=True)
        for a, b in zip(got, true, strict=True):
            assert relative(a, b) < BUDGET[dtype] or b.norm() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [130, 700])
@pytest.mark.parametrize("trained", [True, False])
def test_logprobs_equal_top_logprobs_at_the_most_likely_token_alone(dtype, N, trained):
    hidden, weight, labels = build(dtype, "cuda", N, trained=trained)
    z = hidden.detach().double().cpu() @ weight.detach().double().cpu().T
    (best, second), entry = z.topk(2, -1).values.unbind(-1), z.argmax(-1)
    labels = labels.cpu()
    labels[::2] = entry[::2]
    stats = linear_top_logprobs(hidden, weight, labels.cuda())
    counted = labels != -100
    exact = (best - z.logsumexp(-1)).where(counted, 0.0)
    top = stats.top_logprobs.cpu()
    torch.testing.assert_close(top.double(), exact, atol=2e-5, rtol=2e-6)
    judged = counted & (best - second > 1e-3)
    is_top = stats.logprobs.cpu() == top
    assert torch.equal(is_top[judged], (labels == entry)[judged])
    assert 0 < is_top[judged].sum() < judged.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_from_logits_agree(dtype):
    logits = torch.randn(40, 5000).to(dtype).cuda().requires_grad_()
    labels = torch.randint(0, 5000, (40,)).cuda()
    leaf = logits.detach().double().cpu().requires_grad_()
    exact = logprobs_from_logits(leaf, labels.cpu())
    ours = logprobs_from_logits(logits, labels)
    (a,) = torch.autograd.grad(ours.logprobs.sum() + ours.entropy.sum(), logits)
    (b,) = torch.autograd.grad(exact.logprobs.sum() + exact.entropy.sum(), leaf)
    torch.testing.assert_close(ours.logprobs.double().cpu(), exact.logprobs, atol=2e-5, rtol=2e-6)
    assert relative(a, b) < BUDGET[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [None, 64 * 1003 * 4])
def test_the_one_pass_loss_agrees(dtype, chunk_bytes):
    def run(device, computed_in):
        hidden, weight, labels = build(dtype, device, N=128)
        hidden, weight = (t.detach().to(computed_in).requires_grad_() for t in (hidden, weight))
        shape = (8, 16)
        mask = (labels != -100).reshape(shape)
        advantages = torch.linspace(-1, 1, 8, device=device)
        batch = TokenBatch.padded(labels.reshape(shape), mask, advantages)
        shaped = hidden.reshape(*shape, -1)
        loss = fused_rl.grpo(entropy_coef=0.01)
        output = linear_policy_loss(shaped, weight, batch, loss, chunk_bytes=chunk_bytes)
        return output.loss.detach(), *torch.autograd.grad(output.loss, (hidden, weight))

    exact, ours = run("cpu", torch.float64), run("cuda", dtype)
    torch.testing.assert_close(ours[0].double().cpu(), exact[0], atol=2e-5, rtol=2e-6)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert relative(a, b) < BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_on_cuda(dtype):
    hidden, weight, labels = build(dtype, "cuda", N=20)
    temperature = torch.ones(20, device="cuda")
    args = (hidden, weight, None, labels, temperature, 1.0, 0.0, 0, -100, 2**20)
    torch.library.opcheck(ops.linear_logprobs.op, args)


def test_same_bits_from_run_to_run():
    hidden, weight, labels = build(torch.bfloat16, "cuda")
    runs = []
    for _ in range(2):
        stats = linear_logprobs(hidden, weight, labels)
        runs.append([*stats, *torch.autograd.grad(stats.logprobs.sum(), (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_label_outside_the_vocabulary_is_nan():
    hidden, weight, labels = build(torch.bfloat16, "cuda")
    labels[0] = 1003
    assert linear_logprobs(hidden, weight, labels).logprobs[0].isnan()


def test_the_forward_can_be_captured_in_a_graph():
    hidden, weight, labels = build(torch.bfloat16, "cuda")
    labels = labels.clamp(min=0)
    with torch.no_grad():
        expected = linear_logprobs(hidden, weight, labels)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear_logprobs(hidden, weight, labels)
        graph.replay()
    torch.testing.assert_close(captured.logprobs, expected.logprobs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_on_another_device_than_the_current_one():
    hidden, weight, labels = build(torch.bfloat16, "cuda:1")
    stats = linear_logprobs(hidden, weight, labels)
    assert stats.logprobs.device.index == 1


def policy_batch(labels):
    shape = (10, 13)
    mask = (labels != -100).reshape(shape)
    advantages = torch.linspace(-1, 1, 10, device=labels.device)
    old = torch.full(shape, -7.0, device=labels.device)
    return TokenBatch.padded(labels.reshape(shape), mask, advantages, old_logprobs=old)


def test_a_step_can_be_captured_in_a_graph():
    """Forward, loss and backward; replayed on other numbers it is the eager step.

    The graph multiplies all rows, the eager step those that have a gradient: the fp32 sums are in
    another order, and may round to the other neighbour in bfloat16.
    """
    hidden, weight, labels = build(torch.bfloat16, "cuda")
    batch = policy_batch(labels.clamp(min=0))

    def step():
        stats = linear_logprobs(hidden, weight, batch.labels)
        loss = fused_rl.grpo()(stats, batch).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    replay = decisions.captured(step)
    with torch.no_grad():
        hidden.mul_(0.5)
    (loss, *gradients), (expected_loss, *expected) = replay(), step()
    torch.testing.assert_close(loss, expected_loss)
    for a, b in zip(gradients, expected, strict=True):
        ulp = torch.finfo(b.dtype).eps * b.abs()
        # Where terms cancel, their sum is as exact as they are: a part of the usual element's ulp.
        assert ((a - b).abs() <= torch.maximum(ulp, 1e-3 * ulp.mean())).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_backward_of_the_one_pass_waits_for_nothing(scale):
    hidden, weight, labels = build(torch.bfloat16, "cuda")
    batch = policy_batch(labels)
    shaped = hidden.reshape(*batch.shape, -1)

    def gradients(scale):
        loss = linear_policy_loss(shaped, weight, batch, fused_rl.grpo()).loss * scale
        torch.cuda.set_sync_debug_mode("error")
        try:
            return torch.autograd.grad(loss, (hidden, weight))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for found, expected in zip(gradients(scale), gradients(1.0), strict=True):
        assert torch.equal(found, expected * scale)


@pytest.mark.parametrize("N", [64, 700])
@pytest.mark.parametrize("transform", [False, True])
def test_every_way_of_the_forward_agrees(N, transform, monkeypatch):
    """Whatever `fwd` would choose: each configuration for the device, and tiles of logits."""
    from fused_rl.kernels import configs
    from fused_rl.kernels import linear_logprobs as kernel

    hidden, weight, labels = (t.detach() for t in build(torch.bfloat16, "cuda", N))
    bias = torch.randn(len(weight), device="cuda") if transform else None
    head = fused_rl.LMHead(weight, bias, softcap=20.0 if transform else None)
    on_cpu = (None if t is None else t.double().cpu() for t in (weight, bias))
    exact = linear_logprobs(
        hidden.double().cpu(), fused_rl.LMHead(*on_cpu, softcap=head.softcap), labels.cpu()
    )
    device = configs.Device.of(hidden.device)
    ones = torch.ones(N, device="cuda")
    call = (hidden, weight, bias, labels, ones, 1.0, head.softcap or 0.0, 0)
    for config in (*configs.configs(device.major), None):
        if config is not None and (config.stores or config.rows < N):
            continue
        if config is not None and transform and not config.transforms:
            continue
        monkeypatch.setattr(kernel, "chosen", lambda *_, config=config: config)
        stats = kernel.fwd(*call, -100, device)[:2]
        for a, b in zip(stats, exact, strict=True):
            torch.testing.assert_close(a.double().cpu(), b, atol=2e-5, rtol=2e-6)
        poisoned = hidden.clone()
        poisoned[5] = torch.nan
        dirty = kernel.fwd(poisoned, *call[1:], -100, device)
        others = (torch.arange(N, device="cuda") != 5) & (labels != -100)
        for a, b in zip(stats, dirty, strict=False):
            assert torch.equal(a[others], b[others])
        assert dirty[1][5].isnan() or labels[5] == -100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 130, 700])
@pytest.mark.parametrize("trained", [True, False])
def test_more_statistics_of_the_same_pass_agree(dtype, N, trained):
    """Values, and the gradient of lse beside those of the others; ids by what is at them."""
    hidden, weight, labels = build(dtype, "cuda", N, trained=trained)
    h, w = hidden.detach().double().cpu().requires_grad_(), weight.detach().double().cpu()
    w.requires_grad_(trained)
    asked = {"of": tuple(Statistic), "top": 5, "temperature": 3.0}
    exact = fused_rl.linear_statistics(h, w, labels.cpu(), **asked)
    ours = fused_rl.linear_statistics(hidden, weight, labels, **asked)
    for name in ("logprobs", "entropy", "lse", "collision", "mean_logit", "top_logprobs"):
        a, b = getattr(ours, name).double().cpu(), getattr(exact, name)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-6)
    logp = (h.detach() @ w.detach().T / 3.0).log_softmax(-1)
    at_ids = logp.gather(-1, ours.top_ids.cpu()).masked_fill((labels.cpu() == -100)[:, None], 0)
    torch.testing.assert_close(at_ids, exact.top_logprobs, atol=2e-5, rtol=2e-6)
    leaves = [(hidden, h), (weight, w)] if trained else [(hidden, h)]
    for count in (2, 3):
        got = torch.autograd.grad(
            sum(ours[:count]).sum(), [a for a, _ in leaves], retain_graph=True
        )
        true = torch.autograd.grad(
            sum(exact[:count]).sum(), [b for _, b in leaves], retain_graph=True
        )
        for a, b in zip(got, true, strict=True):
            # Pairs are added to what was rounded.
            assert relative(a, b) < 2 * BUDGET[dtype] or b.norm() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
def test_rounded_logits_agree(dtype, logits_dtype, trained):
    """Of products that are exact, so that every way rounds the same numbers."""
    _, _, labels = build(dtype, "cuda", 130)
    hidden = (torch.randint(-8, 9, (130, 72)) / 16).to("cuda", dtype).requires_grad_()
    weight = (torch.randint(-8, 9, (1003, 72)) / 16).to("cuda", dtype).requires_grad_(trained)
    h, w = hidden.detach().double().cpu().requires_grad_(), weight.detach().double().cpu()
    of = {"scale": 0.7, "softcap": 20.0, "logits_dtype": logits_dtype}
    exact = linear_logprobs(h, fused_rl.LMHead(w, **of), labels.cpu())
    ours = linear_logprobs(hidden, fused_rl.LMHead(weight, **of), labels)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=2e-5, rtol=2e-6)
    got, true = (torch.autograd.grad(sum(x).sum(), y)[0] for x, y in ((ours, hidden), (exact, h)))
    assert relative(got, true) < BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_pass", [True, False])
def test_adapters_on_the_head_agree(dtype, one_pass):
    hidden, weight, labels = build(dtype, "cuda", 130, trained=False)
    factors = [torch.randn(s).to("cuda", dtype) / 4 for s in ((8, 72), (1003, 8))]
    factors = [f.requires_grad_() for f in factors]
    exact = [t.detach().double().cpu().requires_grad_() for t in (hidden, *factors)]
    of = (weight.double().cpu(), None)
    advantages = torch.randn(1, 130)
    values = []
    for leaves, frozen in (((hidden, *factors), (weight, None)), (exact, of)):
        head = fused_rl.LMHead(*frozen, adapters=(Adapter(*leaves[1:], 0.5, 0.0),))
        where = labels.to(leaves[0].device)
        if one_pass:
            mask = (where != -100)[None]
            batch = TokenBatch.padded(where[None], mask, advantages.to(where.device))
            value = linear_policy_loss(leaves[0][None], head, batch, fused_rl.grpo()).loss
        else:
            value = sum(x.sum() for x in linear_logprobs(leaves[0], head, where))
        values.append(torch.autograd.grad(value, leaves))
    for a, b in zip(*values, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 2 * BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_losses_of_kept_sets_agree(dtype, entropy_coef):
    hidden, weight, labels = build(dtype, "cuda", 130)
    h, w = (t.detach().double().cpu().requires_grad_() for t in (hidden, weight))
    kept = torch.stack([labels.clamp(min=0).cpu(), (labels.clamp(min=0).cpu() + 5) % 1003], 1)
    sets, advantages = (kept.flatten(), torch.arange(131) * 2), torch.randn(1, 130)
    found = []
    for states, head in ((hidden, weight), (h, w)):
        on = states.device
        where = labels.to(on)[None]
        batch = TokenBatch.padded(where, where != -100, advantages.to(on))
        batch = batch.with_kept(*(s.to(on) for s in sets))
        loss = fused_rl.grpo(entropy_coef=entropy_coef)
        value = linear_policy_loss(states[None], head, batch, loss).loss
        found.append((value, *torch.autograd.grad(value, (states, head))))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 2 * BUDGET[dtype]
