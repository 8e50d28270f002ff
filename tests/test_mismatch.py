"""Rollout mismatch: weights and masks by hand, against loops, padded and packed."""

import math

import pytest
import torch

from fused_rl import Level, TokenBatch
from fused_rl.mismatch import (
    acceptance_mask,
    masked_weights,
    off_policy_sequence_mask,
    top_entropy_mask,
    truncated_weights,
    veto_mask,
)

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
# Ratios 4, 1/2, 1 and 1/8, 2: products 2 and 1/4, geometric means 2^(1/3) and 1/2.
LOG2 = torch.tensor([[2.0, -1.0, 0.0], [-3.0, 1.0, 50.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
OLD = LOG2 * math.log(2) - 60
ROLLOUT = torch.full_like(OLD, -60.0)
C = 2 ** (1 / 3)


def padded(old=OLD, rollout=ROLLOUT, advantages=None) -> TokenBatch:
    if advantages is None:
        advantages = torch.zeros(len(MASK), dtype=torch.float64)
    return TokenBatch.padded(
        torch.zeros_like(MASK, dtype=torch.int64),
        MASK,
        advantages,
        old_logprobs=old,
        rollout_logprobs=rollout,
    )


def packed() -> TokenBatch:
    return TokenBatch.packed(
        torch.zeros(5, dtype=torch.int64),
        torch.tensor([0, 3, 5, 5]),
        torch.zeros(5, dtype=torch.float64),
        old_logprobs=OLD[MASK],
        rollout_logprobs=ROLLOUT[MASK],
    )


def counted(tensor: torch.Tensor) -> list:
    outside = tensor[~MASK.reshape(-1)]
    assert (outside == 1).all(), "neutral outside the mask"
    return tensor[MASK.reshape(-1)].tolist()


RATIOS = {
    Level.TOKEN: [4, 0.5, 1, 0.125, 2],
    Level.PRODUCT: [2, 2, 2, 0.25, 0.25],
    Level.GEOMETRIC: [C, C, C, 0.5, 0.5],
}


@pytest.mark.parametrize("level", list(Level))
def test_each_level_by_hand(level):
    ratios = RATIOS[level]
    low, high = 0.4, 1.5
    inside = [low <= r <= high for r in ratios]
    options = {"level": level, "low": low, "high": high}
    clipped = [min(max(r, low), high) for r in ratios]
    assert counted(truncated_weights(padded(), **options)) == pytest.approx(clipped)
    kept = [r if ok else 0 for r, ok in zip(ratios, inside, strict=True)]
    assert counted(masked_weights(padded(), **options)) == pytest.approx(kept)
    assert counted(acceptance_mask(padded(), **options)) == inside


@pytest.mark.parametrize("level", list(Level))
def test_padded_equals_packed(level):
    inside = MASK.reshape(-1)
    for function in (truncated_weights, masked_weights, acceptance_mask):
        assert torch.equal(function(padded(), level=level)[inside], function(packed(), level=level))
    assert torch.equal(veto_mask(padded(), floor=0.2)[inside], veto_mask(packed(), floor=0.2))


def test_one_improbable_token_vetoes_its_sequence():
    assert counted(veto_mask(padded(), floor=0.2)) == [True, True, True, False, False]
    assert counted(veto_mask(padded(), floor=0.6)) == [False] * 5
    assert counted(veto_mask(padded())) == [True] * 5


def test_current_log_probs_may_stand_in_for_old_ones():
    batch = padded(old=None)
    for logprobs in (OLD.clone().requires_grad_(), OLD.reshape(-1)):
        got = truncated_weights(batch, high=9.0, logprobs=logprobs)
        assert torch.equal(got, truncated_weights(padded(), high=9.0))
        assert not got.requires_grad


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_is_masked_reaches_nothing(garbage):
    dirty = padded(OLD.where(MASK, garbage), ROLLOUT.where(MASK, garbage))
    for level in Level:
        assert torch.equal(
            truncated_weights(dirty, level=level), truncated_weights(padded(), level=level)
        )
    assert torch.equal(veto_mask(dirty, floor=0.2), veto_mask(padded(), floor=0.2))


def test_a_token_the_rollout_gave_no_probability_stays_bounded():
    batch = padded(rollout=ROLLOUT.index_fill(1, torch.tensor([0]), -math.inf))
    assert counted(truncated_weights(batch)) == pytest.approx([2, 0.5, 1, 2, 2])
    assert counted(masked_weights(batch, low=0.4)) == pytest.approx([0, 0.5, 1, 0, 2])
    assert truncated_weights(batch, high=math.inf).isfinite().all()


def test_a_nan_is_rejected_with_its_sequence_and_no_other():
    batch = padded(
        rollout=ROLLOUT.index_put(
            (torch.tensor(0), torch.tensor(1)), torch.tensor(math.nan).double()
        )
    )
    accepted = acceptance_mask(batch, low=0.0, high=9.0)
    assert counted(accepted) == [False, False, False, True, True]
    assert counted(masked_weights(batch, low=0.0, high=9.0))[1] == 0
    assert counted(veto_mask(batch)) == [False, False, False, True, True]


def test_masks_and_weights_combine_on_the_batch():
    """A geometric filter, then truncated weights of tokens; sequences beyond it are gone."""
    batch = padded()
    batch = batch.with_mask(acceptance_mask(batch, low=0.9, high=1.5))
    batch = batch.with_weights(truncated_weights(batch, high=2.0))
    assert batch.loss_mask.tolist() == [True] * 3 + [False] * 6
    assert batch.weights.tolist() == pytest.approx([2, 0.5, 1] + [1] * 6)
    assert batch.num_tokens == 5


def test_weights_of_whole_sequences_have_mean_one_under_the_rollout_policy():
    """E_rollout[pi / rollout] = 1: sequences of two tokens out of three, all of them."""
    policy, rollout = torch.randn(2, 3, dtype=torch.float64).log_softmax(-1)
    tokens = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    batch = TokenBatch.padded(
        tokens,
        torch.ones_like(tokens),
        torch.zeros(9, dtype=torch.float64),
        old_logprobs=policy[tokens],
        rollout_logprobs=rollout[tokens],
    )
    weights = truncated_weights(batch, level=Level.PRODUCT, high=math.inf).reshape(9, 2)
    probability = rollout[tokens].sum(-1).exp()
    assert (probability @ weights).tolist() == pytest.approx([1, 1], abs=1e-14)


def test_off_policy_sequences_by_hand():
    """Gaps of ln 2 in the mean: those with a negative advantage go, if delta is below that."""
    advantages = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    batch = padded(advantages=advantages)
    current = OLD - torch.tensor([[0.0, 3.0, 0.0], [0.5, 0.5, 9.0], [9.0, 9.0, 9.0]]) * math.log(2)
    mask = off_policy_sequence_mask(current, batch, delta=0.6)
    assert counted(mask) == [False, True, True, True, True]
    assert counted(off_policy_sequence_mask(current, batch, delta=0.7)) == [True] * 5
    assert counted(off_policy_sequence_mask(current, batch, delta=0.3)) == [
        False, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(1e-9, [1]), (0.2, [1]), (0.21, [1, 3]), (0.4, [1, 3]), (0.5, [0, 1, 3, 4]), (1.0, range(5))],
)
def test_top_entropy_by_hand(fraction, kept):
    """Entropies 1, 4, 0, 3, 1 of the counted tokens: of equal ones all stay."""
    entropy = torch.tensor([[1.0, 4.0, 0.0], [3.0, 1.0, 99.0], [99.0, 99.0, 99.0]])
    mask = top_entropy_mask(entropy, padded(), fraction=fraction)
    assert [i for i, keep in enumerate(counted(mask)) if keep] == list(kept)
    flat = top_entropy_mask(entropy.reshape(-1).requires_grad_(), padded(), fraction=fraction)
    assert torch.equal(flat, mask)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_top_entropy_counts_as_python_does(default):
    """0.3 * 50 is 15, and was 16 in float32: 15 pairs of these."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for tokens in (1, 7, 10, 50, 90, 100, 170, 180, 1000, 4001):
            entropy = torch.randperm(tokens).double()
            batch = TokenBatch.packed(
                torch.zeros(tokens, dtype=torch.int64),
                torch.tensor([0, tokens]),
                torch.zeros(tokens, dtype=torch.float32),
            )
            for fraction in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1.0, 1 / 3):
                kept = top_entropy_mask(entropy, batch, fraction=fraction)
                assert kept.sum() == math.ceil(fraction * tokens), (tokens, fraction)
                assert entropy[kept].min() == tokens - kept.sum()
    finally:
        torch.set_default_dtype(before)


def test_an_entropy_of_nan_ranks_last():
    entropy = torch.tensor([[1.0, math.nan, 0.0], [3.0, math.nan, 99.0], [99.0, 99.0, 99.0]])
    assert counted(top_entropy_mask(entropy, padded(), fraction=0.4)) == [1, 0, 0, 1, 0]
    assert counted(top_entropy_mask(torch.full((9,), math.nan), padded(), fraction=0.4)) == [1] * 5


def test_nothing_counted():
    empty = TokenBatch.packed(
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([0]),
        torch.zeros(0),
        old_logprobs=torch.zeros(0),
        rollout_logprobs=torch.zeros(0),
    )
    for level in Level:
        assert truncated_weights(empty, level=level).shape == (0,)
    assert veto_mask(empty).shape == top_entropy_mask(torch.zeros(0), empty).shape == (0,)
    masked = padded().with_mask(torch.zeros_like(MASK))
    assert veto_mask(masked).all()
    assert top_entropy_mask(torch.zeros(9), masked).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs a batch with rollout_logprobs; it has None"):
        truncated_weights(padded(rollout=None))
    with pytest.raises(ValueError, match="needs a batch with old_logprobs, or logprobs="):
        veto_mask(padded(old=None))
    with pytest.raises(ValueError, match="needs a batch with old_logprobs; it has None"):
        off_policy_sequence_mask(OLD, padded(old=None), delta=0.1)
    with pytest.raises(ValueError, match=r"low must not exceed high, got 2.0 and 1.0"):
        acceptance_mask(padded(), low=2.0, high=1.0)
    with pytest.raises(ValueError, match=r"logprobs must be one per token, \[3, 3\], got \[2\]"):
        masked_weights(padded(), logprobs=torch.zeros(2))
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"fraction must be in \(0, 1\], got {fraction}"):
            top_entropy_mask(torch.zeros(9), padded(), fraction=fraction)
