"""Counts over ranks: the average of the gradients of unequal shares is the gradient of the step."""

import pytest
from cases_counts import B, part, step

from fused_rl import across

TOKENS = ("dapo", "grpo", "dr_grpo", "cispo", "reinforce_plus_plus")
SEQUENCES = ("gspo", "gspo_token", "gmpo", "luspo", "rloo", "kimi")


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_a_step_average_to_it(ranks, world):
    for found in ranks(world).run("cases_counts", "whole_sequences", names=TOKENS + SEQUENCES):
        assert len(found) == len(TOKENS + SEQUENCES)
        for name, error in found.items():
            assert error < 1e-12, name


def test_each_rank_has_an_equal_share_of_the_counts(ranks):
    """Twice is once: an engine that counts and a loss that does agree."""
    tokens = step()[1]["loss_mask"].sum().item()
    for _, once, twice in ranks(2).run("cases_counts", "counts"):
        assert once == twice == (tokens / 2, B / 2)


def test_alone_a_process_has_its_own_counts():
    batch = part(step()[1], slice(None))
    found = across(batch)
    assert (found.num_tokens, found.num_sequences) == (batch.num_tokens, B)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2), (4, 4)])
def test_split_sequences_are_whole(ranks, world, size):
    """Sequences over `world / size` ranks, the tokens of each over `size`."""
    options = {"names": TOKENS + SEQUENCES, "size": size}
    for found in ranks(world).run("cases_counts", "split_sequences", **options):
        assert len(found) == len(TOKENS + SEQUENCES)
        for name, error in found.items():
            assert error < 1e-12, name


def test_a_rank_may_hold_nothing_of_a_packed_sequence(ranks):
    for error in ranks(2).run("cases_counts", "split_and_packed"):
        assert error < 1e-12


def test_masks_of_split_sequences_are_those_of_whole_ones(ranks):
    for found in ranks(2).run("cases_counts", "masks"):
        assert found == {"veto": True, "band": True, "left behind": True}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_losses_of_split_sequences_compile(ranks, backend):
    for error in ranks(2).run("cases_counts", "compiled", backend=backend):
        assert error < 1e-12


def test_parts_of_different_sequences_are_an_error_on_every_rank(ranks):
    for said in ranks(2).run("cases_counts", "unequal_parts"):
        assert "got batches of 2 to 3 sequences: give every rank all of them" in said
