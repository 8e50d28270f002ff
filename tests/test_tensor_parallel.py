"""Heads that a tensor-parallel plan has cut: found in the model, or given as DTensors."""

import pytest

pytest.importorskip("transformers")


def largest(found):
    return [max(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {}), (2, {"tied": True}), (4, {}), (4, {"V": 96, "tied": True})],
)
def test_transformers_plan(ranks, world, options):
    """tp_plan="auto", V even or not: the gradients of every parameter are those of one rank."""
    assert (
        max(largest(ranks(world).run("cases_tensor_parallel", "transformers_plan", **options)))
        <= 1e-12
    )


def test_a_softcap_is_found_behind_the_plan(ranks):
    """Gemma-2's norms are float32 in a model of any dtype: they differ by its rounding."""
    loss, gradients = largest(
        ranks(2).run("cases_tensor_parallel", "transformers_plan", softcap=2.0)
    )
    assert loss <= 1e-6 and gradients <= 3e-6


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_torch_plan(ranks, world, sequence):
    found = ranks(world).run("cases_tensor_parallel", "torch_plan", sequence=sequence)
    assert max(largest(found)) <= 1e-12


@pytest.mark.parametrize("world", [2, 4])
def test_dtensors_given_by_hand(ranks, world):
    """Weight, bias and hidden states, as they lie; what does not fit is refused on every rank."""
    for difference, said in ranks(world).run("cases_tensor_parallel", "placed_by_hand"):
        assert difference <= 1e-12
        without_group, replicated, cut_in_H = said
        assert "weight is a torch.distributed.tensor.DTensor" in without_group
        assert "needs (Shard(dim=0),)" in replicated
        assert "cut along its tokens into equal parts" in cut_in_H
