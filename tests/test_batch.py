"""TokenBatch: padded equals packed, neutral values outside the mask, counts that stay."""

import pytest
import torch

import fused_rl
from fused_rl import Level, TokenBatch

LABELS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def test_padded_and_packed_hold_the_same_tokens():
    old = torch.arange(8.0).reshape(2, 4)
    padded = TokenBatch.padded(LABELS, MASK, torch.tensor([1.0, -2.0]), old_logprobs=old)
    packed = TokenBatch.packed(
        LABELS[MASK],
        torch.tensor([0, 3, 5]),
        torch.tensor([1.0, -2.0]),
        old_logprobs=old[MASK],
    )
    rows = padded.loss_mask.nonzero()[:, 0]
    for name in ("labels", "advantages", "sequence", "sequence_tokens", "old_logprobs"):
        assert torch.equal(getattr(padded, name)[rows], getattr(packed, name)), name
    assert padded.num_tokens == packed.num_tokens == 5
    assert padded.num_sequences == packed.num_sequences == 2
    assert packed.sequence_tokens.tolist() == [3, 3, 3, 2, 2]


def test_outside_the_mask_everything_is_neutral():
    old = torch.full((2, 4), float("nan"))
    labels = LABELS.clone()
    labels[~MASK] = 10**9
    advantages = torch.full((2, 4), float("inf"))
    batch = TokenBatch.padded(labels, MASK, advantages, old_logprobs=old, ref_logprobs=old)
    outside = ~batch.loss_mask
    assert (batch.labels[outside] == -100).all()
    assert (batch.advantages[outside] == 0).all()
    assert (batch.old_logprobs[outside] == 0).all()
    assert (batch.ref_logprobs[outside] == 0).all()


def test_a_counted_label_of_minus_100_is_not_ignored():
    labels = LABELS.clone()
    labels[0, 1] = -100
    batch = TokenBatch.padded(labels, MASK, torch.ones(2))
    assert batch.labels[1] == -1


def test_selected_rows_keep_the_counts_of_the_batch():
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2), ref_logprobs=torch.zeros(2, 4))
    part = batch.select(torch.tensor([4, 5]))
    assert part.labels.tolist() == [8, 9]
    assert part.sequence.tolist() == [1, 1]
    assert part.num_tokens == 5
    assert part.num_sequences == 2
    assert part.ref_logprobs.shape == (2,)
    assert part.old_logprobs is None


def test_a_slice_selects_views_of_the_same_tokens():
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2), ref_logprobs=torch.zeros(2, 4))
    views, copies = batch.select(slice(3, 6)), batch.select(torch.tensor([3, 4, 5]))
    assert views.shape == copies.shape == (3,)
    for name, value in vars(copies).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(views, name), value)
        else:
            assert getattr(views, name) == value
    assert views.labels.data_ptr() == batch.labels[3:].data_ptr()


def test_the_batch_does_not_follow_gradients_of_its_inputs():
    old = torch.zeros(2, 4, requires_grad=True)
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2), old_logprobs=old)
    assert not batch.old_logprobs.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[0]}, r"labels must be \[B, T\], got \[4\]"),
        ({"labels": LABELS.float()}, "labels must be an int64 or int32 tensor, got torch.float32"),
        ({"loss_mask": MASK[:, :3]}, r"loss_mask \[2, 3\] and labels \[2, 4\]"),
        (
            {"loss_mask": MASK.float()},
            r"loss_mask must be bool or 0/1 integers, got torch.float32: give loss_mask.bool\(\)$",
        ),
        (
            {"advantages": torch.ones(3)},
            r"one per sequence \(\[2\]\) or one per token .* got \[3\]",
        ),
        (
            {"advantages": torch.ones(2).long()},
            r"advantages must be float16.*got torch.int64: give advantages.float\(\)$",
        ),
        ({"old_logprobs": torch.ones(2)}, r"old_logprobs \[2\] and labels \[2, 4\]"),
    ],
)
def test_mistakes_in_padded_are_named(change, message):
    arguments = {"labels": LABELS, "loss_mask": MASK, "advantages": torch.ones(2), **change}
    with pytest.raises(ValueError, match=message):
        TokenBatch.padded(
            arguments.pop("labels"),
            arguments.pop("loss_mask"),
            arguments.pop("advantages"),
            **arguments,
        )


@pytest.mark.parametrize("cu_seqlens", [[0, 3], [1, 5], [0, 4, 3, 5]])
def test_cu_seqlens_that_do_not_span_the_tokens_are_named(cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to N = 5"):
        TokenBatch.packed(torch.zeros(5).long(), torch.tensor(cu_seqlens), torch.ones(5))


def test_per_token_advantages_win_where_sequences_and_tokens_are_equally_many():
    batch = TokenBatch.packed(
        torch.zeros(2).long(), torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0])
    )
    assert batch.advantages.tolist() == [1.0, 2.0]
    assert batch.sequence.tolist() == [0, 0]


def test_weights_are_one_outside_the_mask_and_follow_the_tokens():
    weights = torch.arange(8.0).reshape(2, 4)
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2), weights=weights)
    assert batch.weights.tolist() == [0, 1, 2, 1, 4, 5, 1, 1]
    assert batch.select(torch.tensor([4, 5])).weights.tolist() == [4, 5]
    assert batch.to("cpu").weights.tolist() == batch.weights.tolist()
    plain = TokenBatch.padded(LABELS, MASK, torch.ones(2))
    assert plain.weights is None
    for given in (weights, weights.reshape(-1)):
        assert torch.equal(plain.with_weights(given.requires_grad_()).weights, batch.weights)
    assert not plain.with_weights(weights).weights.requires_grad
    packed = TokenBatch.packed(
        LABELS[MASK], torch.tensor([0, 3, 5]), torch.ones(2), weights=weights[MASK]
    )
    assert packed.weights.tolist() == [0, 1, 2, 4, 5]


def test_a_narrower_mask_keeps_the_counts_of_the_batch():
    old = torch.full((2, 4), -1.0)
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2), old_logprobs=old, weights=old)
    keep = torch.tensor([[True, False, True, True], [False, True, True, True]])
    part = batch.with_mask(keep)
    assert part.loss_mask.tolist() == (MASK & keep).reshape(-1).tolist()
    assert part.labels.tolist() == [5, -100, 7, -100, -100, 9, -100, -100]
    assert part.old_logprobs.tolist() == [-1, 0, -1, 0, 0, -1, 0, 0]
    assert part.weights.tolist() == [-1, 1, -1, 1, 1, -1, 1, 1]
    assert part.advantages.tolist() == [1, 0, 1, 0, 0, 1, 0, 0]
    assert torch.equal(part.sequence_tokens, batch.sequence_tokens)
    assert (part.num_tokens, part.num_sequences) == (batch.num_tokens, batch.num_sequences)
    assert part.sequence_sum(torch.ones(8)).tolist() == [2, 1]


def test_levels_by_hand():
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2))
    values = torch.tensor([1.0, 2.0, 6.0, 99.0, 3.0, 4.0, 99.0, 99.0])
    rows = batch.loss_mask.nonzero()[:, 0]
    assert torch.equal(batch.at_level(values, Level.TOKEN), values)
    assert batch.at_level(values, Level.PRODUCT)[rows].tolist() == [9, 9, 9, 7, 7]
    assert batch.at_level(values, Level.GEOMETRIC)[rows].tolist() == [3, 3, 3, 3.5, 3.5]


def test_mistakes_in_weights_and_masks_are_named():
    batch = TokenBatch.padded(LABELS, MASK, torch.ones(2))
    with pytest.raises(ValueError, match=r"weights must be one per token, \[8\] or \[2, 4\]"):
        batch.with_weights(torch.ones(2))
    with pytest.raises(ValueError, match=r"weights must be float16.*got torch.int64"):
        batch.with_weights(torch.ones(8).long())
    with pytest.raises(ValueError, match=r"keep must be one per token, .* got \[4, 2\]"):
        batch.with_mask(MASK.T)
    with pytest.raises(ValueError, match=r"keep must be torch.bool, got torch.int64"):
        batch.with_mask(MASK.long())
    with pytest.raises(ValueError, match=r"weights \[2\] and labels \[2, 4\]"):
        TokenBatch.padded(LABELS, MASK, torch.ones(2), weights=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [fused_rl.dapo(), fused_rl.grpo(), fused_rl.dr_grpo(70000)])
def test_half_precision_advantages_lose_no_counts(dtype, loss):
    """70000 tokens are infinitely many in float16, and 40.06 are 40 in bfloat16."""
    labels = torch.zeros(1, 70000, dtype=torch.long)
    batch = TokenBatch.padded(labels, labels == 0, torch.ones(1, dtype=dtype))
    logprobs = torch.full((1, 70000), -1.0)
    value = loss(fused_rl.TokenStats(logprobs, 0 * logprobs), batch).loss
    assert value.item() == pytest.approx(-1, rel=1e-5)
