"""Derivatives of other kinds than backward(): torch.func and vmap are right, what we have not
got raises, and nothing is ever a tangent of 0."""

import math
from dataclasses import replace

import pytest
import torch
from by_name import loss_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fused_rl import (
    KL,
    KLPenalty,
    TokenBatch,
    TokenStats,
    kl_penalty,
    linear_divergence,
    linear_kept_logprobs,
    linear_logprobs,
    linear_logprobs_at,
    linear_policy_loss,
    linear_statistics,
    linear_top_logprobs,
    logprobs_from_logits,
)
from fused_rl.linear import Statistic, linear_logits_at
from fused_rl.losses import named

B, N, H, V = 3, 4, 5, 7

# Of torch's own: vmap of an operator is a loop.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).log_softmax(-1)
    logprobs = logits.gather(-1, labels[..., None])[..., 0]
    return (logprobs * -(logits.exp() * logits).sum(-1)).sum()


def product(stats: tuple[Tensor, ...]) -> Tensor:
    return (stats[0] * stats[1]).sum()


def linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return product(linear_logprobs(hidden, weight, labels))


def top(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return product(linear_top_logprobs(hidden, weight, labels))


def filtered(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return product(linear_logprobs(hidden, weight, labels, grad_filter=1e-300))


def kept(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Every entry is kept, so that kept_logprobs are the log-probs."""
    entries = torch.arange(V).repeat(labels.numel())
    cu_kept = torch.arange(labels.numel() + 1) * V
    stats = linear_kept_logprobs(hidden, weight, labels, entries, cu_kept)
    return (stats.kept_logprobs * stats.entropy).sum()


def at(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Beside an id that is ignored; lse comes in and goes out."""
    ids = torch.stack([labels, torch.full_like(labels, -100)], -1)
    stats = linear_logprobs_at(hidden, weight, ids)
    logit = stats.logprobs[..., 0] + stats.lse
    return ((logit - stats.lse) * stats.entropy).sum()


def logits_at(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """At every entry, the label's first: a softmax over them is the whole one."""
    logits = linear_logits_at(hidden, weight, (labels[..., None] + torch.arange(V)) % V)
    logp = logits.log_softmax(-1)
    return (logp[..., 0] * -(logp.exp() * logp).sum(-1)).sum()


def statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """lse comes in and goes out."""
    stats = linear_statistics(hidden, weight, labels, Statistic.COLLISION, top=2)
    return ((stats.logprobs + stats.lse - stats.lse) * stats.entropy).sum()


def from_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return product(logprobs_from_logits(hidden @ weight.T, labels))


def far(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """From a teacher that gives every entry the same probability: log V - entropy."""
    none = torch.zeros_like(weight.detach())
    stats = linear_divergence(hidden, weight, hidden.detach(), none, labels)
    return (stats.logprobs * (math.log(len(weight)) - stats.divergence)).sum()


SCORES = {
    "linear_divergence": far,
    "linear_logprobs": linear,
    "linear_top_logprobs": top,
    "linear_logprobs, filtered": filtered,
    "linear_kept_logprobs": kept,
    "linear_logprobs_at": at,
    "linear_logits_at": logits_at,
    "linear_statistics": statistics,
    "logprobs_from_logits": from_logits,
}
every_score = pytest.mark.parametrize("name", SCORES)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, N, H], weights [B, V, H], labels [B, N], in float64."""
    hidden, weights = torch.randn(B, N, H).double(), torch.randn(B, V, H).double()
    return hidden, weights, torch.randint(V, (B, N))


def assert_equal(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@every_score
def test_grad_vjp_and_jacrev(name):
    score = SCORES[name]
    (hidden, weights, labels), both = drawn(), (0, 1)
    case = (hidden[0], weights[0], labels[0])
    expected = grad(plain, both)(*case)
    assert_equal(grad(score, both)(*case), expected)
    assert_equal(jacrev(score, both)(*case), expected)
    value, pull = vjp(lambda h, w: score(h, w, labels[0]), *case[:2])
    assert_equal((value, *pull(torch.ones(()).double())), (plain(*case), *expected))
    assert_equal(grad(score, 1)(*case), expected[1])


def test_a_jacobian_of_batched_gradients():
    hidden, weights, labels = drawn()

    def ours(h: Tensor) -> Tensor:
        return linear_logprobs(h, weights[0], labels[0]).logprobs

    def exact(h: Tensor) -> Tensor:
        return (h @ weights[0].T).log_softmax(-1).gather(-1, labels[0][:, None])[:, 0]

    expected = jacrev(exact)(hidden[0])
    assert_equal(jacrev(ours)(hidden[0]), expected)
    assert_equal(torch.autograd.functional.jacobian(ours, hidden[0], vectorize=True), expected)
    with pytest.raises(NotImplementedError, match="linear_logprobs has no second derivative"):
        torch.autograd.functional.jvp(ours, hidden[0], hidden[0])


@every_score
@pytest.mark.parametrize("dims", [(0, None, 0), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_of_grad_and_grad_of_vmap(name, dims):
    """Per-sample gradients; and gradients of what is shared between samples."""
    given = [t if d == 0 else t[0] for t, d in zip(drawn(), dims, strict=True)]

    def whole(score, hidden: Tensor, weight: Tensor) -> Tensor:
        return vmap(score, dims)(hidden, weight, given[2]).sum()

    score, both = SCORES[name], (0, 1)
    assert_equal(vmap(grad(score, both), dims)(*given), vmap(grad(plain, both), dims)(*given))
    expected = grad(lambda h, w: whole(plain, h, w), both)(*given[:2])
    assert_equal(grad(lambda h, w: whole(score, h, w), both)(*given[:2]), expected)
    leaves = [t.clone().requires_grad_() for t in given[:2]]
    assert_equal(torch.autograd.grad(whole(score, *leaves), leaves), expected)


@every_score
@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "weight"])
def test_a_tangent_raises(name, which):
    """torch.library would take the operator for a constant: a tangent of 0."""
    hidden, weights, labels = drawn()
    case = [hidden[0], weights[0], labels[0]]

    def along(t: Tensor) -> Tensor:
        return SCORES[name](*case[:which], t, *case[which + 1 :])

    at = case[which]

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return along(forward_ad.make_dual(at, at))

    expected = name.split(",")[0].replace("_top", "")
    for read in (
        dual,
        lambda: jvp(along, (at,), (at,)),
        lambda: jacfwd(along)(at),
        lambda: jvp(grad(along), (at,), (at,)),
        lambda: hessian(along)(at),
        lambda: vmap(lambda v: jvp(along, (at,), (v,)))(torch.stack([at, at])),
        lambda: grad(lambda t: jvp(along, (t,), (t,))[1])(at),
        lambda: jvp(vmap(along), (torch.stack([at, at]),), (torch.stack([at, at]),)),
        lambda: jacfwd(vmap(along))(torch.stack([at, at])),
    ):
        with pytest.raises(NotImplementedError, match=f"{expected} has no forward-mode"):
            read()


def test_without_a_tangent_forward_mode_disturbs_nothing():
    hidden, weights, labels = drawn()
    leaf = hidden[0].clone().requires_grad_()
    with forward_ad.dual_level():
        value = linear(leaf, weights[0], labels[0])
        (gradient,) = torch.autograd.grad(value, leaf)
    assert_equal(
        (value, gradient),
        (plain(leaf, weights[0], labels[0]), grad(plain)(leaf, weights[0], labels[0])),
    )


@every_score
def test_second_derivatives_raise(name):
    hidden, weights, labels = drawn()
    case, score = (hidden[0], weights[0], labels[0]), SCORES[name]
    expected = f"{name.split(',')[0].replace('_top', '')} has no second derivative"
    with pytest.raises(NotImplementedError, match=expected):
        grad(lambda h: grad(score)(h, *case[1:]).sum())(case[0])
    leaf = case[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(score(leaf, *case[1:]), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=expected):
        first.square().sum().backward()
    with forward_ad.dual_level():
        one = torch.ones((), dtype=torch.float64)
        with pytest.raises(NotImplementedError, match=expected):
            torch.autograd.grad(score(leaf, *case[1:]), leaf, forward_ad.make_dual(one, one))


@pytest.mark.parametrize("value", KL, ids=lambda kl: kl.name)
def test_kl_penalty(value):
    logprobs, ref = -torch.rand(2, B, N).double()
    k = {
        KL.K1: lambda d: d,
        KL.K2: lambda d: d * d / 2,
        KL.K3: lambda d: torch.expm1(-d) + d,
        KL.ABS: lambda d: d.abs(),
    }[value]

    def ours(p: Tensor, q: Tensor) -> Tensor:
        return kl_penalty(p, q, value=value).sum()

    def exact(p: Tensor, q: Tensor) -> Tensor:
        return k(p - q).sum()

    assert_equal(grad(ours, (0, 1))(logprobs, ref), grad(exact, (0, 1))(logprobs, ref))
    assert_equal(vmap(grad(ours))(logprobs, ref), vmap(grad(exact))(logprobs, ref))

    def whole(score, q: Tensor) -> Tensor:
        return vmap(score)(logprobs, q).sum()

    assert_equal(grad(lambda q: whole(ours, q))(ref), grad(lambda q: whole(exact, q))(ref))
    for which in (0, 1):
        with pytest.raises(NotImplementedError, match="kl_penalty has no forward-mode"):
            jacfwd(ours, which)(logprobs, ref)


@pytest.mark.parametrize("batched", [False, True], ids=["grad", "grad of vmap"])
def test_temperatures_have_no_derivative_and_say_so(batched):
    hidden, weights, labels = drawn()

    def value(h: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return linear_logprobs(h, weights[0], y, temperature=t).logprobs.sum()

    def whole(t: Tensor) -> Tensor:
        return vmap(value)(hidden, labels, t).sum() if batched else value(hidden, labels, t)

    temperature = torch.ones(B, N).double()
    with pytest.raises((ValueError, NotImplementedError), match="temperature gets no gradient"):
        grad(whole)(temperature)
    with pytest.raises(NotImplementedError, match="linear_logprobs has no forward-mode"):
        jvp(whole, (temperature,), (temperature,))


def batch_of(labels: Tensor, advantages: Tensor, old: Tensor) -> TokenBatch:
    mask = torch.ones_like(labels, dtype=torch.bool)
    return TokenBatch.padded(labels, mask, advantages, old_logprobs=old, ref_logprobs=old - 0.1)


@pytest.mark.parametrize("name", named.NAMES)
def test_policy_losses(name):
    loss = loss_of(name, beta=0.1, entropy_coef=0.01)
    hidden, weights, labels = drawn()
    advantages = torch.randn(B).double()
    batch = batch_of(labels, advantages, linear_logprobs(hidden, weights[0], labels).logprobs + 0.1)

    def value(h: Tensor, w: Tensor) -> Tensor:
        return linear_policy_loss(h, w, batch, loss).loss

    leaves = [hidden.clone().requires_grad_(), weights[0].clone().requires_grad_()]
    expected = torch.autograd.grad(value(*leaves), leaves)
    assert_equal(grad(value, (0, 1))(hidden, weights[0]), expected)
    with pytest.raises(NotImplementedError, match="linear_logprobs has no forward-mode"):
        jvp(value, (hidden, weights[0]), (hidden, weights[0]))


def test_gradients_of_a_policy_loss_per_sequence():
    """vmap(grad) with the batch made inside: one sequence after another."""
    hidden, weights, labels = drawn()
    old, advantages = -2 + torch.rand(B, N).double() / 10, torch.randn(B).double()
    loss = named.grpo(beta=0.1)

    def value(h: Tensor, y: Tensor, a: Tensor, o: Tensor) -> Tensor:
        batch = batch_of(y[None], a[None], o[None])
        return linear_policy_loss(h[None], weights[0], batch, loss).loss

    args = (hidden, labels, advantages, old)
    one_by_one = torch.stack([grad(value)(*(t[i] for t in args)) for i in range(B)])
    assert_equal(vmap(grad(value))(*args), one_by_one)


def test_a_policy_loss_of_dual_stats():
    """Its own formulas are plain torch and have tangents; the estimator of the KL has none."""
    old = -torch.rand(B, N).double()
    logprobs, entropy, step = old + 0.1, torch.rand(B, N).double(), torch.randn(B, N).double()
    batch = batch_of(torch.zeros(B, N).long(), torch.randn(B).double(), old)
    without = replace(batch, ref_logprobs=None)

    def value(loss, p: Tensor) -> Tensor:
        return loss(TokenStats(p, entropy), without if loss is plain_loss else batch).loss

    plain_loss, pulled = named.grpo(), named.grpo(beta=0.1)
    tangent = jvp(lambda p: value(plain_loss, p), (logprobs,), (step,))[1]
    assert_equal(tangent, (grad(lambda p: value(plain_loss, p))(logprobs) * step).sum())
    with pytest.raises(NotImplementedError, match="kl_penalty has no forward-mode"):
        jvp(lambda p: value(pulled, p), (logprobs,), (step,))
    with pytest.raises(NotImplementedError, match="kl_penalty has no forward-mode"):
        jvp(lambda p: KLPenalty(0.1)(p.reshape(-1), batch), (logprobs,), (step,))


def test_compiled_code_has_no_tangent_of_zero():
    hidden, weights, labels = drawn()
    torch._dynamo.reset()

    def pushed(h: Tensor) -> Tensor:
        return jvp(lambda t: linear(t, weights[0], labels[0]), (h,), (h,))[1]

    with pytest.raises(Exception, match="forward-mode"):
        torch.compile(pushed, fullgraph=True, backend="aot_eager")(hidden[0])


def test_compiled_vmap():
    hidden, weights, labels = drawn()
    torch._dynamo.reset()

    def scores(h: Tensor) -> Tensor:
        return vmap(linear, (0, None, 0))(h, weights[0], labels)

    expected = vmap(plain, (0, None, 0))(hidden, weights[0], labels)
    assert_equal(torch.compile(scores, fullgraph=True, backend="aot_eager")(hidden), expected)
