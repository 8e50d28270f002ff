"""Each preference loss beside its naive formula, in float64: values, and gradients by autograd."""

import preference_cases as cases
import pytest
import torch
from naive_preference import TORCH
from preference_cases import PAIRED, UNPAIRED, WPO, Given, halves, stats, unpaired

from fused_rl import preference

EXACT = 1e-12


@pytest.fixture
def given() -> Given:
    return Given()


def assert_same(got, want, leaves) -> None:
    """Value and gradients, to 1e-12 absolutely and relatively."""
    torch.testing.assert_close(got.detach(), want.detach(), rtol=EXACT, atol=EXACT)
    ours = torch.autograd.grad(got, leaves, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(want, leaves, allow_unused=True, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert other.any()
        torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", PAIRED)
def test_from_log_probs(given, name):
    loss, formula = PAIRED[name]
    logprobs = given.logprobs().detach().requires_grad_()
    got = loss(stats(logprobs), given.batch()).loss
    want = formula(halves(cases.sequences(logprobs, given.ref, given.mask)), TORCH)
    assert_same(got, want, [logprobs])


@pytest.mark.parametrize("name", [*PAIRED, *WPO])
def test_from_hidden_states(given, name):
    loss, formula = (PAIRED | WPO)[name]
    want = formula(halves(given.naive(collisions=True)), TORCH)
    assert_same(given.ours(loss).loss, want, given.leaves)


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("mean", [-5.0, 5.0])
def test_of_unpaired_sequences(given, name, mean):
    """With the point of reference at 0, and above it."""
    loss, formula = UNPAIRED[name]
    given.ref = torch.where(cases.MISMATCHED[:, None], given.ref - mean, given.ref)
    batch = given.batch(desirable=cases.DESIRABLE, mismatched=cases.MISMATCHED)
    logprobs = given.logprobs().detach().requires_grad_()
    of = unpaired(cases.sequences(logprobs, given.ref, given.mask))
    assert (sum(s.r for s in of[1]) > 0) == (mean > 0)
    assert_same(loss(stats(logprobs), batch).loss, formula(*of), [logprobs])
    assert_same(given.ours(loss, batch).loss, formula(*unpaired(given.naive())), given.leaves)


def test_every_named_loss_has_a_formula():
    named = {name.split(",")[0] for name in (*PAIRED, *WPO, *UNPAIRED)}
    lower = {name for name in preference.__all__ if name.islower()}
    assert named == lower - {"wpo_weight"}


REPRESENTATIVE = ("dpo", "ipo", "simpo", "orpo", "aot", "ld_dpo", "mixture", "f_dpo, forward KL")


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_gradcheck(given, name):
    """Numeric derivatives of the values, in every direction."""
    loss, _ = PAIRED[name]

    def value(*leaves):
        given.hidden, given.weight, given.bias = leaves
        return given.ours(loss).loss

    assert torch.autograd.gradcheck(value, given.leaves)


def test_gradcheck_of_kto(given):
    """Numerically the point of reference moves, so that of one at 0 is differentiated."""
    loss, _ = UNPAIRED["kto"]
    given.ref = torch.where(cases.MISMATCHED[:, None], given.ref + 5, given.ref)
    batch = given.batch(desirable=cases.DESIRABLE, mismatched=cases.MISMATCHED)

    def value(*leaves):
        given.hidden, given.weight, given.bias = leaves
        return given.ours(loss, batch).loss

    assert torch.autograd.gradcheck(value, given.leaves)


def test_gradients_of_wpo_are_those_of_dpo_times_fixed_weights(given):
    """Numeric derivatives see what has no gradient, so gradcheck cannot judge: the weights can."""
    with torch.no_grad():
        aligned = (given.logprobs() - given.collisions()).where(given.mask, 0.0).sum(-1)
        weights = (aligned / given.mask.sum(-1)).exp()
    weights = weights[: cases.P] * weights[cases.P :]
    margins = (given.logprobs() - given.ref).where(given.mask, 0.0).sum(-1)
    margins = 0.3 * (margins[: cases.P] - margins[cases.P :])
    want = (weights * -torch.nn.functional.logsigmoid(margins)).mean()
    assert_same(given.ours(preference.wpo(beta=0.3)).loss, want, given.leaves)


def test_the_likelihood_counts_its_own_tokens(given):
    """Of the chosen, those of likelihood_mask, prompts for one, whatever loss_mask says."""
    likelihood = torch.zeros_like(given.mask)
    likelihood[:, 2:5] = True
    of = given.logprobs()[: cases.P, 2:5]
    got = given.ours(preference.sft(), given.batch(likelihood_mask=likelihood))
    assert_same(got.loss, -of.mean(), given.leaves)


def test_a_reference_beside_the_policy_is_its_log_probs(given):
    other = Given(seed=20)
    given.ref = (other.hidden @ other.weight.T + other.bias).div(cases.TEMPERATURE).log_softmax(-1)
    given.ref = given.ref.gather(-1, given.labels[..., None])[..., 0].detach()
    got = given.ours(
        *(preference.dpo(0.3), given.batch(ref_logprobs=None)),
        reference=(other.hidden, other.head),
    )
    want = PAIRED["dpo"][1](halves(given.naive()), TORCH)
    assert_same(got.loss, want, given.leaves)
    assert other.weight.grad is None and other.hidden.grad is None


def test_sums_of_the_reference_are_its_log_probs_added_up(given):
    sums = given.ref.where(given.mask, 0.0).sum(-1)
    for name in ("dpo", "ipo", "aot", "nca", "rpo"):
        loss, formula = PAIRED[name]
        want = formula(halves(given.naive()), TORCH)
        assert_same(given.ours(loss, given.batch(ref_logprobs=sums)).loss, want, given.leaves)
