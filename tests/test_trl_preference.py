"""TRL's preference trainers on our head: CPO and ORPO without logits, DPO and KTO by its own seam.

Trainers are real ones, around models of a few thousand weights. Each batch's loss, metrics and
gradients are formed with and without us, in float64 where TRL's are.
"""

import contextlib
import re
import sys
from collections.abc import Callable
from types import ModuleType
from types import SimpleNamespace as Some

import pytest
import torch
from test_integration_trl import distance
from test_trl_distillation import a_trl
from tiny_models import qwen2, word_tokenizer
from torch import Tensor, nn

from fused_rl import ops
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import divergence, preference

V, H, T = 23, 16, 9
KINDS = ("CPO", "ORPO")
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}

# Importing trl takes as long as the rest of the suite.
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def unpatched(threads, monkeypatch):
    """And on one thread: these models are too small for two."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    yield
    integration.unpatch()


# Without TRL.


def a_class(monkeypatch, kind: str, signature: str = ", ".join(preference.NAMES)) -> type:
    """A trainer that looks like TRL's, and whose batch is concatenated already."""
    a_trl(monkeypatch, divergence.NAMES)
    scope: dict = {}
    exec(f"def forward({signature}): return 'theirs'", scope)
    inputs = staticmethod(lambda batch, **_: {k: v for k, v in batch.items() if "concat" in k})
    methods = {"concatenated_forward": scope["forward"], "concatenated_inputs": inputs}
    module = ModuleType(f"trl.experimental.{kind.lower()}.{kind.lower()}_trainer")
    made = type(f"{kind}Trainer", (), {**methods, "get_batch_logps": staticmethod(lambda: None)})
    setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def a_trainer(owner: type, **options: object) -> object:
    made = owner()
    made.accelerator = Some(device=torch.device("cpu"))
    made.is_encoder_decoder = made.aux_loss_enabled = False
    made.pad_token_id = made.padding_value = 0
    vars(made).update({"cpo_alpha": 1.0, "loss_type": "sigmoid"} | options)
    return made


def a_batch() -> dict[str, Tensor]:
    """Two pairs, padded on the right; the second rejected completion has one token."""
    ids = torch.randint(3, V, (4, T))
    there = torch.arange(T) < torch.tensor([[9], [6], [7], [4]])
    completion = there & (torch.arange(T) >= torch.tensor([[3], [2], [3], [3]]))
    batch = {"input_ids": ids * there, "attention_mask": there.long()}
    batch["labels"] = ids.where(completion, -100)
    return {"chosen_labels": ids[:2], **{f"concatenated_{k}": v for k, v in batch.items()}}


def naive(model: nn.Module, batch: dict[str, Tensor], kind: str, average: bool) -> list[Tensor]:
    """The log-probs of chosen and rejected, the means of their logits, and the NLL."""
    names = ("input_ids", "attention_mask", "labels")
    ids, mask, labels = (batch[f"concatenated_{name}"] for name in names)
    z = model(input_ids=ids, attention_mask=mask).logits
    log_p = torch.log_softmax(z[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    sums = torch.stack([p[c].sum() / (len(p[c]) if average else 1) for p, c in zip(log_p, counted)])  # noqa: B905
    likelihood = (mask[:, 1:] == 1 if kind == "ORPO" else counted)[:2]
    means = z.detach() if kind == "CPO" else z.detach()[:, :-1]
    return [sums[:2], sums[2:], means[:2].mean(), means[2:].mean(), -log_p[:2][likelihood].mean()]


def a_model(family: str) -> nn.Module:
    import transformers

    options = {"Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8}, "Cohere": {}, "Qwen2": {}}
    options |= {"Cohere": {"logit_scale": 0.25}}
    narrow = {"hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": V}
    narrow |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**narrow, **TOKENS, **options[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Cohere"])
@pytest.mark.parametrize(("kind", "loss_type"), [("CPO", "sigmoid"), ("CPO", "ipo"), ("ORPO", "")])
def test_log_probs_and_nll_are_those_of_the_logits(monkeypatch, family, kind, loss_type):
    """And their gradients, in float64; the output layer is never called."""
    trainer = a_trainer(a_class(monkeypatch, kind), loss_type=loss_type)
    model, batch = a_model(family), a_batch()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    with integration.patched():
        trainer.concatenated_forward(model, batch)
        # Those in which the model was asked what it does to its logits.
        asked = len(calls)
        found = list(trainer.concatenated_forward(model, batch))
    assert len(calls) == asked
    columns = T if kind == "CPO" else T - 1
    assert found[2].shape == found[3].shape == (2, columns)
    found[2:4] = (means.mean() for means in found[2:4])
    expected = naive(model, batch, kind, loss_type != "sigmoid")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = list(model.parameters())
    pair = [
        torch.autograd.grad((w - 2 * x).sum() + nll, weights) for w, x, *_, nll in (found, expected)
    ]
    assert distance(*pair) < 1e-12


def test_without_an_nll_the_prompt_costs_nothing(monkeypatch):
    """CPO counts completions; ORPO the prompts of the chosen too; neither what is padded."""
    rows = []
    scored = preference.linear_logprobs

    def seen(hidden, head, labels):
        rows.append(int((labels != -100).sum()))
        return scored(hidden, head, labels)

    monkeypatch.setattr(preference, "linear_logprobs", seen)
    batch, model = a_batch(), qwen2(V)
    for kind, alpha in (("CPO", 0), ("CPO", 1.0), ("ORPO", 0)):
        trainer = a_trainer(a_class(monkeypatch, kind), cpo_alpha=alpha)
        with integration.patched():
            *_, nll = trainer.concatenated_forward(model, batch)
        assert (nll.item() == 0) is (kind == "CPO" and alpha == 0)
    # Completions of 6, 4, 4 and 1 tokens; chosen of 9 and 6, of which the first predicts only.
    assert rows == [15, 15, 8 + 5 + 4 + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_theirs(monkeypatch, kind):
    owner = a_class(monkeypatch, kind)
    theirs = owner.concatenated_forward
    batch, plain = a_batch(), qwen2(V)
    sharded = qwen2(V)
    sharded.lm_head.weight.ds_id = 0
    other = type("Other", (owner,), {"get_batch_logps": staticmethod(lambda: None)})
    with integration.patched():
        assert owner.concatenated_forward is not theirs
        assert a_trainer(owner).concatenated_forward(plain, batch) != "theirs"
        assert a_trainer(other).concatenated_forward(plain, batch) == "theirs"
        for option in ("is_encoder_decoder", "aux_loss_enabled"):
            trainer = a_trainer(owner, **{option: True})
            assert trainer.concatenated_forward(plain, batch) == "theirs"
        assert a_trainer(owner).concatenated_forward(sharded, batch) == "theirs"
    assert owner.concatenated_forward is theirs


def test_labels_that_are_not_the_tokens_stay_theirs(monkeypatch):
    """ORPO's NLL is of the tokens, its odds of the labels; CPO's are both of the labels."""
    batch = a_batch()
    batch["concatenated_labels"][0, 4] = (batch["concatenated_labels"][0, 4] + 1) % V
    for kind in KINDS:
        trainer = a_trainer(a_class(monkeypatch, kind))
        with integration.patched():
            found = trainer.concatenated_forward(qwen2(V), batch)
        assert (found == "theirs") is (kind == "ORPO")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_moved_is_an_error_and_changes_nothing(monkeypatch, kind):
    owner = a_class(monkeypatch, kind, "self, model, batch, more")
    theirs = owner.concatenated_forward
    utils = sys.modules["trl.trainer.utils"]
    with pytest.raises(
        RuntimeError, match=rf"{kind}Trainer\.concatenated_forward takes .*, more\."
    ):
        integration.patch()
    assert owner.concatenated_forward is theirs
    assert utils._ChunkedLogProbFunction is utils.original


# With TRL.


@pytest.fixture
def trainer(tmp_path) -> Callable:
    """trainer("CPO" or "ORPO", dtype, steps, adapter, longer completions, **config)."""
    pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")

    def build(
        kind: str, dtype=torch.float64, steps: int = 4, adapter=None, longer: str = "", **options
    ):
        from datasets import Dataset
        from trl.experimental import cpo, orpo

        module = {"CPO": cpo, "ORPO": orpo}[kind]
        given = {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1}
        given |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4}
        given |= {"output_dir": str(tmp_path), "learning_rate": 1e-2, "max_length": 32}
        data = Dataset.from_dict(
            {
                "prompt": [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)],
                "chosen": [" w3 w4 w5 w6 w7"[: 3 + 3 * (i % 5)] + longer for i in range(8)],
                "rejected": [" w7 w2 w8 w9 w2"[: 3 + 3 * (2 * i % 5)] + longer for i in range(8)],
            }
        )
        made = {"hidden_size": H, "max_position_embeddings": 64, "initializer_range": 0.3, **TOKENS}
        return getattr(module, f"{kind}Trainer")(
            model=qwen2(V, seed=3, **made).to(dtype),
            args=getattr(module, f"{kind}Config")(max_steps=steps, **(given | options)),
            train_dataset=data,
            eval_dataset=data,
            processing_class=word_tokenizer(V),
            peft_config=adapter,
        )

    return build


def side_by_side(trainer) -> list[tuple[float, list[float], list[float]]]:
    """(distance of gradients, our loss and metrics, theirs) of every batch, on theirs' way."""
    seen = []

    def both(model, batch, train_eval="train"):
        made, found = type(trainer).get_batch_loss_metrics.__get__(trainer), []
        for context in (integration.patched, contextlib.nullcontext):
            with context():
                found.append(made(model, batch, train_eval))
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        pair = [list(torch.autograd.grad(loss, trained, retain_graph=True)) for loss, _ in found]
        assert found[0][1].keys() == found[1][1].keys()
        values = [[loss.item(), *metrics.values()] for loss, metrics in found]
        seen.append((distance(*pair), *values))
        return found[1]

    trainer.get_batch_loss_metrics = both
    trainer.train()
    return seen


CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2, "cpo_alpha": 0.3},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0},
    "alphapo": {"loss_type": "simpo", "alpha": 0.3, "cpo_alpha": 0.0},
    "alphapo of sums": {"alpha": -0.2},
}


@slow
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_cpo_has_the_same_loss_metrics_and_gradients(trainer, case):
    """float64: accuracies are means of 0 and 1."""
    seen = side_by_side(trainer("CPO", gradient_accumulation_steps=2, **CASES[case]))
    assert len(seen) == 8
    assert max(error for error, *_ in seen) < 1e-12
    for _, ours, theirs in seen:
        assert len(ours) == 10 and ours == pytest.approx(theirs, rel=1e-12, abs=1e-14)


@slow
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_every_step_of_orpo_has_the_same_loss_metrics_and_gradients(trainer, beta):
    """TRL rounds the mean log-probs to float32, in which it forms the odds."""
    seen = side_by_side(trainer("ORPO", gradient_accumulation_steps=2, beta=beta))
    assert len(seen) == 8
    assert max(error for error, *_ in seen) < 1e-6
    for _, ours, theirs in seen:
        assert len(ours) == 12 and ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_ends_at_the_same_weights(trainer, kind):
    """12 steps of AdamW in float64, of 1e-2 each at first, and an evaluation."""
    ends, metrics = [], []
    for context in (contextlib.nullcontext, integration.patched):
        made = trainer(kind, steps=12)
        with context():
            made.train()
            metrics.append(made.evaluate())
        ends.append([p.detach().clone() for p in made.model.parameters()])
    apart = max((a - b).abs().max().item() for a, b in zip(*ends, strict=True))
    assert apart < (1e-12 if kind == "CPO" else 1e-6)
    names = [n for n in metrics[0] if n.startswith("eval_") and not re.search("second|runtime", n)]
    assert len(names) == (10 if kind == "CPO" else 12)
    for name in names:
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-6, abs=1e-6), name


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_takes_the_cheap_way(trainer, monkeypatch, kind):
    """LoRA, whose head is frozen: 4 NHV, and the same gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    calls, op = [], ops.linear_logprobs_frozen
    monkeypatch.setattr(ops, "linear_logprobs_frozen", lambda *a: calls.append(1) or op(*a))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    seen = side_by_side(trainer(kind, torch.float32, 3, lora))
    assert len(seen) == len(calls) == 3
    assert max(error for error, *_ in seen) < 1e-5


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_compiled_once(trainer, kind):
    """And again where the number of columns is found to vary: what differs by step is an input."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    torch.compiler.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    made = trainer(kind, steps=12, **compiled)
    with integration.patched():
        made.train()
    assert 1 <= frames["ok"] <= 2
    seen = side_by_side(trainer(kind, **compiled))
    assert len(seen) == 4 and max(error for error, *_ in seen) < 1e-6
    for _, ours, theirs in seen:
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@slow
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_nearer_to_float64_from_bfloat16(trainer, kind, mixed):
    """A model in bfloat16, and one in float32 under accelerate's autocast to bfloat16.

    Exact is float64 from what the head multiplies: hidden states and weight in bfloat16. In the
    weight's gradient both round the logits' and what comes of them, by up to 2^-9 of each.
    """
    made = trainer(kind, torch.float32 if mixed else torch.bfloat16, bf16=mixed)
    batch = next(iter(made.get_train_dataloader()))
    model, weight = made.accelerator.prepare(made.model), made.model.lm_head.weight

    wide = weight.detach().bfloat16().double().requires_grad_()

    def of(model: Callable, weight: Tensor) -> list[Tensor]:
        chosen, rejected, *_, nll = made.concatenated_forward(model, batch)
        loss = rejected.sum() - chosen.sum() + nll
        found = torch.cat([chosen, rejected, nll[None]]).detach().double()
        return [found, torch.autograd.grad(loss, weight)[0].double()]

    def exact(input_ids: Tensor, **inputs: object) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            hidden = made.model.model(input_ids, **inputs).last_hidden_state
        return Some(logits=hidden.bfloat16().double() @ wide.T)

    expected, theirs = of(exact, wide), of(model, weight)
    with integration.patched():
        ours = of(model, weight)
    errors = [
        [distance([a], [b]) for a, b in zip(found, expected, strict=True)]
        for found in (ours, theirs)
    ]
    assert errors[0][0] < 1e-6 and errors[1][0] > 1e-4
    assert max(errors[0][1], errors[1][1]) < 2**-8


@slow
def test_alphapo_of_sums_is_lost_at_long_completions_with_and_without_us(trainer):
    """TRL's exp(S)^-0.3 has no finite gradient in float32 below S = -68, and no value below -104.

    Gradients are clipped to a norm, which makes NaN of all of them.
    """
    for longer, finite in (("", True), (" w3" * 40, False)):
        for context in (contextlib.nullcontext, integration.patched):
            made = trainer("CPO", torch.float32, 2, longer=longer, max_length=64, alpha=0.3)
            with context():
                made.train()
            logged = next(e for e in made.state.log_history if "grad_norm" in e)
            assert (logged["logps/chosen"] > -68) is finite
            assert all(bool(p.isfinite().all()) is finite for p in made.model.parameters())
            assert finite or all(p.isnan().all() for p in made.model.parameters())
            assert (logged["loss"] == 0.0) is not finite
