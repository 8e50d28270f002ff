"""Means: each denominator by hand, and micro-batches that add up."""

import pytest
import torch

from fused_rl import FixedLengthMean, SequenceMean, TokenBatch, TokenMean

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


@pytest.mark.parametrize("mean", [TokenMean(), SequenceMean(), FixedLengthMean(4)])
def test_nothing_counted_weighs_nothing(mean):
    assert (mean(batch(torch.zeros(2, 3).long())) == 0).all()


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (TokenMean(), TokenMean(num_tokens=4)),
        (SequenceMean(), SequenceMean(num_sequences=3)),
        (FixedLengthMean(7), FixedLengthMean(7, num_sequences=3)),
    ],
)
def test_uneven_micro_batches_with_global_counts_have_the_weights_of_the_step(whole, part):
    pieces = torch.cat([part(batch(MASK[:1])), part(batch(MASK[1:]))])
    torch.testing.assert_close(pieces, whole(batch()))
