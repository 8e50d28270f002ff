"""Means: each denominator by hand, and micro-batches that add up."""

import pytest
import torch

from fused_rl import TokenBatch
from fused_rl.means import (
    FixedLengthMean,
    LengthWeightedMean,
    RolloutMean,
    SequenceMean,
    SequenceSumMean,
    TokenMean,
    TokenSum,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def batch(mask=MASK):
    return TokenBatch.padded(torch.zeros_like(mask), mask, torch.zeros(len(mask)))


def test_token_mean_by_hand():
    expected = MASK.reshape(-1) / 4
    torch.testing.assert_close(TokenMean()(batch()), expected)
    torch.testing.assert_close(TokenMean(num_tokens=8)(batch()), expected / 2)


def test_sequence_mean_by_hand_counts_empty_sequences():
    expected = (MASK / torch.tensor([[9.0], [3.0], [1.0]])).reshape(-1)
    torch.testing.assert_close(SequenceMean()(batch()), expected)
    torch.testing.assert_close(SequenceMean(num_sequences=6)(batch()), expected / 2)


def test_fixed_length_mean_by_hand():
    expected = MASK.reshape(-1) / 30
    torch.testing.assert_close(FixedLengthMean(10)(batch()), expected)
    torch.testing.assert_close(FixedLengthMean(10, num_sequences=6)(batch()), expected / 2)


def test_sums_by_hand():
    torch.testing.assert_close(TokenSum()(batch()), MASK.reshape(-1).float())
    torch.testing.assert_close(SequenceSumMean()(batch()), MASK.reshape(-1) / 3)
    torch.testing.assert_close(SequenceSumMean(num_sequences=6)(batch()), MASK.reshape(-1) / 6)


def test_length_weighted_mean_by_hand():
    expected = (MASK * torch.tensor([[3.0], [1.0], [0.0]])).reshape(-1) / 30
    torch.testing.assert_close(LengthWeightedMean(10)(batch()), expected)
    torch.testing.assert_close(LengthWeightedMean(10, num_sequences=6)(batch()), expected / 2)


def test_rollout_mean_by_hand():
    """Sequences 0 and 1 are one rollout of 4 tokens, sequence 2 is an empty one."""
    mean = RolloutMean(torch.tensor([4, 4, 0]), num_rollouts=2)
    torch.testing.assert_close(mean(batch()), MASK.reshape(-1) / 8)


@pytest.mark.parametrize("count", [8, 8.0, torch.tensor(8), torch.tensor(8.0)])
def test_a_count_may_be_a_number_or_a_tensor(count):
    weights = TokenMean(num_tokens=count)(batch())
    torch.testing.assert_close(weights, MASK.reshape(-1) / 8)


def test_counts_divided_by_the_ranks_undo_the_averaging_of_gradients():
    """Two ranks hold 3 and 1 of 4 tokens; DDP divides the sum of their gradients by 2."""
    pieces = [TokenMean(num_tokens=4 / 2)(batch(MASK[rows])) for rows in (slice(1), slice(1, 3))]
    torch.testing.assert_close(torch.cat(pieces) / 2, TokenMean()(batch()))


def test_dtype_is_that_of_the_advantages():
    exact = TokenBatch.padded(torch.zeros_like(MASK), MASK, torch.zeros(3, dtype=torch.float64))
    for mean in MEANS:
        assert mean(batch()).dtype == torch.float32
        assert mean(exact).dtype == torch.float64


MEANS = [
    TokenMean(),
    TokenSum(),
    SequenceMean(),
    SequenceSumMean(),
    FixedLengthMean(4),
    LengthWeightedMean(4),
    RolloutMean(torch.zeros(3).long(), 1),
]


@pytest.mark.parametrize("mean", MEANS, ids=lambda mean: type(mean).__name__)
def test_nothing_counted_weighs_nothing(mean):
    assert (mean(batch(torch.zeros(2, 3).long())) == 0).all()


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (TokenMean(), TokenMean(num_tokens=4)),
        (SequenceMean(), SequenceMean(num_sequences=3)),
        (SequenceSumMean(), SequenceSumMean(num_sequences=3)),
        (FixedLengthMean(7), FixedLengthMean(7, num_sequences=3)),
        (LengthWeightedMean(7), LengthWeightedMean(7, num_sequences=3)),
        (TokenSum(), TokenSum()),
    ],
)
def test_uneven_micro_batches_with_global_counts_have_the_weights_of_the_step(whole, part):
    pieces = torch.cat([part(batch(MASK[:1])), part(batch(MASK[1:]))])
    torch.testing.assert_close(pieces, whole(batch()))


@pytest.mark.parametrize("mean", MEANS, ids=lambda mean: type(mean).__name__)
def test_selected_tokens_keep_their_weights(mean):
    """So that a loss can be formed chunk by chunk."""
    rows = torch.tensor([4, 1, 2])
    assert torch.equal(mean(batch().select(rows)), mean(batch())[rows])
