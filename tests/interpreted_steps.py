"""Whole steps through the public functions, most with exponentials for logits, interpreted.

test_exponentials.py runs this file. The operators of a GPU take the place of those of the CPU, as
bench/interpreted.py puts them there, and the way that has no proof is turned on.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import interpreted

import fused_rl
from fused_rl import LMHead, TokenBatch, linear_logprobs, linear_policy_loss, ops
from fused_rl.kernels import configs
from fused_rl.one_pass import chunks as one_pass_chunks

TILE = configs.Config(16, 32, 16, 4, 2, False)
# The interpreter cuts off what does not fit into bfloat16, where a GPU rounds.
BUDGET = 1.5e-2
N, H, V = 48, 24, 130


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu():
    interpreted.start()
    configs.CONFIGS[0] = [TILE, TILE._replace(stores=True)]
    fused_rl.trust_kernels(unproven=True)
    place = interpreted.device()._replace(trusts=lambda config, call: True)
    interpreted.device = lambda: place


@pytest.fixture
def stored(monkeypatch):
    """linear_logprobs keeps exponentials, as on a GPU where those of all tokens fit."""
    monkeypatch.setattr(ops, "fits_in_half", lambda *_: True)


def case(trained=True, bias=False, softcap=None, masked=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, H).bfloat16().requires_grad_()
    weight = torch.randn(V, H).bfloat16().requires_grad_(trained)
    bias = torch.randn(V).requires_grad_(trained) if bias else None
    labels = torch.randint(0, V, (N,))
    if masked:
        labels[torch.rand(N) < 0.3] = -100
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return hidden, LMHead(weight, bias, scale=0.8, softcap=softcap), labels, leaves


def in_float64(hidden, head, labels):
    weight, bias = (None if t is None else t.detach().double() for t in (head.weight, head.bias))
    for t in (weight, bias):
        if t is not None:
            t.requires_grad_(head.weight.requires_grad)
    hidden = hidden.detach().double().requires_grad_()
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return hidden, LMHead(weight, bias, scale=0.8, softcap=head.softcap), labels, leaves


def gradients(case, objective):
    hidden, head, labels, leaves = case
    stats = linear_logprobs(hidden, head, labels, temperature=1.3)
    return stats, torch.autograd.grad(objective(stats), leaves)


OBJECTIVES = {
    "log-probs": lambda s: (s.logprobs * torch.linspace(-1, 1, N)).sum(),
    "entropy too": lambda s: (s.logprobs * torch.linspace(-1, 1, N)).sum() + s.entropy[::3].sum(),
    "a few": lambda s: s.logprobs[:5].sum(),
    "none": lambda s: (s.logprobs * 0.0).sum(),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"bias": True, "softcap": 6.0}], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_any_loss(objective, head, trained, stored):
    ours = case(trained, **head)
    stats, found = gradients(ours, OBJECTIVES[objective])
    exact_stats, exact = gradients(in_float64(*ours[:3]), OBJECTIVES[objective])
    for a, b in zip(stats, exact_stats, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-6)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= BUDGET * b.norm()


def test_the_backward_pass_forms_no_logits_again(stored):
    names = ("linear_exponentials", "exponentials_gradients", "linear_logprobs", "logprobs")
    modules = (importlib.import_module(f"fused_rl.kernels.{name}") for name in names)
    launches = interpreted.Launches(*modules)
    gradients(case(), OBJECTIVES["entropy too"])
    ran = {name.split(".")[1] for name, times in launches.count.items() if times}
    assert ran == {
        "_reference_kernel",
        "_linear_exponentials_kernel",
        "_again_kernel",
        "_sums_kernel",
        "_factor_kernel",
    }


def test_rows_that_are_picked_out_lie_as_far_apart_as_they_did(stored, monkeypatch):
    """So that products read whole lines of them; and what belongs to them lies close."""
    from fused_rl.kernels import exponentials_gradients

    seen, own = [], exponentials_gradients.bwd

    def bwd(upstream, e, hidden, weight, transform, known, *rest):
        seen.append((len(e), e.stride(), [t.stride() for t in (*upstream, *known)]))
        return own(upstream, e, hidden, weight, transform, known, *rest)

    monkeypatch.setattr(exponentials_gradients, "bwd", bwd)
    gradients(case(), OBJECTIVES["a few"])
    ((count, stride, others),) = seen
    assert 0 < count <= 5 and stride == (192, 1) and set(others) == {(1,)}


def test_a_retained_graph_gives_the_same_again(stored):
    for objective in ("log-probs", "entropy too"):
        hidden, head, labels, leaves = case()
        value = OBJECTIVES[objective](linear_logprobs(hidden, head, labels))
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(value, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk_bytes", [None, 16 * 192 * 2])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("trained", [True, False])
def test_a_policy_loss_in_one_pass(chunk_bytes, entropy_coef, trained, monkeypatch):
    monkeypatch.setattr(ops, "one_pass_pays", lambda *_: True)

    def run(hidden, head, labels, leaves):
        shape = (8, 6)
        mask = (labels != -100).reshape(shape)
        batch = TokenBatch.padded(labels.reshape(shape), mask, torch.linspace(-1, 1, 8))
        loss = fused_rl.grpo(entropy_coef=entropy_coef)
        shaped = hidden.reshape(*shape, H)
        output = linear_policy_loss(shaped, head, batch, loss, chunk_bytes=chunk_bytes)
        return output.loss, *torch.autograd.grad(output.loss, leaves)

    ours = case(trained, bias=True)
    found, exact = run(*ours), run(*in_float64(*ours[:3]))
    torch.testing.assert_close(found[0].double(), exact[0].double(), atol=2e-5, rtol=2e-6)
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() <= BUDGET * b.norm()


def other_side():
    """A teacher's hidden states and head, of another hidden size, in float32."""
    torch.manual_seed(1)
    return torch.randn(N, 40) / 40**0.5, LMHead(torch.randn(V, 40), torch.randn(V), scale=0.9)


def double(hidden, head):
    return hidden.double(), LMHead(head.weight.double(), head.bias.double(), scale=0.9)


@pytest.mark.parametrize("objective", ["all", "divergence"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_divergence_and_any_loss(trained, objective):
    """In two passes; with a frozen head in one, and in three chunks."""

    def run(hidden, head, labels, leaves, teacher):
        options = {"divergence": fused_rl.Divergence.JSD(0.3), "temperature": 1.3}
        options["chunk_bytes"] = 16 * V * 8
        stats = fused_rl.linear_divergence(hidden, head, *teacher, labels, **options)
        value = (stats.divergence * torch.linspace(-1, 1, N)).sum()
        if objective == "all":
            value = value + stats.logprobs[::2].sum() + stats.entropy[::3].sum()
        return stats, torch.autograd.grad(value, leaves)

    ours, teacher = case(trained, bias=True), other_side()
    (stats, found), (exact_stats, exact) = (
        run(*ours, teacher),
        run(*in_float64(*ours[:3]), double(*teacher)),
    )
    for a, b in zip(stats, exact_stats, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= BUDGET * b.norm()


@pytest.mark.parametrize("trained", [True, False])
def test_a_policy_loss_beside_a_reference(trained, monkeypatch):
    """In one pass, in chunks."""
    monkeypatch.setattr(ops, "one_pass_pays", lambda *_: True)

    def run(hidden, head, labels, leaves, reference):
        shape = (8, 6)
        mask = (labels != -100).reshape(shape)
        batch = TokenBatch.padded(labels.reshape(shape), mask, torch.linspace(-1, 1, 8))
        loss = fused_rl.grpo(beta=0.2, kl=fused_rl.Divergence.REVERSE)
        shaped = hidden.reshape(*shape, H)
        beside = (reference[0].reshape(*shape, 40), reference[1])
        options = {"reference": beside, "chunk_bytes": 16 * V * 8}
        output = linear_policy_loss(shaped, head, batch, loss, **options)
        return output.loss, *torch.autograd.grad(output.loss, leaves)

    ours, reference = case(trained, bias=True), other_side()
    found = run(*ours, reference)
    exact = run(*in_float64(*ours[:3]), double(*reference))
    torch.testing.assert_close(found[0].double(), exact[0].double(), atol=2e-5, rtol=2e-6)
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() <= BUDGET * b.norm()


@pytest.fixture
def waits(monkeypatch):
    """Counts what would wait for a GPU: sizes and numbers that the host asks for."""
    asked = []

    def noted(name, when=lambda *_: True):
        asks = getattr(torch.Tensor, name)

        def run(*args, **options):
            if when(*args):
                asked.append(name)
            return asks(*args, **options)

        monkeypatch.setattr(torch.Tensor, name, run)

    for name in ("nonzero", "item", "tolist", "__bool__", "__float__", "__int__", "masked_select"):
        noted(name)
    for name in ("__getitem__", "__setitem__"):
        noted(name, lambda _, at, *rest: isinstance(at, torch.Tensor) and at.dtype == torch.bool)
    return asked


def loss_of(hidden, head, labels, chunk_bytes=None):
    shape = (8, 6)
    mask = (labels != -100).reshape(shape)
    batch = TokenBatch.padded(labels.reshape(shape), mask, torch.linspace(-1, 1, 8))
    shaped = hidden.reshape(*shape, H)
    return lambda: (
        linear_policy_loss(shaped, head, batch, fused_rl.grpo(), chunk_bytes=chunk_bytes).loss
    )


CHUNK_BYTES = 12 * 192 * 2
# name -> (trained, value, waits of the forward pass, waits of the backward pass).
WAITS = {
    "log-probs": (True, lambda *c: lambda: linear_logprobs(*c).logprobs.sum(), 1, 1),
    "log-probs, frozen": (False, lambda *c: lambda: linear_logprobs(*c).logprobs.sum(), 1, 0),
    "entropy, frozen": (False, lambda *c: lambda: linear_logprobs(*c).entropy.sum(), 1, 1),
    "loss": (True, loss_of, 2, 0),
    "loss, frozen": (False, loss_of, 2, 0),
    # Each of its chunks leaves out the tokens without a gradient.
    "loss, in chunks": (True, lambda *c: loss_of(*c, CHUNK_BYTES), None, 0),
}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize("exponentials", [True, False])
def test_how_often_a_step_waits_for_the_device(name, exponentials, waits, monkeypatch):
    """On a CPU the labels are looked at, and a loss is compared with 1: not counted."""
    monkeypatch.setattr(ops, "fits_in_half", lambda *_: exponentials)
    for module in (ops, ops.frozen):
        monkeypatch.setattr(module, "check_tokens", lambda *_: None)
    monkeypatch.setattr(one_pass_chunks, "scale_", lambda *_: None)
    monkeypatch.setattr(ops, "one_pass_pays", lambda *_: True)
    trained, made, forward, backward = WAITS[name]
    hidden, head, labels, leaves = case(trained)
    value = made(hidden, head, labels)
    waits.clear()
    result = value()
    in_forward = len(waits)
    torch.autograd.grad(result, leaves)
    in_backward = len(waits) - in_forward
    if forward is None:
        counted = (labels != -100).sum().item()
        most = ops.chunk_tokens(hidden, head.weight, CHUNK_BYTES)
        chunks = len(ops.chunk_sizes(counted, most))
        assert chunks > 2
        forward = 1 + chunks
    assert (in_forward, in_backward) == (forward, backward), waits
