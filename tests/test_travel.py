"""Tokens that travel to the ranks that have the rows, against the whole head on one rank."""

import pytest
from test_spread import FLOAT32, FLOAT64, WORLDS, largest, named

from fused_rl.plan.traffic import travel_bytes

ANY_LOSS = [
    {},
    {"uneven": True, "softcap": 3.0, "bias": False, "repeats": 2},
    {"trained": False},
    {"trained": False, "with_entropy": False, "uneven": True, "V": 9},
]
KNOWN_LOSS = [
    {"repeats": 2},
    {"chunk": 97 * 8 * 3, "always_one_pass": True, "uneven": True, "softcap": 3.0},
    {"chunk": 97 * 8 * 3, "trained": False, "loss": "dapo"},
    {"chunk": 97 * 8 * 3, "loss": "function", "V": 1003},
]


@WORLDS
@pytest.mark.parametrize("options", ANY_LOSS, ids=named)
def test_two_passes(ranks, world, options):
    values, gradients = largest(ranks(world).run("cases_travel", "two_passes", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@WORLDS
@pytest.mark.parametrize("options", KNOWN_LOSS, ids=named)
def test_policy_losses(ranks, world, options):
    values, gradients = largest(ranks(world).run("cases_travel", "policy_loss", **options))
    assert values <= FLOAT64 and gradients <= FLOAT64


@pytest.mark.parametrize("case", ["two_passes", "policy_loss"])
def test_float32(ranks, case):
    values, gradients = largest(ranks(4).run("cases_travel", case, dtype="float32", V=1003))
    assert values <= FLOAT32 and gradients <= FLOAT32


@pytest.mark.parametrize("world", [3, 4])
def test_rounding(ranks, world):
    """Errors of dhidden and dweight in bfloat16, over those of one process."""
    dhidden, dweight = largest(ranks(world).run("cases_travel", "rounding"))
    assert dhidden <= 1.25 and dweight <= 1.25


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits(ranks, world, dtype):
    """The same run to run, and whichever rank a token is on, in whatever turn."""
    assert ranks(world).run("cases_travel", "bits", dtype=dtype) == [(True, True)] * world


@WORLDS
def test_traffic(ranks, world):
    """Bytes that a rank receives: of each token hidden once in one pass, twice in two."""
    N, H, numbers = 16 * world, 32, 3 * 8 * world
    once = travel_bytes(N, H, width=2)
    assert once == N * (2 * H + 8 + 4 + 32 + 32 + 4 * H)
    assert ranks(world).run("cases_travel", "traffic") == [once + numbers] * world
    twice = once + N * (2 * H + 8 + 4)
    assert ranks(world).run("cases_travel", "traffic", two=True) == [twice + 2 * numbers] * world


def test_an_error_of_one_rank_is_one_of_every_rank(ranks):
    first, second, last = ranks(3).run("cases_travel", "errors")
    outside = "outside the vocabulary [0, 97) and not ignore_index (-100)"
    assert last == [
        f"labels[3] is 97, {outside}",
        f"labels[3] is 97, {outside}",
        "temperature[0] is -1.0, and a temperature must be positive",
        "hidden and weight must agree in H, got hidden [12, 15] and weight [32, 16]",
        "hidden and weight must agree in H, got hidden [12, 15] and weight [32, 16]",
        "hidden must require a gradient on every rank or on none, and does not on ranks [2] of "
        "the group; one without tokens, too, takes part in the backward pass",
        "linear_kept_logprobs takes no Hidden.OWN_TOKENS: linear_logprobs, linear_top_logprobs and "
        "linear_policy_loss do",
        "a batch with kept sets takes no Hidden.OWN_TOKENS: give the ranks of the group the same "
        "tokens, Hidden.REPLICATED or Hidden.SEQUENCE_SHARDED",
    ]
    assert first == second
    assert first == ["wrong arguments on ranks [2] of the group, which say what"] * 5 + last[5:]


def test_no_token_counts(ranks):
    assert ranks(2).run("cases_travel", "nothing_counts") == [0.0] * 2


@pytest.mark.parametrize(
    "options", [{}, {"root": "model", "V": 96}, {"micro_batches": 2}], ids=named
)
def test_fsdp2(ranks, options):
    """Gradients of every parameter are those of one process that has the whole batch."""
    values, gradients = largest(ranks(2).run("cases_travel_fsdp", "fsdp2", **options))
    assert values <= 1e-12 and gradients <= 1e-12


@pytest.mark.parametrize("root", ["backbone", "model"])
def test_a_head_beside_fsdp2_is_not_taken_for_another(ranks, root):
    for of_head, of_loss in ranks(2).run("cases_travel_fsdp", "by_the_model", root=root):
        assert "is a torch.distributed.tensor.DTensor, sharded over ranks" in of_head
        assert "the weight of" in of_loss and "hidden=Hidden.OWN_TOKENS" in of_loss
