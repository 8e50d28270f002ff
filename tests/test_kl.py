"""kl_penalty: the estimators by hand, by expectation over a vocabulary, and at the edges."""

import itertools

import pytest
import torch

import fused_rl
from fused_rl import KL, kl_penalty, reference

KINDS = list(KL)


def categorical(seed: int, vocabulary: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        (KL.K1, 0.5, 1.0),
        (KL.K2, 0.125, 0.5),
        (KL.K3, 0.1065306597, 0.3934693403),
        (KL.ABS, 0.5, 1.0),
    ],
)
def test_values_and_slopes_by_hand_at_half_a_nat(kind, value, slope):
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-1.5], dtype=torch.float64), value=kind)
    penalty.backward()
    assert penalty.item() == pytest.approx(value, abs=1e-9)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-9)


def test_expected_values_k1_and_k3_are_the_kl_and_k2_is_not():
    policy, ref = categorical(0).log_softmax(-1), categorical(1).log_softmax(-1)
    p = policy.exp()
    exact = (p * (policy - ref)).sum().item()
    mean = {k: (p * kl_penalty(policy, ref, value=k)).sum().item() for k in KINDS}
    assert mean[KL.K1] == pytest.approx(exact, abs=1e-14)
    assert mean[KL.K3] == pytest.approx(exact, abs=1e-14)
    assert mean[KL.K2] != pytest.approx(exact, rel=0.01)


def expected_gradient(logits, ref, weights, **options) -> torch.Tensor:
    """The gradient of the penalty as a loss, averaged over tokens drawn with `weights`."""
    leaf = logits.clone().requires_grad_()
    penalty = kl_penalty(leaf.log_softmax(-1), ref, **options)
    return torch.autograd.grad((weights * penalty).sum(), leaf)[0]


def true_gradient(logits, of) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(of(leaf.log_softmax(-1)), leaf)[0]


@pytest.mark.parametrize("value", KINDS)
def test_expected_gradient_is_that_of_the_grad_estimator_whatever_the_value(value):
    logits, ref = categorical(0), categorical(1).log_softmax(-1)
    p = logits.softmax(-1)
    reverse = true_gradient(logits, lambda logp: (logp.exp() * (logp - ref)).sum())
    forward = true_gradient(logits, lambda logp: (ref.exp() * (ref - logp)).sum())

    def gradient(grad):
        return expected_gradient(logits, ref, p, value=value, grad=grad)

    torch.testing.assert_close(gradient(KL.K1), torch.zeros_like(logits), atol=1e-15, rtol=0)
    torch.testing.assert_close(gradient(KL.K2), reverse, atol=1e-15, rtol=1e-13)
    torch.testing.assert_close(gradient(KL.K3), forward, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("value", [KL.K1, KL.K3])
def test_off_policy_attached_importance_weight_gives_the_reverse_kl(value):
    logits, ref = categorical(0), categorical(1).log_softmax(-1)
    old = categorical(2).log_softmax(-1)
    reverse = true_gradient(logits, lambda logp: (logp.exp() * (logp - ref)).sum())
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    penalty = kl_penalty(logp, ref, value=value, weight=(logp - old).exp())
    (got,) = torch.autograd.grad((old.exp() * penalty).sum(), leaf)
    torch.testing.assert_close(got, reverse, atol=1e-15, rtol=1e-13)


def test_off_policy_detached_importance_weight_with_k2_gives_the_reverse_kl():
    logits, ref = categorical(0), categorical(1).log_softmax(-1)
    old = categorical(2).log_softmax(-1)
    reverse = true_gradient(logits, lambda logp: (logp.exp() * (logp - ref)).sum())
    weight = (logits.log_softmax(-1) - old).exp()
    got = expected_gradient(logits, ref, old.exp(), value=KL.K2, weight=weight)
    torch.testing.assert_close(got, reverse, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_where_the_gradient_is_the_derivative_of_the_value(kind, weighted):
    generator = torch.Generator().manual_seed(3)
    p, q, w = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    p, q, w = (t.requires_grad_() for t in (p, q, w))

    def call(p, q, w):
        return kl_penalty(p, q, value=kind, weight=w if weighted else None)

    assert torch.autograd.gradcheck(call, (p, q, w))


@pytest.mark.parametrize(("value", "grad"), list(itertools.product(KINDS, KINDS)))
def test_each_value_with_each_gradient(value, grad):
    d = torch.linspace(-3, 3, 61)
    logprobs = d.clone().requires_grad_()
    penalty = kl_penalty(logprobs, torch.zeros_like(d), value=value, grad=grad)
    (slope,) = torch.autograd.grad(penalty.sum(), logprobs)
    exact = d.double()
    torch.testing.assert_close(
        penalty.detach().double(), reference.kl(exact, value.value), atol=1e-7, rtol=1e-6
    )
    torch.testing.assert_close(
        slope.double(), reference.kl_slope(exact, grad.value), atol=1e-7, rtol=1e-6
    )


def test_reference_slopes_are_the_derivatives_of_the_reference_values():
    d = torch.linspace(-3, 3, 60, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        (slope,) = torch.autograd.grad(reference.kl(d, kind.value).sum(), d)
        torch.testing.assert_close(slope, reference.kl_slope(d.detach(), kind.value))


def test_k3_is_never_negative_and_does_not_cancel_near_zero():
    d = torch.cat([torch.logspace(-7, 0, 200), -torch.logspace(-7, 0, 200), torch.zeros(1)])
    k3 = kl_penalty(d, torch.zeros_like(d))
    assert (k3 >= 0).all()
    assert k3[-1] == 0
    # At 1e-4 the field's exp(x) - x - 1 is 0 or negative in float32; the truth is 5e-9.
    small = torch.tensor([1e-4, -1e-4, 1e-3, -1e-3])
    exact = reference.kl(small.double(), reference.K3)
    got = kl_penalty(small, torch.zeros(4)).double()
    assert ((got - exact).abs() <= 0.01 * exact).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_of_two_hundred_nats_stays_finite_and_keeps_its_gradient(kind):
    for gap in (200.0, -200.0):
        logprobs = torch.tensor([gap], requires_grad=True)
        penalty = kl_penalty(logprobs, torch.zeros(1), value=kind)
        penalty.backward()
        assert penalty.isfinite().all()
        assert logprobs.grad.isfinite().all()
        assert logprobs.grad.item() != 0
        assert torch.sign(logprobs.grad).item() == (1 if kind is KL.K1 else torch.sign(logprobs))


def test_nan_stays_with_its_token():
    logprobs = torch.tensor([float("nan"), -1.0])
    for kind in KINDS:
        penalty = kl_penalty(logprobs, torch.zeros(2), value=kind)
        assert penalty[0].isnan()
        assert penalty[1].isfinite()


@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (2, 3, 33)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(shape, dtype):
    torch.manual_seed(0)
    logprobs, ref = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    penalty = kl_penalty(logprobs.transpose(0, -1), ref.transpose(0, -1)).transpose(0, -1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert penalty.dtype == wide
    exact = reference.kl(logprobs.double() - ref.double(), reference.K3)
    torch.testing.assert_close(penalty.double(), exact, atol=1e-6, rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"ref_logprobs \[3\] and logprobs \[2\]"):
        kl_penalty(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"value must be a KL, got 'k3'"):
        kl_penalty(torch.zeros(2), torch.zeros(2), value="k3")
    with pytest.raises(ValueError, match=r"grad must be a KL or None, got 3"):
        kl_penalty(torch.zeros(2), torch.zeros(2), grad=3)
    with pytest.raises(ValueError, match=r"logprobs must be float16.*got torch.int64"):
        kl_penalty(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(ValueError, match=r"weight \[3\] and logprobs \[2\]"):
        kl_penalty(torch.zeros(2), torch.zeros(2), weight=torch.ones(3))


def test_the_penalty_is_one_import_away():
    assert fused_rl.KL.K3 is KL.K3
