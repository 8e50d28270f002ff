"""Policy and reference of one trainer by one head, in bfloat16; mixtures of experts in ours.

Trainers are real ones, around models of a few thousand weights. At the first step policy and
reference have equal weights, and every log-ratio is exactly 0 where one head computes both.
"""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from tiny_models import word_tokenizer

import fused_rl
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import logprobs

pytest.importorskip("trl", minversion="1.15", reason="trl >= 1.15 is not installed")

# Importing trl takes as long as all of these.
pytestmark = pytest.mark.slow

V = 512


@pytest.fixture(autouse=True)
def unpatched(threads, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    yield
    integration.unpatch()


MODELS = {
    "Qwen2": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "Qwen3Moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.05,
    },
}


@pytest.fixture
def saved(tmp_path) -> Callable[[str], str]:
    """A directory with a model, since TRL makes the reference from the name of the model."""
    import transformers

    def save(family: str, dtype: torch.dtype = torch.bfloat16) -> str:
        torch.manual_seed(3)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=V,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            **MODELS[family],
        )
        path = str(tmp_path / family)
        getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).save_pretrained(path)
        return path

    return save


def options(tmp_path, **more) -> dict:
    given = {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "max_steps": 1}
    given |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 8}
    return {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-3} | given | more


def preference_trainer(
    kind: str, path: str, tmp_path, dtype: str = "bfloat16", adapter=None, **more
):
    import trl
    from datasets import Dataset

    prompts = [f"w{i} w{i + 5}" for i in range(8)]
    good, bad = ([f" w{9 * i + k} w3 w{k} w{7 * k}" for i in range(8)] for k in (1, 7))
    columns = {
        "DPO": {"prompt": prompts, "chosen": good, "rejected": bad},
        "KTO": {"prompt": prompts, "completion": good, "label": [True, False] * 4},
    }[kind]
    loading = {"model_init_kwargs": {"dtype": dtype}}
    return getattr(trl, f"{kind}Trainer")(
        model=path,
        args=getattr(trl, f"{kind}Config")(**options(tmp_path, **loading, **more)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=word_tokenizer(V),
        peft_config=adapter,
    )


def first(trainer) -> dict:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "grad_norm" in entry)


CASES = {
    "plain": ("Qwen2", {}),
    "use_weighting": ("Qwen2", {"use_weighting": True}),
    "softcap": ("Gemma2", {}),
    "softcap, use_weighting": ("Gemma2", {"use_weighting": True}),
    "precomputed": ("Qwen2", {"precompute_ref_log_probs": True}),
    "precomputed, softcap": ("Gemma2", {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_of_dpo_compares_equal_weights(saved, tmp_path, monkeypatch, case):
    """The trainer is made before patch(), as users do."""
    family, more = CASES[case]
    calls = []
    ours = logprobs.statistics
    monkeypatch.setattr(logprobs, "statistics", lambda *a: calls.append(1) or ours(*a))
    path = saved(family)
    plain = first(preference_trainer("DPO", path, tmp_path, **more))
    trainer = preference_trainer("DPO", path, tmp_path, **more)
    assert not calls
    with integration.patched():
        entry = first(trainer)
    assert len(calls) == (0 if "precomputed" in case else 2)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert entry[name] == plain[name] == 0.0, name
    if "use_weighting" not in more:
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)
    # TRL's are of logits in bfloat16; the weights of use_weighting are exponentials of their sums.
    for name in ("loss", "logits/chosen", "logits/rejected", "entropy", "grad_norm"):
        assert entry[name] == pytest.approx(plain[name], rel=2e-2, abs=2e-3), name


def test_an_adapter_and_its_base(saved, tmp_path):
    """LoRA, whose reference is the model without it: a frozen head for both."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = preference_trainer("DPO", saved("Gemma2"), tmp_path, adapter=lora)
    with integration.patched():
        entry = first(trainer)
    assert entry["rewards/chosen"] == entry["rewards/rejected"] == 0.0
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
def test_dpo_by_weights_in_float32(saved, tmp_path, family):
    """What is logged is what TRL's logs, but for the rounding of float32."""
    path = saved(family, torch.float32)
    entries = []
    for context in (contextlib.nullcontext, integration.patched):
        trainer = preference_trainer("DPO", path, tmp_path, "float32", use_weighting=True)
        with context():
            entries.append(first(trainer))
    plain, ours = entries
    assert plain["loss"] > 0
    for name in ("loss", "logits/chosen", "logits/rejected", "entropy", "grad_norm"):
        assert ours[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("within", [False, True])
def test_a_reference_made_by_one_head_is_compared_with_that_head(saved, tmp_path, within):
    """Made within patched() or before it, trained within or after it: TRL's, in every order."""
    path = saved("Qwen2")
    more = {"precompute_ref_log_probs": True}
    if within:
        with integration.patched():
            trainer = preference_trainer("DPO", path, tmp_path, **more)
        entry = first(trainer)
    else:
        trainer = preference_trainer("DPO", path, tmp_path, **more)
        with integration.patched():
            entry = first(trainer)
    assert entry["rewards/margins"] == 0.0
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_the_first_step_of_kto(saved, tmp_path, family, precomputed):
    """Both heads are ours, or both are TRL's."""
    trainer = preference_trainer(
        "KTO", saved(family), tmp_path, precompute_ref_log_probs=precomputed
    )
    with integration.patched():
        entry = first(trainer)
    assert entry["rewards/chosen"] == entry["rewards/rejected"] == 0.0
    assert entry["kl"] == 0.0


# Mixtures of experts.


def share(completions: list[str], **_: object) -> list[float]:
    return [sum(w in ("w0", "w1", "w2") for w in c.split()) + len(c) / 99 for c in completions]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("coef", [None, 0.3, 0.0])
@pytest.mark.parametrize("policy_loss", [None, fused_rl.dapo(clip_high=0.2)])
def test_a_mixture_of_experts_keeps_its_balance(saved, tmp_path, policy_loss, coef, accumulated):
    """Every step: TRL's gradients and loss; None is the model's own weight of the loss, and the
    config's policy loss.
    """
    import trl
    from datasets import Dataset

    more = {"num_generations": 4, "max_completion_length": 6, "beta": 0.0, "max_steps": 4}
    more |= {"gradient_accumulation_steps": accumulated, "router_aux_loss_coef": coef}
    trainer = integration.FusedGRPOTrainer(
        model=saved("Qwen3Moe", torch.float32),
        reward_funcs=share,
        args=trl.GRPOConfig(**options(tmp_path, **more)),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 5}" for i in range(8)]}),
        processing_class=word_tokenizer(V),
        policy_loss=policy_loss,
    )
    ours, base = trainer._compute_loss, trl.GRPOTrainer
    name = "_get_per_token_logps_and_entropies"
    seen = []

    def both(model, inputs):
        mine = ours(model, inputs)
        setattr(trainer, name, getattr(base, name).__get__(trainer))
        try:
            theirs = base._compute_loss(trainer, model, inputs)
        finally:
            delattr(trainer, name)
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        pair = [
            torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)])
            for x in (mine, theirs)
        ]
        distance = (pair[0] - pair[1]).norm() / pair[1].norm()
        seen.append((distance.item(), mine.item(), theirs.item()))
        return theirs

    trainer._compute_loss = both
    trainer.train()
    assert len(seen) == 4 * accumulated
    for distance, mine, theirs in seen:
        assert distance < 1e-5
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    logged = [e["aux_loss"] for e in trainer.state.log_history if "aux_loss" in e]
    assert bool(logged) is (coef != 0.0)
    # At least 1, where every expert is chosen equally often; once by ours and once by theirs.
    assert all(value > 0.9 for value in logged)
