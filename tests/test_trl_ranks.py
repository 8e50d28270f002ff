"""TRL on our head over several processes, whatever has sharded the model.

What TRL does itself under DistributedDataParallel is what every other way must do.
"""

import importlib.util

import pytest
from cases_trl import KINDS, V
from ranks import Ranks
from tiny_models import qwen2

ONE_STEP = 1e-2
SCENARIOS = {
    "plain": {},
    # Ratios leave 1, and there is a reference model.
    "accumulated": {
        "beta": 0.04,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
    },
    "tied": {},
    # The tokens of highest entropy are those of all ranks.
    "masked": {
        "beta": 0.04,
        "num_iterations": 2,
        "top_entropy_quantile": 0.4,
        "off_policy_mask_threshold": 0.01,
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_target": 9.0,
    },
}


@pytest.mark.parametrize(("world", "mesh"), [(2, [2]), (4, [2, 2])])
def test_a_gathered_shard_has_the_gradient_of_all_ranks(ranks, world, mesh):
    """TRL's full_tensor() alone: each rank's rows would hear of its own tokens, 0.9 off."""
    for distances in ranks(world).run("cases_trl", "own_unit", mesh=mesh):
        assert len(distances) == 4 and max(distances) < 1e-12


def test_a_gathered_shard_that_was_cast(ranks):
    for distances in ranks(2).run("cases_trl", "own_unit", mesh=[2], cast=True):
        assert len(distances) == 4 and max(distances) < 1e-6


def test_ranks_with_the_same_tokens_have_the_gradient_of_one(ranks):
    for distances in ranks(2).run("cases_trl", "own_unit", mesh=[2], alike=True):
        assert max(distances) < 1e-12


def test_weights_that_nobody_gathered_are_left_alone(ranks):
    assert ranks(2).run("cases_trl", "left_alone") == [[True] * 5] * 2


def test_a_weight_of_unknown_making_is_an_error_of_every_rank(ranks):
    for said in ranks(2).run("cases_trl", "scaled"):
        assert "gathered by full_tensor()" in said


# With TRL, whose import takes as long as the rest of the suite.


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[bool, list[str]]:
    """Directories of a student and a teacher, by whether their embeddings are tied."""
    pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")
    options = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    options |= {"initializer_range": 0.3, "max_position_embeddings": 32}
    made: dict[bool, list[str]] = {}
    for tied in (False, True):
        for seed, width in ((3, 16), (4, 32)):
            path = str(tmp_path_factory.mktemp("model"))
            more = {"hidden_size": width, "tie_word_embeddings": tied}
            qwen2(V, seed=seed, **more, **options).save_pretrained(path)
            made.setdefault(tied, []).append(path)
    return made


@pytest.fixture(scope="module")
def of_ddp(paths):
    """What TRL does under DDP, by the arguments of `steps`."""
    apart, known = Ranks(2), {}

    def of(**given):
        key = repr(sorted(given.items()))
        if key not in known:
            known[key] = ran(apart, kind="ddp", way="trl", **given)
        return known[key]

    yield of
    apart.stop()


@pytest.fixture(scope="module", params=KINDS)
def sharded(request):
    """(a way of sharding, two processes for it alone): engines leave their marks on a process."""
    deepspeed = "deepspeed" in KINDS[request.param]
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    apart = Ranks(2)
    yield request.param, apart
    apart.stop()


def ran(apart: Ranks, **given) -> dict:
    """What a training says of itself, which is the same on both ranks where it must be."""
    first, second = apart.run("cases_trl", "steps", seconds=240, **given)
    assert first["head"] == second["head"]
    return first


def is_the_same(found: dict, expected: dict) -> None:
    """The head after all steps, within a thousandth of a step; and what was logged."""
    pairs = zip(found["head"], expected["head"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3 * ONE_STEP
    for name, values in expected["logged"].items():
        assert found["logged"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_grpo_takes_the_same_steps(sharded, of_ddp, paths, scenario):
    """Three steps of TRL's trainer, of it with our head, and of ours, by its config and without."""
    kind, apart = sharded
    if (kind, scenario) == ("fsdp2_own_unit", "tied"):
        pytest.skip("a weight of two units is an error of torch")
    given = {"paths": paths[scenario == "tied"], **SCENARIOS[scenario]}
    expected = of_ddp(**given)
    assert len(expected["logged"]["loss"]) == 3 and min(expected["logged"]["grad_norm"]) > 0.1
    for way in ("trl", "patched", "fused", "config"):
        # Of a head that is a unit of its own, TRL's gradient is of each rank's tokens alone.
        if (kind, way) != ("fsdp2_own_unit", "trl"):
            is_the_same(ran(apart, kind=kind, way=way, **given), expected)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["distillation", "gkd"])
def test_distillation_takes_the_same_steps(sharded, of_ddp, paths, trainer):
    kind, apart = sharded
    given = {"paths": paths[False], "trainer": trainer}
    is_the_same(ran(apart, kind=kind, way="patched", **given), of_ddp(**given))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainer", ["CPO", "ORPO"])
def test_preferences_take_the_same_steps(sharded, of_ddp, paths, trainer, tied):
    """With accumulation. Under ZeRO-3 their forward is TRL's own."""
    kind, apart = sharded
    if kind == "fsdp2_own_unit" and tied:
        pytest.skip("a weight of two units is an error of torch")
    given = {"paths": paths[tied], "trainer": trainer, "per_device_train_batch_size": 2}
    given["gradient_accumulation_steps"] = 2
    is_the_same(ran(apart, kind=kind, way="patched", **given), of_ddp(**given))


@pytest.mark.slow
def test_what_wraps_the_model_is_what_was_asked_for(sharded, paths):
    """accelerate gives DDP on CPUs, in silence."""
    kind, apart = sharded
    found = ran(apart, kind=kind, way="fused", paths=paths[False], count=1)["wrapper"]
    assert found == {
        "ddp": "DistributedDataParallel",
        "fsdp2": "FSDPQwen2ForCausalLM",
        "fsdp2_own_unit": "FSDPQwen2ForCausalLM",
    }.get(kind, "DeepSpeedEngine")
