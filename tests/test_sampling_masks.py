"""Kept sets of a batch from what engines report, and a batch that carries them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import IGNORED

from fused_rl import TokenBatch
from fused_rl.sampling_masks import KeptSets, SamplingMask, kept_sets

GENERATED = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
SETS = [[], [1, 2], [3], [], [7], [], [-1], [5, 6], [], [], [], []]

# The same sets in every form that there is of them.
FORMS = {
    "vLLM": [
        SimpleNamespace(token_ids=[1, 2, 3], offsets=[0, 2, 3]),
        SimpleNamespace(
            token_ids=np.array([7, -1, 5, 6], dtype=np.int32), offsets=np.array([0, 1, 2, 4])
        ),
        None,
    ],
    "SGLang": [[[1, 2], [3]], [[7], None, [5, 6]], []],
    "arrays": [
        [np.array([1, 2], dtype=np.int32), torch.tensor([3])],
        [(7,), None, torch.tensor([5, 6], dtype=torch.int32)],
        None,
    ],
    "by hand": (
        SamplingMask([1, 2, 3], torch.tensor([0, 2, 3])),
        SamplingMask(torch.tensor([7, -1, 5, 6]), [0, 1, 2, 4]),
        SamplingMask([], [0]),
    ),
}


def sets_of(kept, cu_kept) -> list[list[int]]:
    assert kept.dtype == cu_kept.dtype == torch.int64
    bounds = zip(cu_kept.tolist()[:-1], cu_kept.tolist()[1:], strict=True)
    return [kept[first:last].tolist() for first, last in bounds]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sets(form):
    assert sets_of(*kept_sets(FORMS[form], GENERATED)) == SETS
    assert sets_of(*kept_sets(FORMS[form], GENERATED.bool())) == SETS


def test_packed_sequences():
    generated, cu_seqlens = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0, 3, 3, 5])
    masks = [[[1, 2], [3]], None, SamplingMask([4, 5], [0, 1, 2])]
    got = kept_sets(masks, generated, cu_seqlens=cu_seqlens)
    assert sets_of(*got) == [[], [1, 2], [3], [4], [5]]


def test_a_sequence_without_sets_has_the_whole_vocabulary():
    got = kept_sets([None], torch.tensor([[0, 1, 1]]))
    assert sets_of(*got) == [[], [-1], [-1]]


def test_a_sequence_that_is_left_out_may_bring_its_sets():
    got = kept_sets([[[1], [2]], [[3]]], torch.tensor([[0, 0], [1, 0]]))
    assert sets_of(*got) == [[], [], [3], []]


@pytest.mark.parametrize("B", [0, 2])
def test_without_generated_tokens(B):
    got = kept_sets([None] * B, torch.zeros(B, 3, dtype=torch.bool))
    assert isinstance(got, KeptSets)
    assert got.kept.tolist() == [] and got.cu_kept.tolist() == [0] * (3 * B + 1)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1]], r"masks\[0\] has 1 sets, for 2 generated tokens"),
        ([[1], [2], [3]], r"masks\[0\] has 3 sets, for 2 generated tokens"),
        ([[1], []], r"the set of token 1 in masks\[0\] is empty: give None in a list"),
        (SamplingMask([1], [0, 0, 1]), r"the set of token 0 in masks\[0\] is empty"),
        (SamplingMask([1, 2], [0, 2, 1]), r"masks\[0\]: offsets\[2\] is 1, below offsets\[1\]"),
        (SamplingMask([1, 2], [0, 1, 3]), r"offsets\[2\] is 3, and must be the length of token_id"),
        (SamplingMask([1, 2], []), r"offsets of masks\[0\] must be \[T \+ 1\], got \[0\]"),
        (SamplingMask([1.5, 2], [0, 1, 2]), r"token_ids of masks\[0\] must be \[n\] of int64"),
        ([[1.5], [2]], r"masks\[0\] must be \[n\] of int64 or int32, got \[1.5, 2\]"),
        ([torch.tensor([0.5]), [2]], r"masks\[0\]\[0\] must be \[n\] of int64 or int32"),
        ([[1], "x"], r"masks\[0\]\[1\] must be integers, got 'x'"),
        ("ab", r"masks\[0\] must have token_ids and offsets, or be a list"),
        (3, r"masks\[0\] must have token_ids and offsets, or be a list"),
    ],
)
def test_mistakes_in_a_mask_are_named(mask, message):
    with pytest.raises(ValueError, match=message):
        kept_sets([mask], torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize("masks", [[None], None, [None] * 3])
def test_masks_are_one_per_sequence(masks):
    with pytest.raises(ValueError, match="masks must be one per sequence, 2, got"):
        kept_sets(masks, GENERATED[:2])


def batch_of() -> TokenBatch:
    kept = kept_sets(FORMS["SGLang"], GENERATED)
    return TokenBatch.padded(torch.zeros(3, 4).long(), GENERATED, torch.ones(3)).with_kept(*kept)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([7, 1, 1, 3]),
        torch.tensor([], dtype=torch.int64),
        *(slice(1, 5), slice(5, 2), slice(None), slice(-5, None), slice(0, 9, 2), slice(12, 14)),
    ],
)
def test_selected_tokens_bring_their_sets(rows):
    part = batch_of().select(rows)
    expected = [SETS[n] for n in torch.arange(12)[rows].tolist()]
    assert sets_of(part.kept, part.cu_kept) == expected


def test_a_slice_copies_no_set():
    batch = batch_of()
    part = batch.select(slice(2, 8))
    assert part.kept.data_ptr() == batch.kept[2:].data_ptr()


def test_sets_follow_the_batch_wherever_it_goes():
    batch = batch_of()
    moved = TokenBatch.of_parts(*batch.to("cpu").with_weights(torch.ones(12)).parts())
    moved = moved.with_mask(torch.ones(12, dtype=torch.bool))
    assert sets_of(moved.kept, moved.cu_kept) == SETS


def test_sets_of_int32_are_those_of_int64():
    kept, cu_kept = kept_sets(FORMS["SGLang"], GENERATED)
    batch = TokenBatch.padded(torch.zeros(3, 4).long(), GENERATED, torch.ones(3))
    assert sets_of(*_sets(batch.with_kept(kept.int(), cu_kept.int()))) == SETS


def _sets(batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.kept, batch.cu_kept


@pytest.mark.parametrize(
    ("kept", "cu_kept", "message"),
    [
        (torch.zeros(2), torch.tensor([0, 1, 2]), "kept must be an int64 or int32 tensor"),
        (torch.zeros(1, 2).long(), torch.tensor([0, 1, 2]), r"kept must be \[M\], got \[1, 2\]"),
        (torch.zeros(2).long(), torch.tensor([0, 2]), r"cu_kept must be \[N \+ 1\] = \[3\]"),
        (torch.zeros(2).long(), torch.tensor([0, 1, 3]), r"cu_kept\[2\] is 3, and must be the len"),
        (torch.zeros(2).long(), torch.tensor([1, 1, 2]), r"cu_kept\[0\] is 1, and must be 0"),
        (torch.zeros(2).long(), torch.tensor([0, 3, 2]), r"cu_kept\[2\] is 2, below cu_kept\[1\]"),
        (torch.zeros(2).long().to("meta"), torch.tensor([0, 1, 2]), "must be on one device"),
    ],
)
def test_mistakes_in_the_sets_of_a_batch_are_named(kept, cu_kept, message):
    batch = TokenBatch.padded(torch.tensor([[1, IGNORED]]), torch.tensor([[1, 0]]), torch.ones(1))
    with pytest.raises(ValueError, match=message):
        batch.with_kept(kept, cu_kept)
