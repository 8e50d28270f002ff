"""Heads whose weights engines keep in shards: the gradients of ranks are those of one process."""

import pytest
import torch

NEAR = 3e-6


def run(ranks, name, world=2, **options):
    return ranks(world).run("cases_shards", name, **options)


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("own", {}),
        ("own", {"inside": True}),
        ("own", {"reshard": False}),
        ("own", {"inside": True, "halved": True, "frozen": True, "empty": (0, 1)}),
        ("pair", {}),
        ("pair", {"inside": True}),
        ("pair", {"reshard": False}),
        ("pair", {"reshard": True, "halved": True, "empty": (2, 3)}),
        ("root", {}),
        ("root", {"inside": True, "reshard": True}),
        ("root", {"reshard": True, "frozen": True, "empty": (0, 1)}),
        ("root", {"tied": True, "reshard": True}),
        ("root", {"tied": True, "inside": True}),
    ],
)
def test_fsdp2(ranks, unit, options):
    """`empty`: the sequences without a counted token, all of a rank's."""
    for error in run(ranks, "fsdp2", unit=unit, **options):
        assert error < NEAR


def test_fsdp2_on_four_ranks(ranks):
    for error in run(ranks, "fsdp2", world=4, unit="own", empty=(1,)):
        assert error < NEAR


@pytest.mark.parametrize(
    ("unit", "original", "inside"),
    [
        ("own", True, False),
        ("own", False, True),
        ("own", False, False),
        ("root", True, False),
        ("root", False, False),
        ("root", False, True),
    ],
)
def test_fsdp1(ranks, unit, original, inside):
    for error in run(ranks, "fsdp1", unit=unit, original=original, inside=inside):
        assert error < NEAR


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("after", {"find_unused_parameters": True}),
        ("backbone", {}),
        ("backbone", {"static_graph": True}),
        ("inside", {"gradient_as_bucket_view": True}),
    ],
)
def test_distributed_data_parallel(ranks, where, options):
    """Of hidden states from the backbone alone its forward hears nothing, and would not average."""
    for error in run(ranks, "ddp", where=where, **options):
        assert error < NEAR


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {}),
        ("fsdp2", {"unit": "own", "reduce": torch.float64}),
        ("fsdp2", {"unit": "pair"}),
        ("fsdp2", {"unit": "root", "reshard": True}),
    ],
)
def test_micro_batches_that_are_synchronised_once(ranks, engine, options):
    for error in run(ranks, "micro_batches", engine=engine, **options):
        assert error < NEAR


@pytest.mark.parametrize(
    ("unit", "output"), [("own", torch.float32), ("pair", torch.bfloat16), ("root", None)]
)
def test_mixed_precision_is_followed(ranks, unit, output):
    """As near as bfloat16 on one process; the loss is float32 even where outputs are rounded."""
    for ratio, dtype in run(ranks, "half_precision", unit=unit, output=output):
        assert ratio < 1.25
        assert dtype == "torch.float32"


def test_float64(ranks):
    for error in run(ranks, "float64", unit="own"):
        assert error < 1e-12


@pytest.mark.parametrize("unit", ["own", "pair"])
def test_a_patched_model_gathers_its_head(ranks, unit):
    for error in run(ranks, "patched_model", unit=unit):
        assert error < NEAR


@pytest.mark.parametrize("unit", ["own", "pair", "root"])
def test_without_gradients_nothing_stays_gathered(ranks, unit):
    for error, sharded in run(ranks, "evaluated", unit=unit):
        assert error < NEAR
        assert sharded
