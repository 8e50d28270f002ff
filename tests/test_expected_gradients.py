"""Which KL option optimises what: the library's expected gradients, summed over all sequences.

The verdicts below are data, one row per setup: for k1, k2, k3, first on-policy, then off-policy,
the divergence whose gradient the expected gradient is, to 1e-12. BIASED: it is none of theirs, by
more than 1e-3. `python -m fused_rl.study.enumeration` prints them in markdown, and
`python -m fused_rl.study.exact_enumeration` those of exact divergences.
"""

from dataclasses import replace
from math import exp

import pytest
import torch

from fused_rl import (
    KL,
    Divergence,
    KLPenalty,
    Level,
    PolicyLoss,
    TokenBatch,
    TokenStats,
    kl_penalty,
    linear_divergence,
)
from fused_rl.advantages import pass_at_k_advantages
from fused_rl.ratios import ProductRatio
from fused_rl.study import enumeration, exact_enumeration
from fused_rl.study.enumeration import KINDS, Credit, Setup, Target, World
from fused_rl.study.exact_enumeration import MISSING, ExactWorld, Use
from fused_rl.surrogates import Unclipped

ZERO, BIASED = Target.ZERO, None
REV, FWD = Target.REVERSE, Target.FORWARD
TOK_REV, TOK_FWD = Target.TOKEN_REVERSE, Target.TOKEN_FORWARD
OLD_REV, OLD_FWD = Target.OLD_TOKEN_REVERSE, Target.OLD_TOKEN_FORWARD

TOKEN, SEQUENCE, GEOMETRIC = Level.TOKEN, Level.PRODUCT, Level.GEOMETRIC
WRONG = (BIASED, BIASED, BIASED)
K1_ALONE = (REV, BIASED, BIASED)
K1_AND_K3 = (REV, BIASED, REV)
VERDICTS = {
    # In the loss, token by token.
    Setup(TOKEN): ((ZERO, TOK_REV, TOK_FWD), WRONG),
    Setup(TOKEN, TOKEN): ((ZERO, TOK_REV, TOK_FWD), (ZERO, OLD_REV, OLD_FWD)),
    Setup(TOKEN, TOKEN, True): ((TOK_REV, BIASED, TOK_REV), (OLD_REV, BIASED, OLD_REV)),
    Setup(TOKEN, GEOMETRIC): ((ZERO, TOK_REV, TOK_FWD), WRONG),
    Setup(TOKEN, GEOMETRIC, True): (WRONG, WRONG),
    Setup(TOKEN, SEQUENCE): ((ZERO, TOK_REV, TOK_FWD), (ZERO, TOK_REV, TOK_FWD)),
    Setup(TOKEN, SEQUENCE, True): (K1_AND_K3, K1_AND_K3),
    # In the loss, of the summed log-ratio.
    Setup(SEQUENCE): ((ZERO, REV, FWD), WRONG),
    Setup(SEQUENCE, GEOMETRIC): ((ZERO, REV, FWD), WRONG),
    Setup(SEQUENCE, GEOMETRIC, True): (WRONG, WRONG),
    Setup(SEQUENCE, SEQUENCE): ((ZERO, REV, FWD), (ZERO, REV, FWD)),
    Setup(SEQUENCE, SEQUENCE, True): (K1_AND_K3, K1_AND_K3),
    # In the reward.
    Setup(reward=Credit.OWN): ((TOK_REV, BIASED, BIASED), WRONG),
    Setup(reward=Credit.OWN, ratio=TOKEN): ((TOK_REV, BIASED, BIASED), (OLD_REV, BIASED, BIASED)),
    Setup(reward=Credit.OWN, ratio=SEQUENCE): (
        (TOK_REV, BIASED, BIASED),
        (TOK_REV, BIASED, BIASED),
    ),
    Setup(reward=Credit.TO_GO): (K1_ALONE, WRONG),
    Setup(reward=Credit.TO_GO, ratio=TOKEN): (K1_ALONE, WRONG),
    Setup(reward=Credit.TO_GO, ratio=SEQUENCE): (K1_ALONE, K1_ALONE),
    Setup(reward=Credit.TOTAL): (K1_ALONE, WRONG),
    Setup(reward=Credit.TOTAL, ratio=TOKEN): (K1_ALONE, WRONG),
    Setup(reward=Credit.TOTAL, ratio=SEQUENCE): (K1_ALONE, K1_ALONE),
    Setup(reward=Credit.TERMINAL): (K1_ALONE, WRONG),
    Setup(reward=Credit.TERMINAL, ratio=TOKEN): (K1_ALONE, WRONG),
    Setup(reward=Credit.TERMINAL, ratio=SEQUENCE): (K1_ALONE, K1_ALONE),
    # In the reward, with the log-probs of the policy that sampled.
    Setup(reward=Credit.TO_GO, ratio=TOKEN, stale=True): (K1_ALONE, WRONG),
    Setup(reward=Credit.TO_GO, ratio=SEQUENCE, stale=True): (K1_ALONE, WRONG),
    Setup(reward=Credit.TERMINAL, ratio=TOKEN, stale=True): (K1_ALONE, WRONG),
    Setup(reward=Credit.TERMINAL, ratio=SEQUENCE, stale=True): (K1_ALONE, WRONG),
    # In both.
    Setup(TOKEN, reward=Credit.OWN): ((TOK_REV, BIASED, TOK_REV), WRONG),
    Setup(TOKEN, SEQUENCE, reward=Credit.OWN, ratio=SEQUENCE): (
        (TOK_REV, BIASED, TOK_REV),
        (TOK_REV, BIASED, TOK_REV),
    ),
    Setup(TOKEN, reward=Credit.TO_GO): (K1_AND_K3, WRONG),
    Setup(TOKEN, SEQUENCE, reward=Credit.TO_GO, ratio=SEQUENCE): (K1_AND_K3, K1_AND_K3),
    Setup(SEQUENCE, reward=Credit.TERMINAL): (K1_AND_K3, WRONG),
    Setup(SEQUENCE, SEQUENCE, reward=Credit.TERMINAL, ratio=SEQUENCE): (K1_AND_K3, K1_AND_K3),
}


# Exact divergences: reverse and forward, sampled by the policy, by an old one, by the reference.
OF_REFERENCE = "reverse per token, the reference's prefixes"
PER_TOKEN = (TOK_REV.value, TOK_FWD.value)
THEIR_PREFIXES = (*PER_TOKEN, OLD_REV.value, OLD_FWD.value, OF_REFERENCE, FWD.value)
ON_POLICY = (REV.value, BIASED, BIASED, BIASED, BIASED, BIASED)
ANY_POLICY = (REV.value, BIASED) * 3
EXACT_VERDICTS = {
    # In the loss alone: the KL at the prefixes that were visited.
    Use(True): THEIR_PREFIXES,
    Use(True, TOKEN): THEIR_PREFIXES,
    Use(True, TOKEN, True): THEIR_PREFIXES,
    Use(True, SEQUENCE): PER_TOKEN * 3,
    Use(True, SEQUENCE, True): ANY_POLICY,
    # In the reward alone: nothing of the own token, of later ones what prefixes depend on.
    Use(reward="exact", credit="own token"): (ZERO.value, ZERO.value, *[BIASED] * 4),
    Use(reward="exact", credit="to go"): (MISSING, *[BIASED] * 5),
    Use(importance=SEQUENCE, reward="exact", credit="to go"): (MISSING, BIASED) * 3,
    # In both: the KL of whole sequences, unless k1 counts the token's own twice.
    Use(True, reward="exact", credit="to go"): ON_POLICY,
    Use(True, SEQUENCE, reward="exact", credit="to go"): ANY_POLICY,
    Use(True, reward="exact", credit="later tokens"): ON_POLICY,
    Use(True, SEQUENCE, reward="exact", credit="later tokens"): ANY_POLICY,
    Use(True, reward="k1", credit="to go"): (BIASED,) * 6,
    Use(True, SEQUENCE, reward="k1", credit="to go"): (BIASED,) * 6,
    Use(True, reward="k1", credit="later tokens"): ON_POLICY,
    Use(True, SEQUENCE, reward="k1", credit="later tokens"): ANY_POLICY,
}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_world_is_a_probability_distribution_of_sequences_of_all_lengths(world):
    for policy in (world.current, world.ref, world.old):
        torch.testing.assert_close(
            world.probability(policy).sum(), torch.ones((), dtype=torch.float64)
        )
        assert world.reach(policy)[0].item() == pytest.approx(1, abs=1e-15)
    assert world.mask.sum(-1).unique().tolist() == [1, 2, 3]
    assert (world.B, world.S) == (15, 7)


def test_the_table_speaks_of_every_setup_once():
    assert set(VERDICTS) == set(enumeration.SETUPS)
    assert len(enumeration.SETUPS) == len(VERDICTS)


@pytest.mark.parametrize("setup", enumeration.SETUPS, ids=enumeration.described)
def test_expected_gradient(world, setup):
    found = tuple(
        tuple(world.verdict(setup, kind, off_policy=off_policy) for kind in KINDS)
        for off_policy in (False, True)
    )
    assert found == VERDICTS[setup]


def test_the_table_of_exact_divergences_speaks_of_every_use_once():
    assert set(EXACT_VERDICTS) == set(exact_enumeration.USES)
    assert len(exact_enumeration.USES) == len(EXACT_VERDICTS)


@pytest.mark.parametrize("use", exact_enumeration.USES, ids=str)
def test_expected_gradient_of_an_exact_divergence(use):
    world = ExactWorld()
    cells = [(d, s) for s in exact_enumeration.SAMPLERS for d in exact_enumeration.DIVERGENCES]
    assert tuple(world.exact_verdict(use, *cell) for cell in cells) == EXACT_VERDICTS[use]


def test_k1_to_go_beside_the_exact_kl_counts_each_tokens_own_twice():
    """The first term of the gradient is the per-token KL; k1 of the token itself adds it again."""
    world = ExactWorld()
    use = Use(True, reward="k1", credit="to go")
    got = world.exact_gradient(use, Divergence.REVERSE, world.current)
    expected = world.truth[REV] + world.truth[TOK_REV]
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ["current", "old", "ref"])
def test_the_value_of_the_exact_kl_is_that_of_whole_sequences(name):
    """Summed over the sampled prefixes: the reverse KL on-policy, the forward KL on the reference's
    samples; the KL of other policies where others sample.
    """
    world = ExactWorld()
    sampler = getattr(world, name)
    kinds = ((REV, Divergence.REVERSE, "current"), (FWD, Divergence.FORWARD, "ref"))
    for target, divergence, whose in kinds:
        heads = (world.hidden, world.current.T, world.hidden, world.ref.T)
        k = linear_divergence(*heads, divergence=divergence).divergence.where(world.mask, 0.0)
        error = world.probability(sampler) @ k.sum(-1) - world.divergence(world.current, target)
        assert abs(error) < 1e-14 if whose == name else abs(error) > 1e-3


def test_what_is_biased_in_the_reward_is_off_by_what_the_loss_would_add(world):
    """k3 in the reward lacks exactly the gradient of k3 in the loss, the forward KL per token."""
    got = world.expected_gradient(Setup(reward=Credit.TO_GO), KL.K3, off_policy=False)
    expected = world.truth[REV] - world.truth[TOK_FWD]
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("value", KINDS)
def test_the_gradient_is_that_of_the_grad_estimator_whatever_the_value(world, value):
    leaf = world.current.clone().requires_grad_()
    p, logprobs = world.probability(world.current), world.logprobs(leaf)
    ref = world.logprobs(world.ref)
    penalty = kl_penalty(logprobs.sum(-1), ref.sum(-1), value=value, grad=KL.K2)
    (got,) = torch.autograd.grad((p * penalty).sum(), leaf)
    torch.testing.assert_close(got, world.truth[REV], atol=1e-14, rtol=0)


@pytest.mark.parametrize("level", [TOKEN, SEQUENCE])
@pytest.mark.parametrize("kind", [KL.K1, KL.K3])
def test_values_of_k1_and_k3_are_the_kl_at_either_level(world, level, kind):
    for importance, sampler in ((None, world.current), (SEQUENCE, world.old)):
        batch = world.batch(Setup(), kind, sampler)
        kl = KLPenalty(3.0, kind, level=level, importance=importance)
        estimate = kl.estimate(world.logprobs(world.current).reshape(-1), batch)
        got = world.probability(sampler) @ batch.sequence_sum(estimate)
        exact = world.divergence(world.current, REV)
        torch.testing.assert_close(got, exact, atol=1e-14, rtol=0)


def test_the_full_product_ratio_with_the_whole_return_is_exact_off_policy(world):
    """RLOO's way: one ratio and one advantage per sequence, whose tokens share it."""
    setup = Setup(reward=Credit.TOTAL)
    batch = replace(world.batch(setup, KL.K1, world.old), weights=None)
    probability = world.probability(world.old)

    def shared(batch: TokenBatch) -> torch.Tensor:
        return probability[batch.sequence] * batch.loss_mask / batch.sequence_tokens.clamp(min=1)

    leaf = world.current.clone().requires_grad_()
    logprobs = world.logprobs(leaf)
    loss = PolicyLoss(Unclipped(), ProductRatio(), mean=shared)
    value = loss.objective(TokenStats(logprobs, torch.zeros_like(logprobs)), batch)
    (got,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(got, world.truth[REV], atol=1e-14, rtol=0)


@pytest.mark.parametrize(("group", "k"), [(4, 2), (4, 3), (4, 4), (2, 2)])
def test_pass_at_k_is_the_gradient_of_the_expected_best_of_k(group, k):
    """Over all groups of samples from three answers, the rewards of which are 0, 1 and 2.5."""
    answers = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def best_of(size: int, of) -> torch.Tensor:
        draws = torch.cartesian_prod(*[torch.arange(3)] * size)
        return (logits.log_softmax(-1)[draws].sum(-1).exp() * of(draws)).sum()

    exact = best_of(k, lambda draws: answers[draws].amax(-1))
    (expected,) = torch.autograd.grad(exact, logits)
    draws = torch.cartesian_prod(*[torch.arange(3)] * group)
    logprobs = logits.log_softmax(-1)[draws]
    advantages = pass_at_k_advantages(answers[draws].reshape(-1), group, k).reshape(draws.shape)
    probability = logprobs.detach().sum(-1, keepdim=True).exp()
    (got,) = torch.autograd.grad((probability * advantages * logprobs).sum(), logits)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("shift", [0.1, 1.0])
def test_bias_and_variance_between_two_gaussians(shift):
    """Policy N(shift, 1), reference N(0, 1): d is N(shift^2 / 2, shift^2), and the moments follow.

    A million samples; means and variances within five standard errors of their exact values.
    """
    generator = torch.Generator().manual_seed(0)
    n = 1_000_000
    x = shift + torch.randn(n, generator=generator, dtype=torch.float64)
    logprobs, ref = -((x - shift) ** 2) / 2, -(x**2) / 2
    s = shift**2
    exact = {
        KL.K1: (s / 2, s),
        KL.K2: (s / 2 + s**2 / 8, s**2 / 2 + s**3 / 4),
        KL.K3: (s / 2, exp(s) - 1 - s),
    }
    variances = {}
    for kind, (mean, variance) in exact.items():
        k = kl_penalty(logprobs, ref, value=kind)
        squares = (k - mean).square()
        assert abs(k.mean() - mean) < 5 * (variance / n) ** 0.5, kind
        assert abs(squares.mean() - variance) < 5 * squares.std() / n**0.5, kind
        variances[kind] = variance
    assert variances[KL.K3] < variances[KL.K1]
    assert exact[KL.K2][0] > exact[KL.K1][0] == exact[KL.K3][0]
