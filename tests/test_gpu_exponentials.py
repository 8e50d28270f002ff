"""Exponentials in the place of logits on a CUDA device; skipped where there is none."""

import warnings

import decisions
import pytest
import torch

import fused_rl
from fused_rl import LMHead, TokenBatch, linear_logprobs, linear_policy_loss, ops
from fused_rl.kernels import configs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUDGET = 6e-3


@pytest.fixture(autouse=True)
def wherever_there_is_a_kernel():
    """And not only where a result has shown it to be faster."""
    fused_rl.trust_kernels(unproven=True)
    yield
    fused_rl.trust_kernels()


def logits_in_their_place(monkeypatch):
    own = configs.chosen

    def chosen(call, device, *, stores=False):
        return None if stores else own(call, device)

    monkeypatch.setattr(configs, "chosen", chosen)


def build(N=300, H=72, V=5003, *, trained=True, bias=False, softcap=None, far=False):
    torch.manual_seed(0)
    hidden = torch.randn(N, H)
    weight = torch.randn(V, H) / 4
    labels = torch.randint(0, V, (N,))
    if far:
        # The largest logit is neither the label's nor in the first block, and far above both.
        hidden[::50, 0], weight[:, 0] = 60.0, 0
        weight[4000, 0] = 1.0
        labels[::50] = 7
    hidden = hidden.bfloat16().cuda().requires_grad_()
    weight = weight.bfloat16().cuda().requires_grad_(trained)
    bias = torch.randn(V).cuda().requires_grad_(trained) if bias else None
    labels = labels.where(torch.rand(N) < 0.8, -100).cuda()
    return hidden, LMHead(weight, bias, softcap=softcap), labels


def on_cpu(hidden, head, labels):
    weight, bias = (
        None if t is None else t.detach().double().cpu() for t in (head.weight, head.bias)
    )
    trained = head.weight.requires_grad
    weight.requires_grad_(trained)
    bias = None if bias is None else bias.requires_grad_(trained)
    hidden = hidden.detach().double().cpu().requires_grad_()
    return hidden, LMHead(weight, bias, softcap=head.softcap), labels.cpu()


def leaves(hidden, head, _):
    found = (hidden, head.weight, head.bias)
    return [t for t in found if t is not None and t.requires_grad]


def relative(ours, exact):
    return ((ours.double().cpu() - exact).norm() / exact.norm()).item()


OBJECTIVES = {
    "log-probs": lambda s: s.logprobs.sum(),
    "entropy too": lambda s: s.logprobs.sum() + s.entropy[::3].sum(),
    "a few": lambda s: s.logprobs[:50].sum(),
}
HEADS = [{}, {"bias": True}, {"bias": True, "softcap": 6.0}, {"far": True}]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_any_loss_agrees_with_float64(objective, options, trained):
    case = build(trained=trained, **options)
    exact_case = on_cpu(*case)
    stats, exact = linear_logprobs(*case), linear_logprobs(*exact_case)
    for a, b in zip(stats, exact, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=3e-5, rtol=2e-6)
    found = torch.autograd.grad(OBJECTIVES[objective](stats), leaves(*case))
    true = torch.autograd.grad(OBJECTIVES[objective](exact), leaves(*exact_case))
    for a, b in zip(found, true, strict=True):
        assert relative(a, b) < BUDGET
    assert not [v for v in ops.trust.verdicts() if v.error]
    ran = {v.kernel for v in ops.trust.verdicts()}
    assert any("stores" in name for name in ran)
    assert ("linear_logprobs_stored" in ran) == trained


def policy_loss(case, **options):
    hidden, head, labels = case
    shape = (10, 30)
    mask = (labels != -100).reshape(shape)
    advantages = torch.linspace(-1, 1, 10, device=labels.device)
    batch = TokenBatch.padded(labels.reshape(shape), mask, advantages)
    loss = fused_rl.grpo(entropy_coef=0.01)
    return linear_policy_loss(hidden.reshape(*shape, -1), head, batch, loss, **options).loss


@pytest.mark.parametrize("chunk_bytes", [None, 100 * 5056 * 2])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_the_one_pass_agrees_with_float64(chunk_bytes, options, monkeypatch):
    monkeypatch.setattr(ops, "one_pass_pays", lambda *_: True)
    case = build(**options)
    exact_case = on_cpu(*case)
    value, exact = policy_loss(case, chunk_bytes=chunk_bytes), policy_loss(exact_case)
    torch.testing.assert_close(value.double().cpu(), exact, atol=2e-5, rtol=2e-6)
    found = torch.autograd.grad(value, leaves(*case))
    for a, b in zip(found, torch.autograd.grad(exact, leaves(*exact_case)), strict=True):
        assert relative(a, b) < BUDGET


def test_same_bits_from_run_to_run():
    runs = []
    for _ in range(2):
        case = build(bias=True)
        stats = linear_logprobs(*case)
        runs.append([*stats, *torch.autograd.grad(OBJECTIVES["entropy too"](stats), leaves(*case))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_nan_row_reaches_nothing_without_a_gradient():
    hidden, head, labels = build()
    row = int((labels != -100).nonzero()[3])
    with torch.no_grad():
        hidden[row] = torch.nan
    stats = linear_logprobs(hidden, head, labels)
    assert stats.logprobs[row].isnan() and stats.logprobs.isnan().sum() == 1
    weights = torch.ones(300, device="cuda")
    weights[row] = 0
    upstream = weights, torch.zeros_like(weights)
    grads = torch.autograd.grad(tuple(stats), leaves(hidden, head, labels), upstream)
    assert all(g.isfinite().all() for g in grads)


def waits(run):
    """How often it waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return result, sum("synchroniz" in str(w.message) for w in said)


@pytest.mark.parametrize("exponentials", [True, False])
@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [("log-probs", 1, 1), ("log-probs, frozen", 1, 0), ("loss", 2, 0), ("loss, frozen", 2, 0)],
)
def test_how_often_a_step_waits(exponentials, kind, forward, backward, monkeypatch):
    """As interpreted_steps.py counts it."""
    if not exponentials:
        logits_in_their_place(monkeypatch)
    case = build(trained="frozen" not in kind)
    hidden, head, labels = case
    shape = (10, 30)
    mask = (labels != -100).reshape(shape)
    batch = TokenBatch.padded(labels.reshape(shape), mask, torch.linspace(-1, 1, 10).cuda())
    shaped = hidden.reshape(*shape, -1)

    def loss():
        return linear_policy_loss(shaped, head, batch, fused_rl.grpo()).loss

    def logprobs():
        return linear_logprobs(*case).logprobs.sum()

    run = loss if "loss" in kind else logprobs
    # The first use compares and compiles.
    torch.autograd.grad(run(), leaves(*case))
    value, in_forward = waits(run)
    _, in_backward = waits(lambda: torch.autograd.grad(value, leaves(*case)))
    assert (in_forward, in_backward) == (forward, backward)


@pytest.mark.parametrize("exponentials", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("objective", ["log-probs", "entropy too"])
def test_a_step_can_be_captured_in_a_graph(exponentials, trained, objective, monkeypatch):
    """Masked tokens included; replayed on other numbers it is the eager step."""
    if not exponentials:
        logits_in_their_place(monkeypatch)
    case = build(trained=trained)

    def step():
        stats = linear_logprobs(*case)
        return *stats, *torch.autograd.grad(OBJECTIVES[objective](stats), leaves(*case))

    replay = decisions.captured(step)
    with torch.no_grad():
        case[0].mul_(0.5)
    for found, expected in zip(replay(), step(), strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 2e-3
