"""Heads whose weights engines keep in shards: the gradients of ranks are those of one process."""

import importlib.util
import re

import pytest
import torch
from cases_shards import LOSS, build, distance, gradients, one_process, tokens
from ranks import Ranks

import fused_rl
from fused_rl import model_policy_loss

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


@pytest.mark.parametrize(
    ("unit", "mesh"), [("own", (4,)), ("own", (2, 2)), ("pair", (2, 2)), ("root", (2, 2))]
)
def test_fsdp2_on_four_ranks(ranks, unit, mesh):
    """Also two copies of two shards."""
    options = {"reshard": True, "mesh": mesh, "empty": (1,)}
    for error in run(ranks, "fsdp2", world=4, unit=unit, **options):
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


def refused(ranks, name, **options):
    """What every rank says of each mistake."""
    answers = ranks(2).run("cases_unsharded", name, **options)
    answers = [a[0] if isinstance(a, tuple) else a for a in answers]
    return {mistake: [answer[mistake] for answer in answers] for mistake in answers[0]}


def test_a_head_that_is_not_here_is_an_error_on_every_rank(ranks):
    """A unit of FSDP2's, of which each mistake would be a hang, a crash or a wrong gradient."""
    found = refused(ranks, "own_unit")
    both = r"\(FSDP\), call fused_rl.model_policy_loss.*\(tensor parallelism\), give LMHead the g"
    expected = {
        "the weight": r"weight is a .*DTensor, sharded.*" + both,
        "the layer": r"weight is a .*DTensor, sharded.*" + both,
        "the model": r"weight of FSDPQwen2ForCausalLM is a .*DTensor, sharded.*" + both,
        "full_tensor": r"gathered by full_tensor.*model_policy_loss.*Partial\('avg'\).*Replicate",
        "cast": r"gathered by full_tensor",
        "to_local": r"weight \[(49|48), 32\] holds the rows of this rank alone.*" + both,
        "stale": r"weight \[97, 32\] has no memory.*anew in every step.*model_policy_loss",
    }
    assert found.keys() == expected.keys()
    for mistake, pattern in expected.items():
        for said in found[mistake]:
            assert re.search(pattern, said, re.DOTALL), (mistake, said)


def test_a_head_that_was_unsharded_is_read(ranks):
    """By its layer as by full_tensor() without gradients."""
    assert [same for _, same in ranks(2).run("cases_unsharded", "own_unit")] == [True, True]


@pytest.mark.parametrize("original", [True, False])
def test_a_head_beside_the_forward_of_fsdp1_is_an_error_on_every_rank(ranks, original):
    found = refused(ranks, "first_generation", unit="own", original=original)
    for said in (said for ranks_said in found.values() for said in ranks_said):
        assert "fused_rl.model_policy_loss" in said


@pytest.mark.parametrize(("placement", "right"), [("avg", True), ("same", False)])
def test_who_says_what_a_gathered_gradient_is_is_believed(ranks, placement, right):
    for error in ranks(2).run("cases_unsharded", "averaged_by_hand", placement=placement):
        assert (error < NEAR) is right


def test_a_model_inside_the_sharded_module_is_an_error_on_every_rank(ranks):
    for said in ranks(2).run("cases_unsharded", "nobody_gathers"):
        assert "the module that gathers it is around the model that was given" in said


def test_the_wrapper_of_a_model_is_no_head(ranks):
    for said in ranks(2).run("cases_unsharded", "wrapped"):
        assert re.search("DistributedDataParallel wraps a .*: give the wrapper to fused_rl", said)


def test_tensor_parallel(ranks):
    for error in ranks(2).run("cases_unsharded", "tensor_parallel", shards=1, unit=None):
        assert error < NEAR


@pytest.mark.parametrize("unit", ["own", "pair", "root"])
def test_fsdp2_of_a_tensor_parallel_model(ranks, unit):
    for error in ranks(4).run("cases_unsharded", "tensor_parallel", shards=2, unit=unit):
        assert error < NEAR


@pytest.mark.parametrize(
    ("unit", "inside"),
    [("own", False), ("own", True), ("pair", False), ("pair", True), ("root", True)],
)
def test_two_losses_of_one_forward(ranks, unit, inside):
    """gspo, whose backward pass reads the weight again."""
    options = {"unit": unit, "inside": inside, "loss": fused_rl.gspo()}
    for error in run(ranks, "two_calls", **options):
        assert error < NEAR


@pytest.mark.parametrize("unit", ["own", "pair"])
def test_another_function_goes_through_the_head(ranks, unit):
    for error in run(ranks, "another_function", unit=unit):
        assert error < NEAR


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_plain_model_is_taken_too(backend):
    """Without an engine, compiled as one graph as well: what linear_policy_loss gives, bit by bit
    if not compiled.
    """
    model = build()
    value, expected = one_process(model)
    ids, batch = tokens(slice(None))
    torch._dynamo.reset()

    def step(hidden):
        return model_policy_loss(model, hidden, batch, LOSS).loss

    if backend:
        step = torch.compile(step, fullgraph=True, backend=backend)
    loss = step(model.model(ids).last_hidden_state[:, :-1])
    loss.backward()
    assert (loss - value).abs() <= (1e-6 if backend else 0)
    assert distance(gradients(model), expected) <= (1e-6 if backend else 0)


@pytest.fixture(scope="module")
def deepspeed_ranks():
    """Processes of their own: DeepSpeed's settings stay in a process."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after", "backbone", "inside"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(deepspeed_ranks, stage, where):
    options = {"stage": stage, "where": where, "empty": (0, 1)}
    for error in deepspeed_ranks.run("cases_zero", "zero", seconds=120.0, **options):
        assert error < NEAR


@pytest.mark.slow
def test_zero_of_tied_embeddings(deepspeed_ranks):
    options = {"stage": 3, "where": "after", "tied": True}
    for error in deepspeed_ranks.run("cases_zero", "zero", seconds=120.0, **options):
        assert error < NEAR
