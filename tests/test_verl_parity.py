"""verl's own policy losses, heads and KL beside ours, from the installed verl.

A configuration is verl's ActorConfig; the numbers are verl's to the last digits that its + 1e-8 and
its float32 leave.
"""

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import qwen2
from torch import Tensor

from fused_rl import advantages
from fused_rl.integrations import verl as ours

pytest.importorskip("verl", reason="verl is not installed")

B, T = 4, 6
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
LOSSES = tuple(name for name in ours.policy_losses if name != "bypass_mode")
COUNTS = {"batch_num_tokens": 40, "global_batch_size": 12}
INFOS = {
    "none": {},
    "one rank": COUNTS | {"dp_size": 1, "loss_scale_factor": None},
    "two ranks": COUNTS | {"dp_size": 2, "loss_scale_factor": None},
    "a scale": COUNTS | {"dp_size": 2, "loss_scale_factor": 9},
}
MASKS = {
    "whole": torch.ones(B, T),
    "ragged": (torch.arange(T) < torch.tensor([T, 3, 1, 5])[:, None]).float(),
    "an empty row": (torch.arange(T) < torch.tensor([T, 0, 4, 2])[:, None]).float(),
    "holes": (torch.arange(B * T).reshape(B, T) % 3 != 1).float(),
}
WEIGHTS = ("none", "per token", "per sequence")


@pytest.fixture(scope="module")
def algos():
    from verl.trainer.ppo import core_algos

    return core_algos


@pytest.fixture(autouse=True)
def one_thread(threads) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def patched():
    ours.patch()
    yield
    ours.unpatch()


def config(info: dict | None = None, policy_loss: dict | None = None, **options):
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    every = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.0, "kl_cov_ratio": 0.3, "dro_beta": 0.07}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_high=0.28,
        policy_loss=PolicyLossConfig(**(every | (policy_loss or {}))),
        global_batch_info=info or {},
        **options,
    )


def rollout(gap: float = 0.3, per_token: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Log-probs `gap` apart, of four sequences; one ratio is beyond the dual clip with A < 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    new = -torch.rand(B, T, dtype=torch.float64, generator=generator) * 3 - 0.01
    old = (new + gap * noise(B, T)).clamp(max=-0.001)
    old[0, 0] = new[0, 0] - 2
    advantages = torch.tensor([-1.0, 1.5, 0.0, 0.5], dtype=torch.float64)[:, None].expand(B, T)
    return {
        "old_log_prob": old,
        "log_prob": new.requires_grad_(),
        "advantages": noise(B, T) if per_token else advantages.clone(),
    }


def rollout_weights(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(7)
    if kind == "none":
        return None
    columns = T if kind == "per token" else 1
    weights = torch.rand(B, columns, dtype=torch.float64, generator=generator) + 0.5
    return weights.expand(B, T).clone()


def both(algos, name: str, given: dict, **options) -> list[tuple[Tensor, Tensor, dict]]:
    """(loss, its gradient, metrics) of ours, then of verl's."""
    found = []
    for losses in (ours.policy_losses, algos.POLICY_LOSS_REGISTRY):
        loss, metrics = losses[name](**given, **options)
        (gradient,) = torch.autograd.grad(loss, given["log_prob"])
        found.append((loss, gradient, metrics))
    return found


def assert_same(pair, mask: Tensor) -> None:
    (loss, gradient, metrics), (their_loss, their_gradient, theirs) = pair
    torch.testing.assert_close(loss, their_loss, rtol=2e-7, atol=1e-8)
    # verl multiplies what does not count by 0; here it has no gradient at all.
    counted = mask.bool()
    torch.testing.assert_close(gradient[counted], their_gradient[counted], rtol=2e-7, atol=1e-8)
    assert not gradient[~counted].any()
    assert metrics.keys() == theirs.keys()
    assert metrics == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(algos, name):
    """The default mode and every mask, with advantages per token but for GMPO's, which are of
    sequences.
    """
    for mask, kind in itertools.product(MASKS, WEIGHTS):
        given = rollout(per_token=name != "geo_mean")
        options = {"response_mask": MASKS[mask].bool(), "config": config(INFOS["two ranks"])}
        options["rollout_is_weights"] = rollout_weights(kind)
        assert_same(both(algos, name, given, **options), MASKS[mask])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_every_policy_loss_mask_mean_and_count(algos, name):
    """640 cases each: modes, masks and their dtypes, counts, weights, gaps; none is left out."""
    grid = itertools.product(
        MODES, MASKS, INFOS, ("none", "per token"), (0.05, 1.5), (torch.bool, torch.float64)
    )
    seen = 0
    for mode, mask, info, kind, gap, dtype in grid:
        options = {
            "response_mask": MASKS[mask].to(dtype),
            "loss_agg_mode": mode,
            "config": config(dict(INFOS[info])),
            "rollout_is_weights": rollout_weights(kind),
        }
        given = rollout(gap, per_token=name != "geo_mean", seed=seen)
        assert_same(both(algos, name, given, **options), MASKS[mask])
        seen += 1
    assert seen == 640


@pytest.mark.parametrize(("name", "mode"), [("gspo", "token-mean"), ("vanilla", "token-sum")])
def test_a_count_that_several_ranks_must_agree_on(algos, name, mode):
    """Without it verl's is a ValueError, and so is ours; a sum needs none."""
    options = {"response_mask": MASKS["ragged"], "loss_agg_mode": mode}
    options["config"] = config({"dp_size": 2})
    if mode == "token-sum":
        assert_same(both(algos, name, rollout(), **options), MASKS["ragged"])
        return
    for losses in (ours.policy_losses, algos.POLICY_LOSS_REGISTRY):
        with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
            losses[name](**rollout(), **options)


def test_clip_cov_drops_as_many_of_the_same_candidates(algos):
    """verl draws which; over many draws both take every candidate equally often."""
    given = rollout(per_token=True, seed=3)
    options = {"response_mask": MASKS["whole"].bool()}
    options["config"] = config(policy_loss={"clip_cov_ratio": 0.13, "clip_cov_lb": 0.05})
    counts = [torch.zeros(B, T), torch.zeros(B, T)]
    for _ in range(300):
        pair = both(algos, "clip_cov", given, **options)
        fractions = [metrics["actor/pg_clipfrac"] for *_, metrics in pair]
        assert fractions[0] == pytest.approx(3 / 24) and fractions[1] == pytest.approx(3 / 24)
        for count, (_, gradient, _) in zip(counts, pair, strict=True):
            count += gradient == 0
    # What is 0 in all of them is clipped, not dropped.
    dropped = [count.where(count < 300, 0.0) for count in counts]
    assert torch.equal(dropped[0] > 0, dropped[1] > 0) and (dropped[0] > 0).sum() > 4
    expected = 900 / (dropped[0] > 0).sum()
    for count in dropped:
        assert ((count[count > 0] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("kind", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize("rejected", [None, "token_k1"])
def test_bypass_mode(algos, kind, rejected):
    from verl.trainer.config.algorithm import RolloutCorrectionConfig

    correction = RolloutCorrectionConfig(
        bypass_mode=True,
        loss_type=kind,
        rollout_is="token",
        rollout_is_threshold=1.5,
        rollout_rs=rejected,
        rollout_rs_threshold=None if rejected is None else "0.5_2.0",
    )
    given = rollout(per_token=True)
    options = {"response_mask": MASKS["ragged"]}
    options["config"] = config(policy_loss={"rollout_correction": correction})
    pair = both(algos, "bypass_mode", given, **options)
    kept = (pair[1][1] != 0) | (MASKS["ragged"].bool() & (pair[0][1] != 0))
    assert_same(pair, kept if rejected else MASKS["ragged"])
    assert "actor/ppo_kl" in pair[0][2] and len(pair[0][2]) > 5


ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


@pytest.mark.parametrize("straight", ["", "+"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_penalty(algos, name, straight):
    """Up to 2 nats apart, below verl's clamp of k3 at 10."""
    logprob = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    ref = torch.zeros_like(logprob)
    found = [of.kl_penalty(logprob, ref, name + straight) for of in (ours, algos)]
    gradients = [torch.autograd.grad(x.sum(), logprob) for x in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*gradients)


def test_verl_has_the_name_full_and_no_formula(algos):
    logits = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    with pytest.raises(NotImplementedError):
        algos.kl_penalty(*logits, "full")
    assert ours.kl_penalty(*logits, "full").shape == (2, 3)


# The head.


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_verls_forward_on_a_model(backend):
    """use_fused_kernels=True: plain, patched, and plain again; gradients of every weight."""
    from verl.models.transformers.dense_common import forward_with_torch_backend

    built = qwen2(37, seed=3)
    ids = torch.randint(0, 37, (1, 9))

    def of() -> tuple[Tensor, Tensor, list[Tensor]]:
        out = forward_with_torch_backend(
            built, input_ids=ids, temperature=0.7, return_dict=True, impl_backend=backend
        )
        loss = out.log_probs.sum() - 0.3 * out.entropy.sum()
        return out.log_probs, out.entropy, list(torch.autograd.grad(loss, built.parameters()))

    before = of()
    ours.patch()
    try:
        inside = of()
    finally:
        ours.unpatch()
    after = of()
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)
    assert not torch.equal(inside[0], before[0]) and torch.equal(after[0], before[0])


def test_verls_triton_forward_takes_the_same_way(patched):
    """Needs CUDA unpatched; here it is our head, and says what the torch backend says."""
    from verl.models.transformers.dense_common import (
        forward_with_torch_backend,
        forward_with_triton_backend,
    )

    built = qwen2(37, seed=3)
    ids = torch.randint(0, 37, (1, 9))
    options = {"input_ids": ids, "temperature": 0.7, "return_dict": True}
    by_triton = forward_with_triton_backend(built, **options)
    by_torch = forward_with_torch_backend(built, **options)
    torch.testing.assert_close(by_triton.log_probs, by_torch.log_probs[0])
    torch.testing.assert_close(by_triton.entropy, by_torch.entropy[0])


def test_patch_reaches_every_name_and_takes_all_of_it_back(algos):
    import verl.utils.experimental.torch_functional as functional
    import verl.utils.kernel.linear_cross_entropy as kernel

    before = (functional.FusedLinearForPPO, kernel.linear_cross_entropy)
    names = set(algos.POLICY_LOSS_REGISTRY)
    assert {f"fused_{name}" for name in names} == {f"fused_{name}" for name in ours.policy_losses}
    ours.patch()
    assert functional.FusedLinearForPPO is ours.FusedLinearForPPO
    assert kernel.linear_cross_entropy is ours.linear_cross_entropy
    assert algos.get_policy_loss_fn("fused_gspo") is ours.policy_losses["gspo"]
    ours.unpatch()
    assert (functional.FusedLinearForPPO, kernel.linear_cross_entropy) == before
    assert set(algos.POLICY_LOSS_REGISTRY) == names


def test_a_head_that_is_called_otherwise_is_refused(monkeypatch):
    """The next verl, with an argument more: said at patch(), not at the first forward."""
    import verl.utils.experimental.torch_functional as functional

    class FusedLinearForPPO(functional.FusedLinearForPPO):
        def __init__(self, chunk_size=512, impl_backend="torch", pad=0):
            super().__init__(chunk_size, impl_backend)

    monkeypatch.setattr(functional, "FusedLinearForPPO", FusedLinearForPPO)
    with pytest.raises(RuntimeError, match=r"FusedLinearForPPO takes \(chunk_size, .*, pad\)"):
        ours.patch()
    assert functional.FusedLinearForPPO is FusedLinearForPPO


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WHICH = (
    "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
    "from verl.utils.experimental.torch_functional import FusedLinearForPPO\n"
    "print(get_policy_loss_fn('fused_gspo').__module__, FusedLinearForPPO.__module__)\n"
)
OURS = "fused_rl.integrations.verl.losses fused_rl.integrations.verl.heads"


@pytest.mark.slow
def test_the_workers_module_is_imported_by_the_configuration(tmp_path):
    """What verl's engine worker does with model.external_lib, in a process of its own."""
    qwen2(37, seed=3).save_pretrained(tmp_path)
    code = (
        "from omegaconf import OmegaConf\n"
        "from verl.utils.config import omega_conf_to_dataclass\n"
        f"options = {{'_target_': 'verl.workers.config.HFModelConfig', 'path': {str(tmp_path)!r},\n"
        "  'load_tokenizer': False, 'external_lib': 'fused_rl.integrations.verl.worker'}\n"
        "omega_conf_to_dataclass(OmegaConf.create(options))\n"
    )
    assert run(code + WHICH).strip().endswith(OURS)


@pytest.mark.slow
def test_the_workers_module_is_imported_by_the_environment():
    named = {"VERL_USE_EXTERNAL_MODULES": "fused_rl.integrations.verl.worker"}
    assert run("import verl\n" + WHICH, **named).strip().endswith(OURS)


@pytest.mark.slow
def test_the_module_that_replays_is_imported_by_the_configuration(tmp_path):
    """The engine of a language model replays; a critic's, which inherits the step, does not."""
    qwen2(37, seed=3).save_pretrained(tmp_path)
    code = (
        "from verl.workers.config import HFModelConfig\n"
        "from verl.workers.engine.fsdp import transformer_impl as fsdp\n"
        "before = fsdp.FSDPEngineWithLMHead.forward_step\n"
        f"HFModelConfig(path={str(tmp_path)!r}, load_tokenizer=False,\n"
        "  external_lib='fused_rl.integrations.verl.replay')\n"
        "assert fsdp.FSDPEngineWithLMHead.forward_step.__wrapped__ is before\n"
        "assert fsdp.FSDPEngineWithValueHead.forward_step is before\n"
    )
    assert run(code + WHICH).strip().endswith(OURS)


@pytest.mark.slow
def test_a_worker_of_ray_is_patched_and_the_driver_is_not(tmp_path):
    """A remote actor that builds its model's configuration, as verl's do."""
    qwen2(37, seed=3).save_pretrained(tmp_path)
    code = (
        "import ray\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "@ray.remote\n"
        "class Worker:\n"
        "    def build(self, path):\n"
        "        from verl.workers.config import HFModelConfig\n"
        "        worker = 'fused_rl.integrations.verl.worker'\n"
        "        HFModelConfig(path=path, load_tokenizer=False, external_lib=worker)\n"
        "        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY\n"
        "        return 'fused_gspo' in POLICY_LOSS_REGISTRY\n"
        f"there = ray.get(Worker.remote().build.remote({str(tmp_path)!r}))\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY\n"
        "print(there, 'fused_gspo' in POLICY_LOSS_REGISTRY)\n"
    )
    assert run(code).strip().endswith("True False")


def test_groups_of_one_rank_and_shapes_of_megatron(tmp_path):
    """[s, b, h] beside [b, s], a group that splits nothing, and one that would."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        hidden, weight = torch.randn(7, 1, 8), torch.randn(11, 8)
        labels = torch.randint(0, 11, (1, 7))
        given = (hidden, weight, labels, 1.0, "none", torch.distributed.group.WORLD)
        logprobs, entropy = ours.linear_cross_entropy(*given)
    finally:
        torch.distributed.destroy_process_group()
    logp = torch.log_softmax(hidden[:, 0] @ weight.T, -1)
    torch.testing.assert_close(logprobs, logp.gather(-1, labels.T)[:, 0])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))


# verl's estimators of groups -> ours, of rewards [B], groups and the mask.
OF_GROUPS = {
    "compute_grpo_outcome_advantage": lambda r, groups, mask: advantages.group_zscore_advantages(
        r, groups, eps=1e-6
    ),
    "compute_rloo_outcome_advantage": lambda r, groups, mask: advantages.leave_one_out_advantages(
        r, groups
    ),
    "compute_opo_outcome_advantage": lambda r, groups, mask: advantages.length_weighted_advantages(
        r, mask.sum(-1), groups
    ),
    "compute_reinforce_plus_plus_baseline_outcome_advantage": lambda r, groups, mask: (
        advantages.reinforce_plus_plus_baseline_advantages(r, groups, mask.bool())
    ),
}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_groups_by_the_index_of_verl(algos, name):
    """Names of prompts in any order, of 2, 3 and 4 samples."""
    index = np.array(list("babccabab"), dtype=object)
    groups = torch.from_numpy(np.unique(index, return_inverse=True)[1])
    mask = (torch.arange(T) < torch.randint(1, T + 1, (9, 1))).float()
    rewards = torch.randn(9)
    of_tokens = torch.zeros(9, T)
    of_tokens[:, 0] = rewards
    theirs, _ = getattr(algos, name)(of_tokens, mask, index=index)
    found = OF_GROUPS[name](rewards, groups, mask)
    found = found if found.dim() == 2 else found[:, None] * mask
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)


def test_the_configuration_stands_for_verls() -> None:
    """What test_integration_verl.py uses in its place has the same defaults."""
    from verl.workers.config import ActorConfig

    real = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    stand_in = SimpleNamespace(clip_ratio=0.2, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05)
    for name, value in vars(stand_in).items():
        assert getattr(real, name) == value
