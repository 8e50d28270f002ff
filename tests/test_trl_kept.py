"""Kept sets of a rollout, through TRL's rollout_func, into FusedGRPOTrainer's loss.

The engine is the trainer's own model, which samples from the five most likely tokens; TRL's loss of
plain torch's renormalised log-probs is what ours is compared with.
"""

from types import ModuleType

import pytest
import torch
from tiny_models import qwen2, word_tokenizer
from torch import Tensor

from fused_rl.integrations import trl as integration
from fused_rl.sampling_masks import SamplingMask

pytestmark = pytest.mark.slow

V, T, TOP, TEMPERATURE = 23, 6, 5, 0.7


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    return pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")


@pytest.fixture
def trainer(trl, tmp_path, monkeypatch, threads):
    """trainer(rollout_func, **options of GRPOConfig): two steps per generation, and a reference."""
    from datasets import Dataset

    torch.set_num_threads(1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    path = str(tmp_path / "model")
    model = qwen2(V, seed=3, initializer_range=0.3, max_position_embeddings=32, **tokens)
    model.save_pretrained(path)

    def build(rollout_func, **options):
        defaults = {"num_iterations": 2, "beta": 0.04, "max_steps": 6, "temperature": TEMPERATURE}
        defaults |= {"per_device_train_batch_size": 4, "steps_per_generation": 2}
        args = trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=4,
            max_completion_length=T,
            learning_rate=2e-2,
            save_strategy="no",
            disable_tqdm=True,
            **(defaults | options),
        )
        return integration.FusedGRPOTrainer(
            model=path,
            reward_funcs=lambda completions, **_: [float(len(c) % 5) for c in completions],
            args=args,
            processing_class=word_tokenizer(V),
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 5}" for i in range(8)]}),
            rollout_func=rollout_func,
        )

    return build


def rollout(prompts: list[str], trainer) -> dict[str, list]:
    """Completions of 2 to T tokens from the TOP most likely tokens. The third token of some is not
    the engine's; masks are vLLM's, SGLang's, and none.
    """
    found: dict[str, list] = {name: [] for name in ("prompt_ids", "completion_ids", "logprobs")}
    found |= {"sampling_mask": [], "env_mask": []}
    for i, prompt in enumerate(prompts):
        ids = trainer.processing_class(prompt)["input_ids"]
        completion, logprobs, sets = [], [], []
        own = [int(i % 3 > 0 or t != 2) for t in range(2 + i % (T - 1))]
        for of_engine in own:
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([ids + completion])).logits[0, -1]
            kept = (logits / TEMPERATURE).topk(TOP)
            p = kept.values.softmax(-1)
            at = int(torch.multinomial(p, 1))
            completion.append(int(kept.indices[at]) if of_engine else 7)
            logprobs.append(p[at].log().item() if of_engine else 0.0)
            if of_engine:
                sets.append(kept.indices.tolist())
        if i % 4 == 0:
            offsets = [TOP * t for t in range(len(sets) + 1)]
            mask = SamplingMask([v for ids in sets for v in ids], offsets)
        else:
            mask = None if i % 4 == 3 else [None if i % 2 else sets[0], *sets[1:]]
        for name, value in zip(found, (ids, completion, logprobs, mask, own), strict=True):
            found[name].append(value)
    return found


def plain(model, inputs: dict) -> tuple[Tensor, Tensor]:
    """Log-probs over the kept sets and entropies of all entries, [B, T], in plain torch."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    columns = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -columns - 1 : -1] / TEMPERATURE
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    outside = torch.zeros_like(logits, dtype=torch.bool)
    generated = inputs["completion_mask"] * inputs["tool_mask"]
    for b, given in enumerate(inputs["sampling_mask"]):
        if hasattr(given, "offsets"):
            pairs = zip(given.offsets, given.offsets[1:], strict=False)
            given = [given.token_ids[a:b] for a, b in pairs]
        for t, kept in zip(generated[b].nonzero()[:, 0].tolist(), given or [], strict=False):
            if kept is not None:
                outside[b, t] = True
                outside[b, t, kept] = False
    logprobs = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
    found = logprobs.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    return found.where(generated.bool(), 0.0), entropy


OPTIONS = {
    "dapo": {},
    "sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "bonus": {"entropy_coef": 0.2, "top_entropy_quantile": 0.6},
    "two completions at a time": {"per_device_train_batch_size": 2, "steps_per_generation": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_is_trls_of_renormalised_log_probs(trl, trainer, name):
    """Of the policy, of the old policy, and of the reference; the masks go with the completions
    when TRL shuffles and splits them.
    """
    made = trainer(rollout, **OPTIONS[name])
    base, ours = trl.GRPOTrainer, made._compute_loss
    seen = []

    def both(model, inputs):
        mine = ours(model, inputs)
        logprobs, entropy = plain(model, inputs)
        counted = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        if not seen:
            # The old policy and the reference are where the policy is.
            for other in ("old_per_token_logps", "ref_per_token_logps"):
                torch.testing.assert_close(inputs[other][counted], logprobs[counted])
        made._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
        theirs = base._compute_loss(made, model, inputs)
        del made._get_per_token_logps_and_entropies
        weights = list(made.model.parameters())
        pair = [
            torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)])
            for x in (mine, theirs)
        ]
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
        seen.append(((pair[0] - pair[1]).norm() / pair[1].norm()).item())
        return theirs

    made._compute_loss = both
    made.train()
    assert len(seen) == 6 and max(seen) < 1e-4


def test_vllms_ratio_on_policy_is_one(trainer):
    """The engine's log-probs are of the sets, and so are those of the old policy."""
    made = trainer(rollout)
    made.use_vllm, made._last_loaded_step = True, 0

    examples = [made.train_dataset[i] for i in range(8)]
    output = made._generate_and_score_completions(examples)
    whole = [i for i in range(8) if i % 4 != 1 and i % 4 != 3]
    ratios = output["importance_sampling_ratio"]
    torch.testing.assert_close(ratios[whole], torch.ones_like(ratios[whole]))
    assert "sampling_mask" not in examples[0] and len(output["sampling_mask"]) == 8


def test_masks_that_do_not_fit_are_errors(trainer):
    made = trainer(lambda prompts, of: rollout(prompts, of) | {"sampling_mask": [None]})
    with pytest.raises(ValueError, match=r"'sampling_mask' of rollout_func must be one .*8, got 1"):
        made.train()
