"""Preference losses where naive formulas overflow: beside the same formulas in 2000 digits."""

import dataclasses
import itertools
import math

import mpmath
import naive_preference as naive
import pytest
import torch
from naive_preference import Arithmetic, Sequence
from preference_cases import PAIRED, UNPAIRED, V, stats
from torch import Tensor

from fused_rl import LossOutput, linear_preference_loss, preference
from fused_rl.preference import PreferenceBatch

DIGITS = 2000
MANY = Arithmetic(mpmath.exp, mpmath.log, lambda x: x)
F64 = {"dtype": torch.float64}
# Log-ratios of the chosen and the rejected that give margins of up to 1000 nats.
FAR = (0.0, -1.0, 30.0, 1000.0, -1000.0)
# These read exps of log-ratios, which are held at 20 nats: another test.
HELD = {"f_dpo, forward KL", "f_dpo, alpha", "alphapo", "orpo"}
# The reference-free ones.
FREE = {"sft", "simpo", "cpo"}


def value_and_slopes(formula, a: float, b: float) -> tuple[float, float, float]:
    """Of one pair whose log-ratios are a and b, one token each, rounded to float64 at the end."""
    with mpmath.workdps(DIGITS):

        def loss(x, y):
            pair = Sequence([x], [mpmath.mpf(0)]), Sequence([y], [mpmath.mpf(0)])
            return formula([pair], MANY)

        step = mpmath.mpf(10) ** -600
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        # Forwards, so that a kink has the slope of its right side, and 1e-600 is no error.
        value = loss(a, b)
        da, db = (loss(a + step, b) - value) / step, (loss(a, b + step) - value) / step
        return tuple(float(x) for x in (value, da, db))


def one_pair(logprobs: Tensor, **options) -> PreferenceBatch:
    """Sequences of [2, T] tokens whose reference has log-probs of 0."""
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    options = {"ref_logprobs": torch.zeros_like(logprobs.detach()), **options}
    return PreferenceBatch.padded(torch.zeros_like(mask, dtype=torch.int64), mask, **options)


def assert_exact(name: str, a: float, b: float) -> None:
    """A log-prob above 0 stands for a reference that is so much lower."""
    loss, formula = PAIRED[name]
    logprobs = torch.tensor([[a], [b]], **F64).requires_grad_()
    got = loss(stats(logprobs), one_pair(logprobs)).loss
    (slopes,) = torch.autograd.grad(got, logprobs)
    found = [float(got.detach()), *slopes[:, 0].tolist()]
    for mine, exact in zip(found, value_and_slopes(formula, a, b), strict=True):
        assert mine == pytest.approx(exact, rel=1e-12, abs=1e-15), (a, b)


@pytest.mark.parametrize("name", sorted(PAIRED.keys() - HELD))
def test_margins_of_a_thousand(name):
    for a, b in itertools.product(FAR, FAR):
        assert_exact(name, a, b)


@pytest.mark.parametrize("name", sorted(HELD))
def test_exps_below_twenty_nats_are_exact(name):
    """ORPO's odds too, up to a probability of 1 - 2^-24."""
    for a, b in itertools.product((-1e-6, -1e-3, -2.0, -15.0), (-1e-6, -1e-3, -1.0, -15.0)):
        assert_exact(name, a, b)


@pytest.mark.parametrize("name", sorted(PAIRED))
def test_nothing_overflows(name):
    """Log-probs of exactly 0, of next to nothing, and as low as an excluded entry's; above 0 stand
    references that are so much lower."""
    loss, _ = PAIRED[name]
    for a, b in itertools.product((0.0, -1e-300, -1000.0, -1e30, 1000.0), repeat=2):
        given = torch.tensor([[a, a], [b, b]], **F64)
        logprobs = given.clamp(max=0).requires_grad_()
        batch = one_pair(logprobs, ref_logprobs=given.clamp(min=0).neg())
        out = loss(stats(logprobs), batch)
        (slopes,) = torch.autograd.grad(out.loss, logprobs)
        assert out.loss.isfinite() and slopes.isfinite().all(), (a, b)
        assert all(math.isfinite(float(x)) for x in out.metrics.values()), (a, b)


@pytest.mark.parametrize("far", [-1000.0, 1000.0])
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_rewards_of_a_thousand(name, good, far):
    """KTO with its point of reference at 0."""
    loss = dataclasses.replace(UNPAIRED[name][0], point=0.4 if name == "bco" else 0.0)
    logprobs = torch.tensor([[far]], **F64).requires_grad_()
    got = loss(stats(logprobs), one_pair(logprobs, desirable=torch.tensor([good]))).loss
    (slope,) = torch.autograd.grad(got, logprobs)
    with mpmath.workdps(DIGITS):

        def formula(x):
            judged = [(Sequence([x], [mpmath.mpf(0)]), good)]
            if name == "kto":
                options = {"beta": 0.3, "desirable": 1.2, "undesirable": 0.7}
                return naive.kto(judged, [], MANY, **options)
            if name == "bco":
                return naive.bco(judged, MANY, beta=0.3, shift=0.4)
            return naive.apo_zero_unpaired(judged, MANY, beta=0.3)

        x, step = mpmath.mpf(far), mpmath.mpf(10) ** -600
        want, rise = float(formula(x)), float((formula(x + step) - formula(x)) / step)
    assert float(got.detach()) == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert float(slope) == pytest.approx(rise, rel=1e-12, abs=1e-15)


def test_orpo_of_a_completion_that_the_model_is_sure_of():
    """Beside a rejected one of one in two: the odds go to infinity, the loss to 0, from hidden
    states whose logits leave nothing to any other entry."""
    hidden = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], **F64).requires_grad_()
    weight = torch.zeros(V, 2, **F64)
    weight[0, 0] = 1e4
    batch = PreferenceBatch.padded(
        torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    )
    out = linear_preference_loss(hidden, weight.requires_grad_(), batch, preference.orpo(beta=0.2))
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss.detach().abs() < 1e-8
    assert all(g.isfinite().all() for g in gradients)


EMPTY = {"none": [], "the chosen": [0], "the rejected": [1], "a pair": [0, 1], "all": [0, 1, 2, 3]}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("which", EMPTY)
def test_empty_completions_have_a_score_of_0(name, which):
    """Sequences 0 and 1 are the pairs' chosen, 2 and 3 their rejected; values by the formula."""
    loss, formula = PAIRED[name]
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[[{0: 0, 1: 2, 2: 1, 3: 3}[i] for i in EMPTY[which]]] = False
    logprobs = (-torch.rand(4, 3, **F64) - 0.1).requires_grad_()
    ref = -torch.rand(4, 3, **F64)
    batch = PreferenceBatch.padded(torch.zeros(4, 3, dtype=torch.int64), mask, ref_logprobs=ref)
    out: LossOutput = loss(stats(logprobs), batch)
    (slopes,) = torch.autograd.grad(out.loss, logprobs)
    assert slopes.isfinite().all() and not slopes[~mask].any()
    assert all(math.isfinite(float(x)) for x in out.metrics.values())
    assert float(out.metrics["empty_fraction"]) == (~mask.any(-1)).double().mean()
    if name == "orpo" and which != "none":
        # The odds of an empty product are infinite; the score is 0 all the same.
        assert out.loss.isfinite()
        return
    of = [Sequence(list(p[m]), list(q[m])) for p, q, m in zip(logprobs, ref, mask, strict=True)]
    if not mask[:2].any():
        assert out.loss.isfinite()
        return
    want = formula([(of[0], of[2]), (of[1], of[3])], naive.TORCH)
    torch.testing.assert_close(out.loss.detach(), want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PAIRED.keys() - FREE - {"alphapo", "orpo"}))
def test_what_the_reference_does_not_say_counts_as_the_policy(name):
    """NaN: a log-ratio of 0 at that token; -inf: 20 nats at most, without inf anywhere."""
    loss, _ = PAIRED[name]
    logprobs = (-torch.rand(4, 3, **F64) - 0.1).requires_grad_()
    ref = -torch.rand(4, 3, **F64)
    unknown = ref.clone()
    unknown[0, 1] = unknown[3, 2] = torch.nan
    known = torch.where(unknown.isnan(), logprobs.detach(), ref)
    mask = torch.ones(4, 3, dtype=torch.bool)
    labels = torch.zeros(4, 3, dtype=torch.int64)

    def given(ref):
        batch = PreferenceBatch.padded(labels, mask, ref_logprobs=ref)
        return loss(stats(logprobs), batch)

    got, want = given(unknown), given(known)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    assert float(got.metrics["unknown_fraction"]) == pytest.approx(2 / 12)
    unknown[1, 0] = -torch.inf
    out = given(unknown)
    (slopes,) = torch.autograd.grad(out.loss, logprobs)
    assert out.loss.isfinite() and slopes.isfinite().all()
