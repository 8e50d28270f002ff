"""KLPenalty: levels, importance ratios and their gradients, by hand and against naive loops."""

import itertools
import math

import pytest
import torch

from fused_rl import KL, Divergence, KLPenalty, Level, TokenBatch, grpo

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
WEIGHED = [
    (level, importance, attached)
    for level in (Level.TOKEN, Level.PRODUCT)
    for importance in (None, *Level)
    for attached in (True, False)
    if level is Level.TOKEN or importance is not Level.TOKEN
]


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *MASK.shape, generator=generator, dtype=torch.float64).unbind()


def padded(old=None, ref=None) -> TokenBatch:
    advantages = torch.zeros(len(MASK), dtype=torch.float64)
    labels = torch.zeros(MASK.shape, dtype=torch.int64)
    return TokenBatch.padded(labels, MASK, advantages, old_logprobs=old, ref_logprobs=ref)


def estimator(d: torch.Tensor, kind: KL) -> torch.Tensor:
    return {KL.K1: d, KL.K2: d**2 / 2, KL.K3: torch.exp(-d) - 1 + d, KL.ABS: d.abs()}[kind]


def naive(logprobs, old, ref, penalty: KLPenalty) -> torch.Tensor:
    """Sequence by sequence, token by token."""
    out = torch.zeros_like(logprobs)
    for b in range(len(MASK)):
        counted = [t for t in range(MASK.shape[1]) if MASK[b, t]]
        log_ratios = [logprobs[b, t] - old[b, t] for t in counted]
        gaps = [logprobs[b, t] - ref[b, t] for t in counted]
        for i, t in enumerate(counted):
            ratio = {
                None: torch.ones((), dtype=torch.float64),
                Level.TOKEN: log_ratios[i].exp(),
                Level.PRODUCT: sum(log_ratios).exp(),
                Level.GEOMETRIC: (sum(log_ratios) / len(counted)).exp(),
            }[penalty.importance]
            ratio = ratio if penalty.attached else ratio.detach()
            k = estimator(gaps[i], penalty.value)
            if penalty.level is Level.PRODUCT:
                k = estimator(sum(gaps), penalty.value) / len(counted)
            out[b, t] = penalty.beta * ratio * k
    return out


@pytest.mark.parametrize(("level", "importance", "attached"), WEIGHED)
@pytest.mark.parametrize("kind", list(KL))
def test_every_option_against_a_loop(level, importance, attached, kind):
    logprobs, old, ref = tensors()
    penalty = KLPenalty(0.3, kind, level=level, importance=importance, attached=attached)
    weights = torch.linspace(0.5, 2.0, MASK.numel(), dtype=torch.float64)
    ours, theirs = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    got = penalty(ours.reshape(-1), padded(old, ref))
    expected = naive(theirs, old, ref, penalty).reshape(-1)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-13)
    (got @ weights).backward()
    (expected @ weights).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize(("level", "importance", "attached"), WEIGHED)
def test_padded_equals_packed(level, importance, attached):
    logprobs, old, ref = tensors()
    penalty = KLPenalty(0.3, level=level, importance=importance, attached=attached)
    packed = TokenBatch.packed(
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 3, 4, 6, 6]),
        torch.zeros(6, dtype=torch.float64),
        old_logprobs=old[MASK],
        ref_logprobs=ref[MASK],
    )
    expected = penalty(logprobs.reshape(-1), padded(old, ref))[MASK.reshape(-1)]
    torch.testing.assert_close(penalty(logprobs[MASK], packed), expected, atol=1e-15, rtol=0)


def test_sequence_level_by_hand():
    """Log-ratios 0.5 and 0.25: k2 of 0.75 is 0.28125, half of it per token."""
    batch = TokenBatch.packed(
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([0, 2]),
        torch.zeros(2, dtype=torch.float64),
        ref_logprobs=torch.tensor([-1.5, -1.25], dtype=torch.float64),
    )
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    terms = KLPenalty(2.0, KL.K2, level=Level.PRODUCT)(logprobs, batch)
    assert terms.tolist() == [0.28125, 0.28125]
    terms.sum().backward()
    assert logprobs.grad.tolist() == [1.5, 1.5]


def test_a_sequences_terms_add_up_to_its_estimate_also_when_tokens_are_dropped():
    logprobs, old, ref = tensors()
    batch = padded(old, ref).with_mask(torch.tensor([[1, 0, 1, 1]]).bool().expand(4, 4))
    for kind in KL:
        terms = KLPenalty(1.0, kind, level=Level.PRODUCT)(logprobs.reshape(-1), batch)
        gaps = (logprobs - ref).reshape(-1).where(batch.loss_mask, 0.0).reshape(4, 4).sum(-1)
        torch.testing.assert_close(batch.sequence_sum(terms), estimator(gaps, kind))


@pytest.mark.parametrize("level", [Level.TOKEN, Level.PRODUCT])
def test_without_old_logprobs_an_attached_ratio_is_one_and_still_has_a_gradient(level):
    logprobs, _, ref = tensors()
    leaf = logprobs.clone().requires_grad_()
    penalty = KLPenalty(1.0, KL.K1, level=level, importance=Level.PRODUCT)
    terms = penalty(leaf.reshape(-1), padded(None, ref))
    plain = KLPenalty(1.0, KL.K1, level=level)(logprobs.reshape(-1), padded(None, ref))
    assert torch.equal(terms, plain)
    (gradient,) = torch.autograd.grad(terms.sum(), leaf)
    totals = (logprobs - ref).where(MASK, 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, (1 + totals).expand(4, 4).where(MASK, 0.0))


def test_value_and_gradient_are_chosen_apart_at_the_sequence_level():
    logprobs, _, ref = tensors()
    leaf = logprobs.clone().requires_grad_()
    terms = KLPenalty(1.0, KL.K3, KL.K2, level=Level.PRODUCT)(leaf.reshape(-1), padded(None, ref))
    totals = (logprobs - ref).where(MASK, 0.0).sum(-1)
    torch.testing.assert_close(
        padded(None, ref).sequence_sum(terms.detach()), estimator(totals, KL.K3)
    )
    (gradient,) = torch.autograd.grad(terms.sum(), leaf)
    torch.testing.assert_close(gradient, totals[:, None].expand(4, 4).where(MASK, 0.0))


@pytest.mark.parametrize(("level", "importance", "attached"), WEIGHED)
def test_extremes_stay_finite_and_what_is_masked_reaches_nothing(level, importance, attached):
    _, old, ref = tensors()
    penalty = KLPenalty(1.0, level=level, importance=importance, attached=attached)
    for gap, garbage in itertools.product((200.0, -200.0), (math.nan, math.inf, 200.0)):
        logprobs = (ref + gap).where(MASK, garbage).requires_grad_()
        terms = penalty(logprobs.reshape(-1), padded(old, ref))
        assert (terms[~MASK.reshape(-1)] == 0).all()
        assert terms.isfinite().all()
        (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
        assert gradient.isfinite().all()
        assert (gradient[~MASK] == 0).all()


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_compiles_without_a_break_and_never_as_another(order):
    """The compiled code is the same for all of them: what differs must be guarded."""
    logprobs, old, ref = tensors()
    batch = padded(old, ref)

    def gradient(penalty, call):
        leaf = logprobs.reshape(-1).clone().requires_grad_()
        return torch.autograd.grad(call(penalty, leaf).sum(), leaf)[0]

    def plain(penalty, x):
        return penalty(x, batch)

    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=len(WEIGHED)):
        for level, importance, attached in WEIGHED[::order]:
            penalty = KLPenalty(0.3, level=level, importance=importance, attached=attached)
            got, expected = (gradient(penalty, call) for call in (compiled, plain))
            torch.testing.assert_close(got, expected, atol=1e-15, rtol=1e-13)


def test_exact_by_hand():
    """2 * ratio * D; a masked token has neither, whatever it holds."""
    batch = TokenBatch.packed(
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 3]),
        torch.zeros(3, dtype=torch.float64),
        loss_mask=torch.tensor([True, True, False]),
        old_logprobs=torch.tensor([-1.0, -1.0 - math.log(3.0), 0.0], dtype=torch.float64),
    )
    given = torch.tensor([0.5, 0.25, math.nan], dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor([-1.0, -1.0, math.nan], dtype=torch.float64, requires_grad=True)
    for importance, terms in ((None, [1.0, 0.5, 0.0]), (Level.TOKEN, [1.0, 1.5, 0.0])):
        penalty = KLPenalty(2.0, importance=importance, exact=Divergence.REVERSE)
        found = penalty(logprobs, batch, given)
        assert found.tolist() == pytest.approx(terms)
        slopes = torch.autograd.grad(found.sum(), (given, logprobs), materialize_grads=True)
        ratios = [2.0, 2.0, 0.0] if importance is None else [2.0, 6.0, 0.0]
        assert slopes[0].tolist() == pytest.approx(ratios)
        assert slopes[1].tolist() == pytest.approx(terms if importance else [0.0] * 3)
    detached = KLPenalty(2.0, importance=Level.TOKEN, attached=False, exact=Divergence.REVERSE)
    assert not torch.autograd.grad(detached(logprobs, batch, given).sum(), given)[0].isnan().any()
    assert detached(logprobs, batch, given.detach()).grad_fn is None


def test_a_divergence_in_place_of_an_estimator_is_exact():
    loss = grpo(beta=0.3, kl=Divergence.JSD(0.5))
    assert loss.kl == KLPenalty(0.3, exact=Divergence.JSD(0.5))
    assert loss.divergence == Divergence.JSD(0.5) and loss.token_separable
    assert grpo(beta=0.3).divergence == Divergence.REVERSE
    without = grpo(kl=Divergence.JSD(0.5))(*statistics())
    assert without.metrics["ratio_mean"] > 0


def statistics():
    logprobs, old, _ = tensors()
    return (logprobs, torch.zeros_like(logprobs)), padded(old)


def test_separable_where_no_token_needs_another():
    exact = {"exact": Divergence.REVERSE}
    assert KLPenalty(1.0, **exact).token_separable
    assert KLPenalty(1.0, importance=Level.TOKEN, **exact).token_separable
    assert not KLPenalty(1.0, importance=Level.PRODUCT, **exact).token_separable
    assert KLPenalty(1.0).token_separable
    assert KLPenalty(1.0, importance=Level.TOKEN).token_separable
    assert not KLPenalty(1.0, importance=Level.PRODUCT).token_separable
    assert not KLPenalty(1.0, importance=Level.GEOMETRIC).token_separable
    assert not KLPenalty(1.0, level=Level.PRODUCT).token_separable


def test_beta_may_change_between_steps():
    logprobs, _, ref = tensors()
    beta = torch.tensor(0.5)
    penalty, batch = KLPenalty(beta), padded(None, ref)
    before = penalty(logprobs.reshape(-1), batch)
    beta.fill_(1.0)
    torch.testing.assert_close(penalty(logprobs.reshape(-1), batch), 2 * before)
    estimate = penalty.estimate(logprobs.reshape(-1).requires_grad_(), batch)
    torch.testing.assert_close(estimate, 2 * before)
    assert not estimate.requires_grad


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"beta must be a number or a tensor \[\], got \[2\]"):
        KLPenalty(torch.zeros(2))
    with pytest.raises(ValueError, match=r"level must be .*PRODUCT, got <Level.GEOMETRIC"):
        KLPenalty(1.0, level=Level.GEOMETRIC)
    with pytest.raises(ValueError, match=r"level must be .* got 'token'"):
        KLPenalty(1.0, level="token")
    with pytest.raises(ValueError, match="importance must be a Level or None, got 'token'"):
        KLPenalty(1.0, importance="token")
    with pytest.raises(ValueError, match="whole sequences has no ratio per token"):
        KLPenalty(1.0, level=Level.PRODUCT, importance=Level.TOKEN)
    with pytest.raises(ValueError, match=r"exact must be a Divergence or None, got <KL\.K1: 1>"):
        KLPenalty(1.0, exact=KL.K1)
    for options in ({"level": Level.PRODUCT}, {"grad": KL.K2}):
        with pytest.raises(ValueError, match=r"leave level and kl_grad \(grad\) alone"):
            KLPenalty(1.0, exact=Divergence.REVERSE, **options)
    with pytest.raises(ValueError, match="there is no divergence: give linear_policy_loss its ref"):
        KLPenalty(1.0, exact=Divergence.REVERSE)(torch.zeros(16), padded())
    with pytest.raises(ValueError, match="the batch has no ref_logprobs"):
        KLPenalty(1.0)(torch.zeros(16), padded())


@pytest.mark.parametrize("nats", [5.0, 15.0, 18.0, 19.5, 25.0, 30.0])
@pytest.mark.parametrize(
    ("level", "importance"),
    [
        (Level.TOKEN, Level.TOKEN),
        (Level.TOKEN, Level.PRODUCT),
        (Level.PRODUCT, Level.PRODUCT),
        (Level.PRODUCT, Level.GEOMETRIC),
    ],
)
def test_k3_with_an_attached_ratio_far_below_the_reference(level, importance, nats):
    """On-policy the gradient is k3 + k3' = d, of two terms that are each e^-d: 3e6 at 15 nats."""
    generator = torch.Generator().manual_seed(1)
    logprobs = -40 + torch.randn(4, 4, generator=generator)
    ref = logprobs + 0.3 * torch.randn(4, 4, generator=generator)
    # The reference is above the policy in one token of the sequence and in the other's sum.
    ref[0, 1] += nats
    ref[2, 1:3] += nats / 2
    penalty = KLPenalty(1.0, KL.K3, level=level, importance=importance)
    found, right = (x.clone().requires_grad_() for x in (logprobs, logprobs.double()))
    for leaf in (found, right):
        batch = padded(None, ref.to(leaf.dtype))
        penalty(leaf.reshape(-1), batch).sum().backward()
    assert found.grad.dtype == torch.float32
    torch.testing.assert_close(found.grad.double(), right.grad, rtol=1e-6, atol=1e-6)
    d = (logprobs - ref).double()
    if importance is Level.TOKEN:
        torch.testing.assert_close(right.grad, d.where(MASK, 0.0), rtol=1e-7, atol=1e-6)
    elif importance is level:
        total = d.where(MASK, 0.0).sum(-1, keepdim=True).expand(4, 4).where(MASK, 0.0)
        torch.testing.assert_close(right.grad, total, rtol=1e-7, atol=1e-6)
