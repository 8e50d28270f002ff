"""Every loss of TRL's DPOTrainer and KTOTrainer on our head: the same losses, metrics, gradients.

Their formulas stay TRL's, and take the log-probs, entropies and sums of squared probabilities that
our head gives. In float32, which is what TRL's head forms logits in whatever the model is in.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
from test_integration_trl import distance
from tiny_models import qwen2, word_tokenizer

from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import logprobs

# Importing trl takes as long as the rest of the suite.
pytestmark = pytest.mark.slow

V = 23
PAIRED = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# TRL refuses aot with weights, and multiplies others in place, which torch refuses of these two.
WEIGHTED = tuple(t for t in PAIRED if t not in ("aot", "aot_unpaired", "hinge", "sft"))
CASES: dict[str, dict] = {
    **{name: {"loss_type": [name]} for name in PAIRED},
    **{f"{name}, smoothed": {"loss_type": [name], "label_smoothing": 0.2} for name in SMOOTHED},
    **{f"{name}, weighted": {"loss_type": [name], "use_weighting": True} for name in WEIGHTED},
    **{
        f"{name}, ld_alpha": {"loss_type": [name], "ld_alpha": 0.3}
        for name in ("sigmoid", "ipo", "sigmoid_norm")
    },
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "weighted, ld_alpha": {"use_weighting": True, "ld_alpha": 0.3},
    **{
        name: {"f_divergence_type": name}
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    },
}


@pytest.fixture(autouse=True)
def unpatched(threads, monkeypatch):
    """And on one thread: these models are too small for two."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """A directory, since TRL makes the reference model from the name of the model."""
    path = str(tmp_path_factory.mktemp("model"))
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    options = {"max_position_embeddings": 64, "initializer_range": 0.3, **tokens}
    qwen2(V, seed=3, **options).save_pretrained(path)
    return path


@pytest.fixture
def trainer(model_path, tmp_path) -> Callable:
    """trainer("DPO" or "KTO", **options of its config)."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")

    def build(kind: str, **options):
        from datasets import Dataset

        given = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 4, "beta": 0.5}
        given |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4}
        given |= {"output_dir": str(tmp_path), "learning_rate": 1e-2, "logging_steps": 1}
        prompts = [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)]
        chosen = [" w3 w4 w5 w6 w7"[: 3 + 3 * (i % 5)] for i in range(8)]
        rejected = [" w7 w2 w8 w9 w2"[: 3 + 3 * (2 * i % 5)] for i in range(8)]
        labels = [True, False, True, True, False, True, False, False]
        columns = {
            "DPO": {"prompt": prompts, "chosen": chosen, "rejected": rejected},
            "KTO": {"prompt": prompts, "completion": chosen, "label": labels},
        }[kind]
        return getattr(trl, f"{kind}Trainer")(
            model=model_path,
            args=getattr(trl, f"{kind}Config")(**(given | options)),
            train_dataset=Dataset.from_dict(columns),
            processing_class=word_tokenizer(V),
        )

    return build


def side_by_side(trainer) -> list[tuple[float, dict, dict]]:
    """(distance of gradients, our loss and metrics, theirs) of every batch, on theirs' way."""
    seen = []

    def both(model, inputs, *args):
        losses, logged = [], []
        for context in (integration.patched, contextlib.nullcontext):
            trainer._metrics["train"].clear()
            with context():
                losses.append(type(trainer)._compute_loss.__get__(trainer)(model, inputs, *args))
            logged.append({k: v[-1] for k, v in trainer._metrics["train"].items()})
            # A sum over all calls.
            del logged[-1]["num_tokens"]
            logged[-1]["loss"] = losses[-1].item()
        weights = list(trainer.model.parameters())
        pair = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        seen.append((distance(*pair), *logged))
        return losses[1]

    trainer._compute_loss = both
    trainer.train()
    return seen


def assert_the_same(seen: list[tuple[float, dict, dict]], metrics: int) -> None:
    assert len(seen) == 4
    assert max(error for error, *_ in seen) < 1e-5
    for _, ours, theirs in seen:
        assert ours.keys() == theirs.keys() and len(ours) == 1 + metrics
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows with every call of our head."""
    found, ours = [], logprobs.statistics
    monkeypatch.setattr(logprobs, "statistics", lambda *a: found.append(1) or ours(*a))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_loss_of_dpo(trainer, calls, case):
    assert_the_same(side_by_side(trainer("DPO", **CASES[case])), metrics=10)
    assert len(calls) == 4 * 2


@pytest.mark.parametrize("loss_type", ["hinge", "sft"])
def test_weights_of_these_are_an_error_of_torch_with_and_without_us(trainer, loss_type):
    for context in (contextlib.nullcontext, integration.patched):
        made = trainer("DPO", loss_type=[loss_type], use_weighting=True)
        with context(), pytest.raises(RuntimeError, match=r"in-?place operation|single memory"):
            made.train()


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 2.0, "undesirable_weight": 0.5}])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_both_losses_of_kto(trainer, calls, loss_type, weights):
    """With the mismatched completions of the reference point there are two calls more."""
    assert_the_same(side_by_side(trainer("KTO", loss_type=loss_type, **weights)), metrics=9)
    assert len(calls) == 4 * (4 if loss_type == "kto" else 2)
