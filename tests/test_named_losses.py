"""Named losses: each against a naive formula, padded and packed, whole and in micro-batches."""

import inspect
from dataclasses import replace
from functools import partial

import drawn
import naive
import pytest
import torch
from by_name import NEEDS, loss_of
from hypothesis import given
from packaging.version import parse

import fused_rl
from fused_rl import KL, KLPenalty, TokenBatch, TokenStats, linear_policy_loss
from fused_rl.losses import named
from fused_rl.trust_regions import DPPOKL, ClipCov

COUPLED = {"clip_cov", "kl_cov"}
# Options a name needs here, and what naive.py makes of it: level, formula, mean.
NAIVE = {
    "ppo": ({"dual": 3.0}, naive.token, partial(naive.ppo, dual=3.0), naive.token_mean),
    "grpo": ({}, naive.token, naive.ppo, naive.sequence_mean),
    "bnpo": ({}, naive.token, naive.ppo, naive.token_mean),
    "dapo": ({}, naive.token, partial(naive.ppo, high=0.28), naive.token_mean),
    "dr_grpo": ({"length": 11}, naive.token, naive.ppo, naive.fixed_length_mean),
    "cispo": ({}, naive.token, naive.cispo, naive.token_mean),
    "gspo": ({}, naive.sequence, partial(naive.ppo, low=3e-4, high=4e-4), naive.sequence_mean),
    "gspo_token": (
        {},
        naive.sequence_token,
        partial(naive.ppo, low=3e-4, high=4e-4),
        naive.sequence_mean,
    ),
    "sapo": ({}, naive.token, naive.sapo, naive.sequence_mean),
    "gmpo": ({}, partial(naive.gmpo, low=0.4, high=0.4), naive.unclipped, naive.sequence_mean),
    "luspo": (
        {},
        naive.sequence,
        partial(naive.ppo, low=3e-4, high=4e-4),
        naive.sequence_sum_mean,
    ),
    "vespo": ({}, naive.product, naive.vespo, naive.token_mean),
    "dppo": ({}, naive.token, naive.dppo_tv, naive.token_mean),
    "gpg": ({}, naive.token, naive.reinforce, naive.token_mean),
    "reinforce_plus_plus": ({}, naive.token, naive.ppo, naive.token_mean),
    "rloo": ({}, naive.product, naive.ppo, naive.sequence_mean),
    "kimi": ({"tau": 0.5}, naive.product, naive.kimi, naive.sequence_mean),
    "dro": ({}, naive.token, naive.dro, naive.token_mean),
    "aspo": ({}, naive.token, naive.aspo, naive.token_mean),
}
BY_TOKENS = {n for n, (_, _, _, mean) in NAIVE.items() if mean is naive.token_mean}


def test_every_name_is_public_and_has_a_naive_formula():
    assert set(named.NAMES) == set(NAIVE) | COUPLED
    for name, constructor in named.NAMES.items():
        assert getattr(fused_rl, name) is constructor
        assert "Advantages:" in constructor.__doc__ or "arXiv" in constructor.__doc__


@pytest.mark.parametrize("name", NAIVE)
@drawn.examples(20)
@given(tokens=drawn.batches())
def test_named_losses_against_naive_formulas(name, tokens):
    options, level, formula, mean = NAIVE[name]
    value = drawn.ours(named.NAMES[name](**options), tokens)
    drawn.assert_same(value, naive.loss(tokens, level, formula, mean), tokens.logprobs)


@drawn.examples(20)
@given(tokens=drawn.batches())
def test_named_losses_of_chosen_tokens_against_naive_formulas(tokens):
    selection = ClipCov(cov_low=0.0, fraction=0.3)
    for loss, terms in (
        (named.clip_cov(selection=selection), naive.clip_cov(tokens, 0.0, 5.0, 0.3)),
        (named.kl_cov(coef=0.5, fraction=0.3), naive.kl_cov(tokens, 0.5, 0.3)),
        (named.dppo(trust_region=DPPOKL()), naive.terms(tokens, naive.token, naive.dppo_kl)),
    ):
        expected = naive.total(tokens, terms, naive.token_mean)
        drawn.assert_same(drawn.ours(loss, tokens), expected, tokens.logprobs)


TRL = {
    ("grpo", False): named.grpo(),
    ("bnpo", False): named.bnpo(),
    ("dr_grpo", False): named.dr_grpo(11),
    ("dapo", False): named.dapo(clip_high=0.2),
    ("cispo", False): named.cispo(),
    ("sapo", False): named.sapo(),
    ("vespo", False): named.vespo(),
    ("grpo", True): named.gspo(clip_low=0.2, clip_high=0.2),
    ("dapo", True): replace(named.dapo(clip_high=0.2), ratio=fused_rl.ratios.GeometricRatio()),
    ("cispo", True): replace(named.cispo(), ratio=fused_rl.ratios.GeometricRatio()),
    ("luspo", True): named.luspo(clip_low=0.2, clip_high=0.2),
}


@pytest.mark.parametrize("case", TRL, ids=str)
@drawn.examples(15)
@given(tokens=drawn.batches(per_token=False))
def test_trl_loss_types(case, tokens):
    loss_type, by_sequence = case
    if tokens.mask.any():
        expected = naive.trl(tokens, loss_type, by_sequence)
        drawn.assert_same(drawn.ours(TRL[case], tokens), expected, tokens.logprobs)


@drawn.examples(15)
@given(tokens=drawn.batches(per_token=False))
def test_luspo_at_token_level_of_older_trl_divides_by_the_padded_width(tokens):
    if tokens.mask.any():
        mean = fused_rl.means.LengthWeightedMean(tokens.mask.shape[1])
        value = drawn.ours(fused_rl.PolicyLoss(mean=mean), tokens)
        drawn.assert_same(value, naive.trl(tokens, "luspo"), tokens.logprobs)


class Step:
    """Six uneven sequences, one of them empty, with everything a loss may ask for."""

    def __init__(self):
        torch.manual_seed(7)
        lengths = torch.tensor([6, 2, 0, 5, 1, 4])
        self.mask = torch.arange(6) < lengths[:, None]
        self.labels = torch.randint(0, 13, (6, 6))
        self.hidden = torch.randn(6, 6, 5, dtype=torch.float64, requires_grad=True)
        self.weight = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
        now = fused_rl.linear_logprobs(self.hidden, self.weight, self.labels).logprobs.detach()
        self.old = now + 0.4 * torch.randn(6, 6).double()
        self.ref = now + 0.4 * torch.randn(6, 6).double()
        self.advantages = torch.randn(6, dtype=torch.float64)
        self.weights = torch.rand(6, 6).double()

    def batch(self, rows=slice(None), **more) -> TokenBatch:
        return TokenBatch.padded(
            self.labels[rows],
            self.mask[rows],
            self.advantages[rows],
            old_logprobs=self.old[rows],
            ref_logprobs=self.ref[rows],
            **more,
        )

    def gradients(self, loss, rows=slice(None)) -> list[torch.Tensor]:
        output = linear_policy_loss(self.hidden[rows], self.weight, self.batch(rows), loss)
        return list(torch.autograd.grad(output.loss, (self.hidden, self.weight)))

    def stats(self) -> TokenStats:
        labels = self.labels.where(self.mask, -100)
        return fused_rl.linear_logprobs(self.hidden, self.weight, labels)


@pytest.mark.parametrize("name", [n for n in NAIVE if n != "bnpo"])
def test_uneven_micro_batches_add_up_to_the_step(name):
    """In float64, to 1e-12, whatever couples the tokens of a sequence. bnpo does not mean to."""
    step = Step()
    terms = {"beta": 0.1, "entropy_coef": 0.02}
    count = {"num_tokens": 18} if name in BY_TOKENS else {"num_sequences": 6}
    whole, part = loss_of(name, **terms), loss_of(name, **terms, **count)
    expected = step.gradients(whole)
    total = [torch.zeros_like(g) for g in expected]
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        for sum_, gradient in zip(total, step.gradients(part, rows), strict=True):
            sum_ += gradient
    for a, b in zip(total, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("name", named.NAMES)
def test_padded_and_packed_are_the_same_loss(name):
    step = Step()
    loss = loss_of(name, beta=0.1)
    mask = step.mask
    packed = TokenBatch.packed(
        step.labels[mask],
        torch.cat([torch.zeros(1).long(), mask.sum(-1).cumsum(0)]),
        step.advantages,
        old_logprobs=step.old[mask],
        ref_logprobs=step.ref[mask],
    )
    one = linear_policy_loss(step.hidden, step.weight, step.batch(), loss)
    other = linear_policy_loss(step.hidden[mask], step.weight, packed, loss)
    drawn.assert_same(other.loss, one.loss, step.hidden)
    for key, value in one.metrics.items():
        torch.testing.assert_close(other.metrics[key], value)


@pytest.mark.parametrize("name", named.NAMES)
def test_the_head_takes_one_pass_where_tokens_are_separable(name):
    step = Step()
    loss = loss_of(name, beta=0.1, entropy_coef=0.05)
    batch = step.batch(weights=step.weights)
    output = linear_policy_loss(step.hidden, step.weight, batch, loss)
    one_pass = type(output.loss.grad_fn).__name__ == "_OnePassBackward"
    coupled = {"gspo", "gspo_token", "gmpo", "luspo", "vespo", "rloo", "kimi"} | COUPLED
    assert one_pass is loss.token_separable is (name not in coupled)
    drawn.assert_same(output.loss, loss(step.stats(), batch).loss, step.hidden)


@pytest.mark.parametrize("name", named.NAMES)
def test_nothing_counted_is_a_loss_of_0_with_gradients_of_0(name):
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    for mask in (torch.zeros(2, 3).bool(), torch.zeros(0, 3).bool()):
        rows = slice(len(mask))
        batch = TokenBatch.padded(torch.zeros_like(mask).long(), mask, torch.ones(len(mask)))
        output = linear_policy_loss(hidden[rows], weight, batch, loss_of(name))
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        assert output.loss == 0 and not any(g.any() for g in gradients)
        assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("name", NAIVE)
def test_weights_multiply_the_surrogate_and_nothing_else(name):
    step = Step()
    stats = TokenStats(*(t.detach() for t in step.stats()))
    plain, weighted = step.batch(), step.batch(weights=step.weights)
    loss = loss_of(name, beta=0.3, entropy_coef=0.2)
    bare = replace(loss, kl=None, entropy_coef=0.0)
    terms = loss.objective(stats, plain) - bare.objective(stats, plain)
    found = loss.objective(stats, weighted) - bare.objective(stats, weighted)
    torch.testing.assert_close(found, terms)
    # The same as a mean whose weights are multiplied.
    product = replace(bare, mean=lambda batch: loss.mean(batch) * weighted.weights)
    expected = product.objective(stats, plain)
    torch.testing.assert_close(bare.objective(stats, weighted), expected)


@pytest.mark.skipif(
    parse(torch.__version__) < parse("2.13"),
    reason="its compiler hashes a loss that it has not filled yet",
)
@pytest.mark.parametrize("name", named.NAMES)
def test_a_loss_made_inside_a_compiled_function(name):
    """One graph; its value, its gradient and what it reports are those of eager torch."""
    step = Step()
    batch, entropy = step.batch(), step.stats().entropy.detach()
    leaf = step.stats().logprobs.detach().requires_grad_()

    def output(logprobs):
        loss = loss_of(name, beta=0.1, entropy_coef=0.1)
        return loss(TokenStats(logprobs, entropy), batch)

    torch._dynamo.reset()
    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")(leaf)
    expected = output(leaf)
    assert torch.equal(compiled.loss, expected.loss) and expected.loss.isfinite()
    gradients = [torch.autograd.grad(of.loss, leaf)[0] for of in (compiled, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
    left_out = {"zero_gradient_fraction"}
    assert expected.metrics.keys() - compiled.metrics.keys() == left_out
    for key, value in compiled.metrics.items():
        torch.testing.assert_close(value, expected.metrics[key], rtol=1e-14, atol=0)


def test_terms_reach_the_loss():
    for name in named.NAMES:
        loss = loss_of(name, beta=0.1, kl=KL.K1, kl_grad=KL.K2, entropy_coef=0.3)
        assert loss.kl == KLPenalty(0.1, KL.K1, KL.K2) and loss.entropy_coef == 0.3
        assert loss_of(name).kl == KLPenalty(0.0)
    beta = torch.tensor(0.0)
    assert named.grpo(beta=beta).kl.beta is beta


@pytest.mark.parametrize("name", named.NAMES)
def test_an_option_that_a_loss_does_not_have(name):
    with pytest.raises(TypeError) as raised:
        loss_of(name, clip_higher=0.3)
    said = str(raised.value)
    assert said.startswith(
        f"{name}() got an unexpected keyword argument 'clip_higher'; its options"
    )
    options = said.partition("options are ")[2].split(", ")
    own = inspect.signature(named.NAMES[name]).parameters
    assert set(options) == {*own, *named.Terms.__annotations__} - {"terms"}


def test_an_option_that_a_loss_of_ones_own_does_not_have():
    def mine(**terms):
        parts = fused_rl.surrogates.Clip(), fused_rl.ratios.TokenRatio(), fused_rl.means.TokenMean()
        return named.compose(*parts, **terms)

    assert mine(entropy_coef=0.3).entropy_coef == 0.3
    with pytest.raises(
        TypeError, match=r"^mine\(\) got .* 'clip_higher'; its options are beta, kl,"
    ):
        mine(clip_higher=0.3)


@pytest.mark.parametrize("name", named.NAMES)
def test_counts_go_by_name(name):
    """A beta or a count in the wrong place would scale the loss and raise nothing."""
    (*own,) = NEEDS.get(name, {}).values()
    with pytest.raises(TypeError, match="positional"):
        named.NAMES[name](*own, 64)


def test_options_reach_the_surrogate():
    assert named.ppo(clip_low=0.1, clip_high=0.3, dual=4.0).surrogate == fused_rl.surrogates.Clip(
        0.1, 0.3, 4.0
    )
    assert named.cispo(ratio_min=0.5, ratio_max=2.0).surrogate == fused_rl.surrogates.CISPO(
        0.5, 2.0
    )
    assert named.sapo(tau_positive=2.0).surrogate == fused_rl.surrogates.SAPO(2.0, 1.05)
    assert named.vespo(positive=(1.0, 2.0)).surrogate == fused_rl.surrogates.VESPO(
        1.0, 2.0, 3.0, 2.0
    )
    assert named.gmpo(clip_low=0.1).ratio == fused_rl.ratios.ClippedGeometricRatio(0.1, 0.4)
    assert named.aspo(dual=2.0).surrogate == fused_rl.surrogates.ASPO(0.2, 0.2, 2.0)
    assert named.dro(penalty=0.2).surrogate == fused_rl.surrogates.DRO(0.2)
