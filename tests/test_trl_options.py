"""FusedGRPOTrainer and FusedRLOOTrainer under every option of TRL's configs: TRL's own steps.

Two trainers of one model and one seed: what they sample, log and arrive at is the same.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from parity import LOSS_TYPES, counterpart
from tiny_models import qwen2, word_tokenizer
from torch import Tensor

import fused_rl
from fused_rl.integrations import trl as integration

pytestmark = pytest.mark.slow
pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")

V, T = 23, 7
# What is no number of a step's: how long it took.
TIMES = ("step_time", "runtime", "per_second", "total_flos")


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    path = str(tmp_path_factory.mktemp("model"))
    model = qwen2(V, seed=3, initializer_range=0.3, max_position_embeddings=32, **tokens)
    model.save_pretrained(path)
    return path


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of the first five words, and a little for every word."""
    words = [c.split() for c in completions]
    return [sum(w in ("w0", "w1", "w2", "w3", "w4") for w in ws) / T + len(ws) / 9 for ws in words]


@pytest.fixture
def arguments(trl, model_path, tmp_path, monkeypatch) -> Callable:
    """What a trainer is built from: two optimizer steps per generation, so that ratios leave 1."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(config: str | type = "GRPOConfig", steps: int = 4, **options) -> dict:
        from datasets import Dataset

        config = getattr(trl, config) if isinstance(config, str) else config

        defaults = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": T,
            "temperature": 0.7,
            "learning_rate": 2e-2,
            "beta": 0.0,
            "num_iterations": 2,
            "epsilon": 0.05,
        }
        args = config(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            max_steps=steps,
            save_strategy="no",
            disable_tqdm=True,
            **(defaults | options),
        )
        prompts = [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)]
        return {
            "model": model_path,
            "reward_funcs": reward,
            "args": args,
            "processing_class": word_tokenizer(V),
            "train_dataset": Dataset.from_dict({"prompt": prompts}),
        }

    return build


def history(trainer) -> list[dict]:
    return [
        {name: value for name, value in entry.items() if not any(t in name for t in TIMES)}
        for entry in trainer.state.log_history
    ]


def weights(trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(build: Callable) -> tuple[list[dict], Tensor, Tensor]:
    """What a trainer logs, where it starts and where it arrives; it is seeded as it is built."""
    trainer = build()
    start = weights(trainer)
    trainer.train()
    return history(trainer), start, weights(trainer)


def same_way(ours: Callable, theirs: Callable) -> list[dict]:
    """Builds and trains both, and compares everything that TRL logs, and where they arrive."""
    (expected, start, end), (found, _, arrived) = trained(theirs), trained(ours)
    assert len(expected) == len(found)
    for entry, mine in zip(expected, found, strict=True):
        assert entry.keys() <= mine.keys()
        for name, value in entry.items():
            # TRL logs None where nothing is known.
            same = None if value is None else pytest.approx(value, rel=2e-3, abs=2e-5)
            assert mine[name] == same, name
    assert (arrived - end).norm() < 1e-3 * (end - start).norm()
    return found


def both(trl, arguments: Callable, name: str = "GRPOTrainer", **options) -> list[dict]:
    classes = (getattr(integration, f"Fused{name}"), getattr(trl, name))
    config = name.replace("Trainer", "Config")
    return same_way(*(lambda c=c: c(**arguments(config, **options)) for c in classes))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_takes_trls_steps(trl, arguments, loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.04}
    more = {"gradient_accumulation_steps": 2, "steps_per_generation": 2} if level == "token" else {}
    both(trl, arguments, **options, **more)


ACCUMULATED = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
OPTIONS = {
    "two-sided clip": {"delta": 1.02, "epsilon_high": 0.01},
    "uncorrected KL": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy bonus": {"entropy_coef": 0.2, "loss_type": "grpo"},
    "entropy bonus, accumulated": {"entropy_coef": 0.2, **ACCUMULATED},
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_target": 2.6,
        "entropy_coef_delta": 0.05,
        **ACCUMULATED,
    },
    "high entropy": {"top_entropy_quantile": 0.3},
    "high entropy, KL and bonus": {
        "top_entropy_quantile": 0.5,
        "beta": 0.1,
        "entropy_coef": 0.2,
        **ACCUMULATED,
    },
    "off-policy mask": {"off_policy_mask_threshold": 1e-3, "beta": 0.1},
    "both masks at sequences": {
        "off_policy_mask_threshold": 1e-3,
        "top_entropy_quantile": 0.5,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
    },
    "no truncated completion": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "rewards as they are": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "single temperature of SAPO": {
        "loss_type": "sapo",
        "sapo_temperature_pos": 0.5,
        "sapo_temperature_neg": 2.0,
    },
    "VESPO's parameters": {
        "loss_type": "vespo",
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 0.5,
        "vespo_k_neg": 0.5,
        "vespo_lambda_neg": 0.0,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_trls_steps(trl, arguments, name):
    log = both(trl, arguments, **OPTIONS[name])
    logged = {key for entry in log for key in entry}
    assert {"clip_ratio/low_min", "ratio_max", "zero_gradient_fraction"} <= logged or (
        "loss_type" in OPTIONS[name] and OPTIONS[name]["loss_type"] in ("sapo", "vespo")
    )
    if name == "adaptive entropy":
        # The bonus is off until the entropy is known, and above its target.
        assert len({entry["entropy_coef"] for entry in log if "entropy_coef" in entry}) > 1


def test_evaluation_logs_the_same(trl, arguments):
    """Neither accumulated, nor a step of the entropy's controller."""
    options = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.2}
    options |= {"loss_type": "grpo", "top_entropy_quantile": 0.5, "steps": 1, **ACCUMULATED}
    seen = []
    for owner in (trl.GRPOTrainer, integration.FusedGRPOTrainer):
        given = arguments(**options)
        trainer = owner(**given, eval_dataset=given["train_dataset"])
        trainer.train()
        coef = trainer.entropy_coef
        metrics = trainer.evaluate()
        assert trainer.entropy_coef == coef == pytest.approx(0.205)
        seen.append({name: m for name, m in metrics.items() if not any(t in name for t in TIMES)})
    theirs, ours = seen
    assert "eval_policy_loss" in theirs and theirs.keys() <= ours.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("coef", [0.0, 0.2])
def test_an_adapter_takes_trls_steps(trl, arguments, coef):
    """A frozen head, and the reference is the model without the adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])

    def build(owner: type):
        torch.manual_seed(0)
        given = arguments(beta=0.04, entropy_coef=coef, top_entropy_quantile=0.6)
        return owner(**given, peft_config=lora)

    owners = (integration.FusedGRPOTrainer, trl.GRPOTrainer)
    same_way(*(lambda owner=owner: build(owner) for owner in owners))


def test_rloo_takes_trls_steps(trl, arguments):
    """Its ratios are of whole completions, its KL is in the reward; transformers accumulates."""
    log = both(trl, arguments, "RLOOTrainer", steps=6, beta=0.05, **ACCUMULATED)
    assert max(entry.get("clip_ratio/region_mean", 0.0) for entry in log) > 0


# One batch, with what no CPU gives: vLLM's ratios, tools' tokens, advantages of tokens.

COMPLETION = torch.arange(T) < torch.tensor([7, 3, 0, 5, 1, 6])[:, None]


def batch_of(trainer, **more: Tensor) -> dict[str, Tensor]:
    """Six completions around the policy's own log-probs: ratios on both sides of every bound."""
    trainer.model.eval()
    g = torch.Generator().manual_seed(5)
    tool = torch.ones(6, T, dtype=torch.int64)
    tool[0, 2] = 0
    given = {
        "prompt_ids": torch.randint(3, V, (6, 2), generator=g),
        "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
        "completion_ids": torch.randint(3, V, (6, T), generator=g),
        "completion_mask": COMPLETION.long(),
        "tool_mask": tool,
        "advantages": torch.tensor([1.3, -0.8, 0.7, -2.1, 0.9, 0.0]),
        "num_items_in_batch": torch.tensor(40),
    }
    both = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
    with torch.no_grad():
        now = trainer._get_per_token_logps_and_entropies(
            trainer.model, *(torch.cat([given[n] for n in names], 1) for names in both), T
        )[0]
    drift = torch.tensor([0.4, -0.4, 0.0, 0.5, -0.1, 0.2])[:, None]
    noise = [torch.randn(6, T, generator=g) for _ in range(3)]
    given["old_per_token_logps"] = now - drift + 0.3 * noise[0]
    given["ref_per_token_logps"] = now + 0.4 * noise[1]
    given["sampling_per_token_logps"] = given["old_per_token_logps"] + 0.2 * noise[2]
    return given | more


def by_both(trainer, trl, inputs: dict) -> list[tuple[float, Tensor, dict]]:
    """(loss, gradient of the weights, what was logged), by ours and by theirs."""
    base, name = trl.GRPOTrainer, "_get_per_token_logps_and_entropies"
    found = []
    for ours in (True, False):
        trainer._metrics["eval"].clear()
        if not ours:
            setattr(trainer, name, getattr(base, name).__get__(trainer))
        owner = type(trainer) if ours else base
        loss = owner._compute_loss(trainer, trainer.model, inputs)
        grads = torch.autograd.grad(loss, list(trainer.model.parameters()))
        logged = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
        found.append((loss.item(), torch.cat([g.flatten() for g in grads]), logged))
    delattr(trainer, name)
    return found


def same(found: list, metrics: bool = True) -> None:
    (loss, gradient, logged), (their_loss, theirs, their_log) = found
    assert loss == pytest.approx(their_loss, rel=1e-4, abs=1e-6)
    assert (gradient - theirs).norm() < 1e-4 * theirs.norm()
    for name, value in their_log.items() if metrics else ():
        assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_importance_ratios_of_vllm(trl, arguments, loss_type, mode):
    """Of tokens [B, T] or of sequences [B, 1], a masked one among them; VESPO has them in its own.

    And both masks: sequences are off-policy by the log-probs of the engine.
    """
    options = {"loss_type": loss_type, "beta": 0.04, "off_policy_mask_threshold": 0.2}
    trainer = integration.FusedGRPOTrainer(**arguments(top_entropy_quantile=0.6, **options))
    trainer.use_vllm = True
    inputs = batch_of(trainer)
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).clamp(-1, 1)
    gap = gap * COMPLETION * inputs["tool_mask"]
    ratio = gap.sum(-1, keepdim=True).exp() if mode == "sequence" else gap.exp()
    ratio = ratio.masked_fill(ratio > 1.2, 0.0)
    if loss_type == "vespo" and mode == "sequence":
        pytest.skip("TRL has VESPO with ratios of tokens alone")
    same(by_both(trainer, trl, inputs | {"importance_sampling_ratio": ratio}))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tools_tokens_and_advantages_of_tokens(trl, arguments, level):
    """A tool's token of -200 nats has an infinite ratio; TRL is not given it."""
    trainer = integration.FusedGRPOTrainer(
        **arguments(beta=0.04, importance_sampling_level=level, off_policy_mask_threshold=0.1)
    )
    inputs = batch_of(trainer)
    inputs["advantages"] = torch.randn(6, T, generator=torch.Generator().manual_seed(1))
    found = by_both(trainer, trl, inputs)
    same(found)
    # One that the policy would never have said.
    inputs["old_per_token_logps"][0, 2] = -200.0
    ours, theirs = by_both(trainer, trl, inputs)
    assert (theirs[0] != theirs[0]) is (level == "token")
    same([ours, found[1]])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_a_policy_loss_has_the_configs_additions_and_logs_its_own(trl, arguments, loss_type):
    """TRL's metrics of its own loss make room for those of ours, which are the same here: of
    tokens, and the extremes over sequences.
    """
    options = {"top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.1, "entropy_coef": 0.3}
    given = arguments(beta=0.04, loss_type=loss_type, epsilon_high=0.1, **options)
    given["args"].max_completion_length = 11
    loss = counterpart(loss_type, beta=0.04, corrected=True, low=0.05, high=0.1, items=None)
    trainer = integration.FusedGRPOTrainer(**given, policy_loss=loss)
    trainer.max_completion_length = 11
    found = by_both(trainer, trl, batch_of(trainer))
    same(found)
    logged = found[0][2]
    assert logged["clip_ratio/low_min"] + logged["clip_ratio/high_max"] > 0
    # Another one than the config's.
    trainer.policy_loss = dataclasses.replace(fused_rl.gspo(), kl=None)
    ours = by_both(trainer, trl, batch_of(trainer))[0]
    assert ours[2]["policy_loss"] != pytest.approx(logged["policy_loss"], rel=1e-3)
    bonus = -0.3 * ours_entropy(trainer, batch_of(trainer))
    assert ours[0] == pytest.approx(ours[2]["policy_loss"] + bonus, rel=1e-4)


def ours_entropy(trainer, inputs: dict) -> float:
    """The mean entropy of the tokens of high entropy."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        _, entropy, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, T, compute_entropy=True
        )
    counted = inputs["completion_mask"] * inputs["tool_mask"]
    keep = trainer.get_high_entropy_mask(entropy, counted, 1 - trainer.top_entropy_quantile)
    return entropy[keep].mean().item()


def test_tokens_of_low_entropy_cost_no_backward_pass(trl, arguments):
    """21 tokens are scored; a gradient, which is what a backward pass is formed for, have 7."""
    trainer = integration.FusedGRPOTrainer(**arguments(top_entropy_quantile=0.3))
    inputs = batch_of(trainer, advantages=torch.ones(6))
    del inputs["old_per_token_logps"]
    (_, _, logged), _ = by_both(trainer, trl, inputs)
    assert logged["zero_gradient_fraction"] == pytest.approx(14 / 21)


# What is said of what we do not know.


def test_a_loss_type_that_is_not_known_is_named(arguments):
    for option in ("loss_type", "importance_sampling_level"):
        with pytest.raises(ValueError, match=rf"GRPOConfig\.{option}='bold' is none that"):
            integration.FusedGRPOTrainer(**arguments(**{option: "bold"}))


def test_a_trainer_with_a_loss_of_its_own_needs_a_policy_loss(arguments):
    gmpo = pytest.importorskip("trl.experimental.gmpo")

    class FusedGMPO(integration.FusedLoss, gmpo.GMPOTrainer):
        pass

    given = arguments(gmpo.GMPOConfig)
    with pytest.raises(ValueError, match="FusedGMPO has a loss of its own"):
        FusedGMPO(**given)
    loss = fused_rl.gmpo(clip_low=0.05, clip_high=0.05)
    trainer = FusedGMPO(**given, policy_loss=loss)
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch_of(trainer)))


def test_what_rloo_has_not_is_an_error(trl, arguments):
    given = arguments("RLOOConfig", beta=0.1)
    for loss, said in (
        (fused_rl.rloo(beta=0.1), "KL of RLOOConfig.beta is in the reward"),
        (fused_rl.dapo(), r"log-probs of the old policy for whole completions.*TokenRatio\(\)"),
        (lambda stats, batch: None, "for whole completions"),
    ):
        with pytest.raises(ValueError, match=said):
            integration.FusedRLOOTrainer(**given, policy_loss=loss)
    trainer = integration.FusedRLOOTrainer(**given, policy_loss=fused_rl.gpg())
    trainer.train()
    assert all(value == value for value in (weights(trainer).sum().item(),))


def changed(**parts: object) -> Callable:
    """A test's TRL whose GRPOTrainer has these parts of its own."""

    def change(monkeypatch, owner) -> None:
        for name, part in parts.items():
            monkeypatch.setattr(owner, name, part)

    return change


def scaled(self, model, inputs):
    return 1.5 * self.their_loss(model, inputs)


def elsewhere(self, model, inputs):
    return torch.zeros(())


def not_in_the_head(self, model, ids, mask, keep, **_):
    return torch.zeros(len(ids), keep), torch.zeros(len(ids), keep), None


MOVED = {
    "signature": (
        {"_compute_loss": lambda self, model, inputs, scale: None},
        "_compute_loss takes model, inputs, scale",
    ),
    "another loss": ({"_compute_loss": scaled}, "loss has another gradient than fused_rl's"),
    "loss elsewhere": (
        {"_compute_loss": elsewhere},
        "called _get_per_token_logps_and_entropies 0 times",
    ),
    "no head": (
        {"_get_per_token_logps_and_entropies": not_in_the_head},
        "called its fused head 0 times in one forward",
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_seam_that_moved_is_an_error_that_names_it(trl, arguments, monkeypatch, name):
    parts, said = MOVED[name]
    owner = trl.GRPOTrainer
    monkeypatch.setattr(owner, "their_loss", owner._compute_loss, raising=False)
    changed(**parts)(monkeypatch, owner)
    with pytest.raises(RuntimeError, match=f"TRL {trl.__version__}.*{said}"):
        integration.FusedGRPOTrainer(**arguments()).train()


def test_only_what_must_be_the_same_is_compared(trl, arguments, monkeypatch):
    """Not a log-ratio that ours holds at 20 nats; nor do advantages of 0 prove anything."""
    trainer = integration.FusedGRPOTrainer(**arguments(beta=0.04))
    inputs = batch_of(trainer)
    far = inputs | {"ref_per_token_logps": inputs["ref_per_token_logps"] + 25.0}
    nothing = inputs | {"advantages": torch.zeros(6), "ref_per_token_logps": None}
    trainer.compute_loss(trainer.model, far)
    assert not trainer._proved
    trainer.beta = 0.0
    trainer.policy_loss = trainer._of_config = dataclasses.replace(trainer.policy_loss, kl=None)
    trainer.compute_loss(trainer.model, nothing)
    assert not trainer._proved
    trainer.compute_loss(trainer.model, inputs)
    assert trainer._proved


def test_an_attribute_or_a_part_of_the_batch_that_moved_is_named(trl, arguments, monkeypatch):
    trainer = integration.FusedGRPOTrainer(**arguments())
    inputs = batch_of(trainer)
    del inputs["completion_mask"]
    with pytest.raises(RuntimeError, match="batches have no completion_mask"):
        trainer.compute_loss(trainer.model, inputs)
    make = trl.GRPOTrainer.__init__

    def renamed(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        self.clip_low = self.__dict__.pop("epsilon_low")

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", renamed)
    with pytest.raises(RuntimeError, match="FusedGRPOTrainer has no attribute epsilon_low"):
        integration.FusedGRPOTrainer(**arguments())
