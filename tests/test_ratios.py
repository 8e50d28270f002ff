"""Ratio levels: by hand, against naive loops, padded and packed."""

from functools import partial

import drawn
import naive
import pytest
import torch
from hypothesis import given

from fused_rl import PolicyLoss, TokenBatch
from fused_rl.means import SequenceMean, TokenMean
from fused_rl.ratios import (
    ClippedGeometricRatio,
    GeometricRatio,
    GeometricTokenRatio,
    ProductRatio,
    TokenRatio,
)
from fused_rl.surrogates import CISPO, SAPO, Clip, Kimi, Unclipped

LEVELS = {
    "token": (TokenRatio(), naive.token),
    "sequence": (GeometricRatio(), naive.sequence),
    "sequence, token": (GeometricTokenRatio(), naive.sequence_token),
    "product": (ProductRatio(), naive.product),
    "gmpo": (ClippedGeometricRatio(), partial(naive.gmpo, low=0.4, high=0.4)),
    "gmpo at the bounds": (
        ClippedGeometricRatio(0.125, 0.5),
        partial(naive.gmpo, low=0.125, high=0.5),
    ),
}
FORMULAS = {
    Clip(dual=3.0): partial(naive.ppo, dual=3.0),
    Unclipped(): naive.unclipped,
    CISPO(): naive.cispo,
    SAPO(): naive.sapo,
    Kimi(0.5): naive.kimi,
}


def uneven() -> tuple[torch.Tensor, TokenBatch]:
    """Log-ratios 1, 2, 6; 4, -8 and nothing; garbage where nothing counts."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    x = torch.tensor([[1.0, 2, 6], [4, -8, 200], [200, 200, 200]], dtype=torch.float64)
    A = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    return x.reshape(-1).requires_grad_(), TokenBatch.padded(torch.zeros_like(mask), mask, A)


@pytest.mark.parametrize(
    ("ratio", "first", "second"),
    [
        (TokenRatio(), [1.0, 2.0, 6.0], [4.0, -8.0]),
        (GeometricRatio(), [3.0, 3.0, 3.0], [-2.0, -2.0]),
        (GeometricTokenRatio(), [3.0, 3.0, 3.0], [-2.0, -2.0]),
        (ProductRatio(), [9.0, 9.0, 9.0], [-4.0, -4.0]),
        (ClippedGeometricRatio(0.5, 1.5), [4 / 3, 4 / 3, 4 / 3], [1.75, 1.75]),
    ],
)
def test_by_hand(ratio, first, second):
    x, batch = uneven()
    found = ratio(x, batch)[batch.loss_mask]
    torch.testing.assert_close(found, torch.tensor(first + second, dtype=torch.float64))
    assert ratio.token_separable is isinstance(ratio, TokenRatio)


@pytest.mark.parametrize(
    ("ratio", "slopes"),
    [
        (GeometricRatio(), [1 / 3, 1 / 3, 1 / 3]),
        (GeometricTokenRatio(), [1.0, 0.0, 0.0]),
        (ProductRatio(), [1.0, 1.0, 1.0]),
        (ClippedGeometricRatio(0.5, 1.5), [1 / 3, 0.0, 0.0]),
    ],
)
def test_gradient_by_hand_of_the_first_token(ratio, slopes):
    x, batch = uneven()
    (gradient,) = torch.autograd.grad(ratio(x, batch)[0], x)
    torch.testing.assert_close(gradient, torch.tensor(slopes + [0.0] * 6, dtype=torch.float64))


@pytest.mark.parametrize("name", LEVELS)
@drawn.examples(15)
@given(tokens=drawn.batches())
def test_every_level_against_naive_loops(name, tokens):
    ratio, level = LEVELS[name]
    for surrogate, formula in FORMULAS.items():
        for mean, naive_mean in (
            (SequenceMean(), naive.sequence_mean),
            (TokenMean(), naive.token_mean),
        ):
            value = drawn.ours(PolicyLoss(surrogate, ratio, mean=mean), tokens)
            expected = naive.loss(tokens, level, formula, naive_mean)
            drawn.assert_same(value, expected, tokens.logprobs)


@pytest.mark.parametrize("name", LEVELS)
@drawn.examples(15)
@given(tokens=drawn.batches())
def test_padded_and_packed_are_the_same_numbers(name, tokens):
    loss = PolicyLoss(Unclipped(), LEVELS[name][0], mean=SequenceMean())
    drawn.assert_same(
        loss.objective(*drawn.packed(tokens)), drawn.ours(loss, tokens), tokens.logprobs
    )


@drawn.examples(15)
@given(tokens=drawn.batches(per_token=False))
def test_gspo_token_has_the_gradient_of_gspo_where_a_sequence_has_one_advantage(tokens):
    gradients = [
        torch.autograd.grad(
            drawn.ours(PolicyLoss(ratio=ratio, mean=SequenceMean()), tokens), tokens.logprobs
        )[0]
        for ratio in (GeometricRatio(), GeometricTokenRatio())
    ]
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("name", LEVELS)
def test_gradcheck(name):
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 2, 0])[:, None]
    A = torch.randn(3, 4, dtype=torch.float64)
    batch = TokenBatch.padded(torch.zeros_like(mask).long(), mask, A)
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    ratio = LEVELS[name][0]
    if not isinstance(ratio, GeometricTokenRatio):  # whose gradient is not that of its value
        assert torch.autograd.gradcheck(lambda x: ratio(x, batch)[batch.loss_mask], x)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("size", [200.0, -200.0])
def test_extreme_sequences_are_finite(name, size):
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    batch = TokenBatch.padded(
        torch.zeros(1, 3).long(),
        torch.ones(1, 3).bool(),
        torch.tensor([-1.0]),
        old_logprobs=logprobs.detach() - size,
    )
    for surrogate in FORMULAS:
        output = PolicyLoss(surrogate, LEVELS[name][0])(drawn.stats(logprobs), batch)
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in output.metrics.values())
