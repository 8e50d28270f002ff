"""Surrogates: by hand, against naive formulas under every mean, at extremes."""

import math
from functools import partial

import drawn
import naive
import pytest
import torch
from hypothesis import given

from fused_rl import PolicyLoss
from fused_rl.means import (
    FixedLengthMean,
    LengthWeightedMean,
    SequenceMean,
    SequenceSumMean,
    TokenMean,
    TokenSum,
)
from fused_rl.ratios import ProductRatio, TokenRatio
from fused_rl.surrogates import ASPO, CISPO, DRO, SAPO, VESPO, Clip, Kimi, Reinforce, Unclipped
from fused_rl.trust_regions import DPPOKL, DPPOTV, ClipCov, KLCov

# Surrogate, formula. Bounds of 0 are where a log-ratio of 0 lies exactly on both.
FORMULAS = {
    "clip": (Clip(), naive.ppo),
    "clip higher": (Clip(0.2, 0.28), partial(naive.ppo, high=0.28)),
    "clip at the bounds": (Clip(0.0, 0.0), partial(naive.ppo, low=0.0, high=0.0)),
    "dual clip": (Clip(dual=2.5), partial(naive.ppo, dual=2.5)),
    "delta": (Clip(delta=4.0), partial(naive.ppo, delta=4.0)),
    "delta within the bounds": (Clip(0.2, 0.9, delta=1.4), partial(naive.ppo, high=0.9, delta=1.4)),
    "dual clip and delta": (Clip(dual=9.0, delta=5.0), partial(naive.ppo, dual=9.0, delta=5.0)),
    "unclipped": (Unclipped(), naive.unclipped),
    "reinforce": (Reinforce(), naive.reinforce),
    "cispo": (CISPO(), naive.cispo),
    "cispo, two-sided": (CISPO(0.8, 1.3), partial(naive.cispo, ratio_min=0.8, ratio_max=1.3)),
    "cispo at the bounds": (CISPO(1.0, 1.0), partial(naive.cispo, ratio_min=1.0, ratio_max=1.0)),
    "sapo": (SAPO(), naive.sapo),
    "sapo, other gates": (SAPO(2.0, 0.7), partial(naive.sapo, positive=2.0, negative=0.7)),
    "aspo": (ASPO(), naive.aspo),
    "aspo at the bounds": (ASPO(0.0, 0.0, 1.5), partial(naive.aspo, low=0.0, high=0.0, dual=1.5)),
    "vespo": (VESPO(), naive.vespo),
    "dppo tv": (DPPOTV(), naive.dppo_tv),
    "dppo tv at the bounds": (DPPOTV(0.0, 0.0), partial(naive.dppo_tv, low=0.0, high=0.0)),
    "dppo kl": (DPPOKL(), naive.dppo_kl),
    "dro": (DRO(0.3), partial(naive.dro, penalty=0.3)),
    "kimi": (Kimi(0.5), naive.kimi),
}
MEANS = {
    TokenMean(): naive.token_mean,
    TokenSum(): naive.token_sum,
    SequenceMean(): naive.sequence_mean,
    SequenceSumMean(): naive.sequence_sum_mean,
    FixedLengthMean(11): naive.fixed_length_mean,
    LengthWeightedMean(11): naive.length_weighted_mean,
}
SURROGATES = [surrogate for surrogate, _ in FORMULAS.values()]
COUPLING = [
    ClipCov(cov_low=-1.0, fraction=0.4),
    ClipCov(cov_low=-1.0, fraction=0.4, seed=3),
    KLCov(fraction=0.4),
]


def assert_naive(surrogate, tokens, level, terms):
    for mean, naive_mean in MEANS.items():
        value = drawn.ours(PolicyLoss(surrogate, level, mean=mean), tokens)
        drawn.assert_same(value, naive.total(tokens, terms, naive_mean), tokens.logprobs)


@pytest.mark.parametrize("name", FORMULAS)
@drawn.examples(12)
@given(tokens=drawn.batches())
def test_every_surrogate_under_every_mean_against_its_naive_formula(name, tokens):
    surrogate, formula = FORMULAS[name]
    terms = naive.terms(tokens, naive.token, formula)
    assert_naive(surrogate, tokens, TokenRatio(), terms)


@drawn.examples(40)
@given(tokens=drawn.batches())
def test_covariance_chooses_the_tokens_that_naive_loops_choose(tokens):
    clip_cov = naive.clip_cov(tokens, -1.0, 5.0, 0.4)
    assert_naive(ClipCov(cov_low=-1.0, fraction=0.4), tokens, TokenRatio(), clip_cov)
    assert_naive(KLCov(0.7, 0.4), tokens, TokenRatio(), naive.kl_cov(tokens, 0.7, 0.4))


def at(surrogate, ratio, advantage, logprob=-1.0):
    """Value and derivative with respect to the log-prob, when old log-probs stay."""
    logprobs = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    value = surrogate(logprobs - old, logprobs, torch.tensor([advantage], dtype=torch.float64))
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    return value.item(), slope.item()


@pytest.mark.parametrize(
    ("surrogate", "ratio", "advantage", "value", "slope"),
    [
        (Clip(), 1.5, 1.0, -1.2, 0.0),
        (Clip(dual=3.0), 5.0, -2.0, 6.0, 0.0),
        (Clip(dual=3.0), 2.0, -2.0, 4.0, 4.0),
        (Clip(dual=3.0), 5.0, 2.0, -2.4, 0.0),
        (Clip(dual=3.0), 0.5, -1.0, 0.8, 0.0),
        (Clip(delta=3.0), 5.0, -2.0, 6.0, 0.0),
        (Clip(delta=3.0), 2.0, -2.0, 4.0, 4.0),
        (Unclipped(), 1.5, 2.0, -3.0, -3.0),
        (Reinforce(), 7.0, 2.0, 2.0, -2.0),
        (CISPO(), 9.0, 2.0, 10.0, -10.0),
        (CISPO(), 0.5, -2.0, -1.0, 1.0),
        (CISPO(0.8, 1.2), 0.5, 1.0, 0.8, -0.8),
        (SAPO(), 1.0, 1.0, -2.0, -1.0),
        (SAPO(), 1.0, -1.0, 2 / 1.05, 1.0),
        (ASPO(), 0.5, 1.0, -2.0, -2.0),
        (ASPO(), 0.1, 1.0, -3.0, -3.0),
        (ASPO(), 1.5, 1.0, -1 / 1.2, 0.0),
        (ASPO(), 2.0, -1.0, 2.0, 2.0),
        (ASPO(), 8.0, -1.0, 3.0, 3.0),
        (ASPO(), 0.5, -1.0, 0.8, 0.0),
        (VESPO(), 1.0, 2.0, 2.0, -2.0),
        (VESPO(), 2.0, 1.0, 4 * math.exp(-3), -4 * math.exp(-3)),
        (VESPO(), 2.0, -1.0, -8 * math.exp(-2), 8 * math.exp(-2)),
        (DRO(0.1), math.e, 2.0, 0.05 + 2.0, 0.1 - 2.0),
        (Kimi(0.5), math.e, 2.0, 1.5**2, -1.5),
        (Kimi(0.5), 1.0, 2.0, 4.0, -2.0),
    ],
)
def test_by_hand(surrogate, ratio, advantage, value, slope):
    assert at(surrogate, ratio, advantage) == pytest.approx((value, slope), abs=1e-12)


@pytest.mark.parametrize("region", [DPPOTV(), DPPOKL()])
@pytest.mark.parametrize(
    ("old", "new", "advantage", "kept"),
    [
        (0.5, 0.8, 1.0, False),  # rose by 0.3, KL 0.22
        (0.5, 0.8, -1.0, True),
        (0.5, 0.2, -1.0, False),
        (0.5, 0.2, 1.0, True),
        (0.5, 0.55, 1.0, True),  # KL 0.005
        (1e-4, 1e-3, 1.0, True),  # tenfold, and yet nothing has moved: PPO would clip
    ],
)
def test_trust_regions_by_hand(region, old, new, advantage, kept):
    expected = -advantage * new / old * kept
    found = at(region, new / old, advantage, math.log(new))
    assert found == pytest.approx((expected * math.log(new), expected), abs=1e-12)


def test_tv_and_kl_differ_where_a_token_is_rare():
    """0.05 to 0.24 moves the probability by 0.19, and the KL by 0.125."""
    assert at(DPPOTV(), 4.8, 1.0, math.log(0.24))[1] == pytest.approx(-4.8)
    assert at(DPPOKL(), 4.8, 1.0, math.log(0.24))[1] == 0.0


def test_certain_tokens_have_a_kl():
    """p = 1 for both: no distance. p = 1 now, not before: outside whatever the bound."""
    log_ratio = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = DPPOKL().clipped(log_ratio, torch.zeros(2).double(), torch.ones(2).double())
    assert high.tolist() == [False, True] and not low.any()
    above = torch.full((2,), 1e-7).double()
    assert DPPOKL().clipped(log_ratio, above, torch.ones(2).double())[1].tolist() == [False, True]


def test_covariance_by_hand():
    """Means are 0 and -2: covariances 4, 2, -1, 0, -1."""
    A = torch.tensor([2.0, 1.0, -1.0, 0.0, -2.0], dtype=torch.float64)
    l = torch.tensor([0.0, 0.0, -1.0, -7.5, -1.5], dtype=torch.float64)  # noqa: E741
    ratio = torch.tensor([0.0, 0.25, 0.0, 0.0, 0.0], dtype=torch.float64)
    loss = -A * ratio.exp().clamp(0.8, 1.2)
    expected = loss.clone()
    expected[0] = 0
    # The clipped token is no candidate, so that 2 of 5 tokens are dropped but only one qualifies.
    torch.testing.assert_close(ClipCov(fraction=0.4)(ratio, l, A), expected)
    torch.testing.assert_close(ClipCov(fraction=0.4, cov_high=4.0)(ratio, l, A), loss)
    held = -A * ratio.exp()
    held[1] += 2 * 0.25
    torch.testing.assert_close(KLCov(2.0, fraction=0.4)(ratio, l, A), held)


def test_a_seed_chooses_among_the_candidates_and_always_the_same():
    A = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    l = A * torch.linspace(1.5, 4.0, 100)  # noqa: E741
    log_ratio = torch.zeros_like(l)
    chosen = {}
    for seed in (None, 0, 1):
        surrogate = ClipCov(fraction=0.1, seed=seed)
        dropped = surrogate(log_ratio, l, A) == 0
        assert dropped.sum() == 10
        assert torch.equal(dropped, surrogate(log_ratio, l, A) == 0)
        assert torch.equal(dropped, surrogate.clipped(log_ratio, l, A)[1])
        chosen[seed] = dropped
    assert chosen[None][-10:].all()
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("surrogate", SURROGATES + COUPLING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_are_finite_in_value_and_gradient(surrogate, dtype):
    for size in (200.0, 3000.0):
        x = torch.tensor([size, -size, size, -size, size, 0.0], dtype=dtype, requires_grad=True)
        l = torch.full((6,), -1.0, dtype=dtype, requires_grad=True)  # noqa: E741
        A = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0], dtype=dtype)
        losses = surrogate(x, l, A)
        gradients = torch.autograd.grad(losses.sum(), (x, l), materialize_grads=True)
        for t in (losses, *gradients):
            assert t.isfinite().all() and t.dtype == dtype


@pytest.mark.parametrize("surrogate", SURROGATES + COUPLING, ids=str)
def test_gradcheck(surrogate):
    """Of log_ratio where it carries the gradient, of logprobs where it is the only one to do so."""
    torch.manual_seed(0)
    x = (0.6 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    l = -torch.rand(12, dtype=torch.float64) - 0.1  # noqa: E741
    A = torch.randn(12, dtype=torch.float64)
    if surrogate(x, l, A).requires_grad:
        assert torch.autograd.gradcheck(lambda x: surrogate(x, l, A), x)
    elif not isinstance(surrogate, ASPO):  # whose gradient is of no value, by its formula
        l.requires_grad_()
        assert torch.autograd.gradcheck(partial(surrogate, x.detach(), advantages=A), l)


@pytest.mark.parametrize(
    "surrogate",
    [
        Clip(),
        Clip(dual=2.0),
        Clip(0.2, 0.9, dual=1.4),
        Clip(delta=2.0),
        Clip(0.2, 0.9, delta=1.4),
        Clip(0.2, 0.9, dual=1.6, delta=1.4),
        ASPO(),
        DPPOTV(),
        DPPOKL(),
    ],
    ids=str,
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipped_tokens_are_those_without_gradient(surrogate, advantage):
    old = torch.full((101,), -1.0, dtype=torch.float64)
    logprobs = torch.linspace(-3.01, -0.01, 101, dtype=torch.float64, requires_grad=True)
    A = torch.full_like(old, advantage)
    (slope,) = torch.autograd.grad(surrogate(logprobs - old, logprobs, A).sum(), logprobs)
    low, high = surrogate.clipped(logprobs - old, logprobs, A)
    assert torch.equal(slope == 0, low | high) and not (low & high).any()
    assert 0 < (slope == 0).sum() < 101


def test_delta_beyond_the_clip_is_dual_clip():
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    for advantage in (1.0, -1.0):
        A = torch.full_like(x, advantage)
        assert torch.equal(Clip(dual=1.7)(x, x, A), Clip(delta=1.7)(x, x, A))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_on_policy_the_gradient_is_reinforce(surrogate):
    """At r = 1 every surrogate that is not clipped there pushes by A."""
    for advantage in (1.5, -0.5):
        slope = at(surrogate, 1.0, advantage)[1]
        assert slope == pytest.approx(-advantage, abs=1e-12)


def test_kimi_is_dro_of_whole_sequences():
    """The squared loss and -A sum l + tau / 2 (sum x)^2 differ by a constant."""
    torch.manual_seed(1)
    tokens = naive.Tokens(
        -torch.rand(3, 4).double(),
        -torch.rand(3, 4).double(),
        torch.randn(3, 1).double().expand(3, 4),
        torch.arange(4) < torch.tensor([4, 2, 3])[:, None],
    )
    tokens.logprobs.requires_grad_()
    kimi = drawn.ours(PolicyLoss(Kimi(0.3), ProductRatio(), mean=SequenceMean()), tokens)
    policy = drawn.ours(PolicyLoss(Reinforce(), mean=SequenceSumMean()), tokens)
    product = PolicyLoss(DRO(0.3), ProductRatio(), mean=SequenceMean())
    zero = naive.Tokens(tokens.logprobs, tokens.old, 0 * tokens.advantages, tokens.mask)
    parts = policy + drawn.ours(product, zero)
    gradients = [torch.autograd.grad(v, tokens.logprobs)[0] for v in (kimi, parts)]
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-12)


def test_a_plain_function_is_a_surrogate_without_bounds():
    tokens = naive.Tokens(
        torch.tensor([[-1.0, -2.0, 7.0]]),
        torch.tensor([[-1.5, -2.0, 7.0]]),
        torch.ones(1, 3),
        torch.tensor([[True, True, False]]),
    )
    seen = []

    def centred(log_ratio, logprobs, advantages):
        seen.append(len(logprobs))
        return -(advantages - logprobs.detach().mean()) * logprobs

    loss = PolicyLoss(centred)
    assert not loss.token_separable
    output = loss(drawn.stats(tokens.logprobs), drawn.padded(tokens))
    assert set(seen) == {2}, "it sees the counted tokens alone"
    assert output.loss.item() == pytest.approx((2.5 * 1 + 2.5 * 2) / 2)
    assert output.metrics["clip_fraction_high"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Clip(dual=1.0), "dual must exceed 1, got 1.0"),
        (lambda: Clip(delta=0.0), "delta must be positive, got 0.0"),
        (lambda: Kimi(0.0), "tau must be positive, got 0.0"),
        (lambda: ClipCov(fraction=0.0), r"fraction must lie in \(0, 1\], got 0.0"),
        (lambda: KLCov(fraction=2.0), r"fraction must lie in \(0, 1\], got 2.0"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
