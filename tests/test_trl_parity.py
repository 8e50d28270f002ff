"""TRL's trainers against our losses: the same numbers, or a named test that says where not.

A trainer is built from its public options, around a model of a few thousand weights. Its loss is
then called, in float64, on log-probs and entropies of our choosing, that stand where the model's
would; two tests leave the model in place.
"""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from parity import CLIPPED, HIGH, ITEMS, LENGTH, LEVELS, LOSS_TYPES, LOW, Case, alone, counterpart
from tiny_models import qwen2, word_tokenizer
from torch import Tensor

import fused_rl
from fused_rl import PolicyLoss, TokenBatch, linear_logprobs, linear_policy_loss
from fused_rl.means import SequenceSumMean, TokenMean
from fused_rl.mismatch import off_policy_sequence_mask, top_entropy_mask

pytest.importorskip("trl", minversion="1.16", reason="trl is not installed")

# Importing trl takes as long as all of these.
pytestmark = pytest.mark.slow

V = 23
# (beta, use_bias_correction_kl)
KLS = {"no KL": (0.0, True), "KL": (0.04, False), "corrected KL": (0.04, True)}


@pytest.fixture(autouse=True)
def one_thread(threads) -> None:
    """Tensors of a few hundred numbers: a second thread would only wait for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    model = qwen2(V, seed=3, max_position_embeddings=32, initializer_range=0.5)
    path = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(path)
    word_tokenizer(V).save_pretrained(path)
    return path


@pytest.fixture
def trainer(model_path, tmp_path, monkeypatch) -> Callable:
    """trainer(**options of GRPOConfig), in evaluation: no accumulation, no dropout."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(classes=None, **options):
        import trl
        from datasets import Dataset

        Config, Trainer = classes or (trl.GRPOConfig, trl.GRPOTrainer)
        bounds = {"epsilon": LOW, "epsilon_high": HIGH}
        args = Config(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=6,
            num_generations=6,
            max_completion_length=LENGTH,
            **(bounds | options),
        )
        built = Trainer(
            model=model_path,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 6}),
        )
        built.model.eval()
        return built

    return build


def inputs(case: Case, **more: Tensor) -> dict[str, Tensor]:
    prompt = torch.ones(len(case.advantages), 2, dtype=torch.int64)
    given = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": case.labels,
        "completion_mask": case.completion.long(),
        "tool_mask": (case.counted | ~case.completion).long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "num_items_in_batch": torch.tensor(ITEMS),
    }
    return given | more


def theirs(trainer, case: Case, **more: Tensor) -> Tensor:
    """The loss of a trainer whose model has the case's log-probs and entropies."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        case.logprobs,
        case.entropy,
        None,
    )
    return trainer.compute_loss(trainer.model, inputs(case, **more))


COMBINATIONS = [
    *itertools.product(LOSS_TYPES, LEVELS, KLS, [None]),
    *itertools.product(CLIPPED, LEVELS, ["corrected KL"], [1.1, 1.5]),
]


def tolerance(loss_type: str) -> float:
    """TRL keeps the temperatures of SAPO in float32, whatever the rest is in: 1.05 + 5e-8."""
    return 1e-6 if loss_type == "sapo" else 1e-12


@pytest.mark.parametrize(("loss_type", "level", "kl", "delta"), COMBINATIONS)
def test_every_loss_and_its_gradients(trainer, loss_type, level, kl, delta):
    beta, corrected = KLS[kl]
    case = Case.random()
    peer = trainer(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        use_bias_correction_kl=corrected,
        delta=delta,
    )
    loss = counterpart(loss_type, level, beta=beta, corrected=corrected, delta=delta)
    case.assert_same(case.ours(loss), theirs(peer, case), tolerance(loss_type))


def test_named_losses_are_these_compositions():
    """What the parity above says of compositions, it says of the losses that have a name."""
    narrow = {"low": 3e-4, "high": 4e-4}
    pairs = [
        (fused_rl.grpo(), counterpart("grpo", high=0.2)),
        (fused_rl.bnpo(), counterpart("bnpo", high=0.2)),
        (fused_rl.dr_grpo(LENGTH), counterpart("dr_grpo", high=0.2)),
        (fused_rl.dapo(num_tokens=ITEMS), counterpart("dapo")),
        (fused_rl.cispo(num_tokens=ITEMS), counterpart("cispo", high=5.0)),
        (fused_rl.sapo(), counterpart("sapo")),
        (fused_rl.vespo(num_tokens=ITEMS), counterpart("vespo")),
        (fused_rl.gspo(), counterpart("grpo", "sequence", **narrow)),
        (fused_rl.luspo(), counterpart("luspo", "sequence", **narrow)),
    ]
    for named, composed in pairs:
        assert named == alone(composed)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_per_token(trainer, loss_type):
    case = Case.random()
    case.advantages = torch.randn(6, 7, dtype=torch.float64)
    peer = trainer(loss_type=loss_type)
    ours = case.ours(counterpart(loss_type))
    case.assert_same(ours, theirs(peer, case), tolerance(loss_type))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_old_logprobs_every_ratio_is_one(trainer, loss_type, level):
    case = Case.random()
    peer = trainer(loss_type=loss_type, importance_sampling_level=level, beta=0.04)
    batch = TokenBatch.padded(case.labels, case.counted, case.advantages, ref_logprobs=case.ref)
    loss = counterpart(loss_type, level, beta=0.04, corrected=True)
    expected = theirs(peer, case, old_per_token_logps=None)
    case.assert_same(case.ours(loss, batch), expected, tolerance(loss_type))


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "bnpo"])
def test_accumulated_micro_batches(trainer, loss_type):
    """Two uneven ones: theirs add up to ours of the two, with the counts of both, and to ours of
    the whole batch.
    """
    whole = Case.random()
    peer = trainer(loss_type=loss_type, gradient_accumulation_steps=2, steps_per_generation=2)
    peer.model.train()
    peer.current_gradient_accumulation_steps = 2
    halves = [whole.rows(slice(0, 3)), whole.rows(slice(3, 6))]
    sum_of_theirs = sum(theirs(peer, half) for half in halves)
    whole.assert_same(whole.ours(counterpart(loss_type)), sum_of_theirs, tolerance(loss_type))


def test_accumulated_bnpo_is_no_mean_of_the_step(trainer):
    """It averages the means of micro-batches: tokens of a short one weigh more. So does ours."""
    whole = Case.random()
    peer = trainer(loss_type="bnpo", gradient_accumulation_steps=2, steps_per_generation=2)
    peer.model.train()
    peer.current_gradient_accumulation_steps = 2
    halves = [whole.rows(slice(0, 3)), whole.rows(slice(3, 6))]
    loss = counterpart("bnpo")
    mean_of_ours = sum(half.ours(loss) for half in halves) / 2
    whole.assert_same(mean_of_ours, sum(theirs(peer, half) for half in halves))
    assert abs(mean_of_ours - whole.ours(loss)) > 0.01


class Nothing(fused_rl.surrogates.Surrogate):
    """0: what remains of a loss is its KL and its entropy."""

    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return torch.zeros_like(log_ratio)


BONUS = PolicyLoss(Nothing(), entropy_coef=0.1, mean=TokenMean())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_is_a_token_mean_whatever_the_loss(trainer, loss_type):
    """Theirs is -coef * mean over the (micro-)batch's tokens, beside the loss; ours is under the
    loss's own mean. They agree for bnpo; elsewhere ours with theirs is a second loss, added.
    """
    case = Case.random()
    expected = theirs(trainer(loss_type=loss_type, entropy_coef=0.1), case)
    ours = case.ours(counterpart(loss_type)) + case.ours(BONUS)
    case.assert_same(ours, expected, tolerance(loss_type))


def test_entropy_bonus_under_the_means_of_both(trainer):
    """A bonus of 0.1, as a part of the loss: the weights of tokens are 1 / 21 each in theirs."""
    case = Case.random()
    assert int(case.counted.sum()) == 21
    for loss_type in ("bnpo", "grpo"):
        expected = theirs(trainer(loss_type=loss_type, entropy_coef=0.1), case)
        dentropy = case.gradients(expected)[1][case.counted]
        torch.testing.assert_close(dentropy, torch.full_like(dentropy, -0.1 / 21))
        own = case.ours(dataclasses.replace(counterpart(loss_type), entropy_coef=0.1))
        ours = case.gradients(own)[1]
        per_token = {"bnpo": -0.1 / 21, "grpo": -0.1 / 6 / 3}[loss_type]
        assert ours[1, 0].item() == pytest.approx(per_token, abs=1e-15)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "vespo"])
def test_importance_weights_of_the_rollout(trainer, loss_type):
    """They multiply the surrogate, and not the KL."""
    case = Case.random()
    weights = torch.rand(6, 7, dtype=torch.float64) * 2
    peer = trainer(loss_type=loss_type, beta=0.04)
    peer.use_vllm = True
    batch = case.batch.with_weights(weights)
    loss = counterpart(loss_type, beta=0.04, corrected=True)
    expected = theirs(peer, case, importance_sampling_ratio=weights)
    case.assert_same(case.ours(loss, batch), expected, tolerance(loss_type))


def test_importance_weights_of_vespo_are_part_of_its_ratio(trainer):
    """Their product with the ratio is the ratio to the rollout: ours takes its log-probs as old."""
    case = Case.random()
    weights = (torch.rand(6, 7, dtype=torch.float64) + 0.5).where(case.counted, 1.0)
    rollout = case.old - weights.log()
    batch = TokenBatch.padded(case.labels, case.counted, case.advantages, old_logprobs=rollout)
    expected = theirs(trainer(loss_type="vespo"), case, importance_sampling_ratio=weights)
    case.assert_same(case.ours(counterpart("vespo"), batch), expected)


def test_off_policy_sequence_mask(trainer):
    """Theirs drops the surrogate of a sequence and keeps its KL: a weight of 0, in our words."""
    case = Case.random()
    peer = trainer(beta=0.04, off_policy_mask_threshold=0.1)
    keep = off_policy_sequence_mask(case.logprobs, case.batch, delta=0.1)
    dropped = (~keep.reshape(6, 7) & case.counted).any(-1)
    assert dropped.tolist() == [False, True, False, False, False, False]
    batch = case.batch.with_weights(keep.double())
    loss = counterpart("dapo", beta=0.04, corrected=True)
    case.assert_same(case.ours(loss, batch), theirs(peer, case))


def test_top_entropy_quantile(trainer):
    """The 5 of 21 tokens of highest entropy: they keep the surrogate, all keep the KL."""
    case = Case.random()
    keep = top_entropy_mask(case.entropy, case.batch, fraction=0.2)
    assert int(keep.reshape(6, 7)[case.counted].sum()) == 5
    batch = case.batch.with_weights(keep.double())
    loss = counterpart("dapo", beta=0.04, corrected=True)
    peer = trainer(beta=0.04, top_entropy_quantile=0.2)
    case.assert_same(case.ours(loss, batch), theirs(peer, case))


def test_metrics_at_token_level(trainer):
    case = Case.random()
    peer = trainer(beta=0.04)
    theirs(peer, case)
    metrics = counterpart("dapo", beta=0.04, corrected=True)(case.stats, case.batch).metrics
    logged = {name: values[-1] for name, values in peer._metrics["eval"].items()}
    assert metrics["kl"].item() == pytest.approx(logged["kl"], rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx(logged["entropy"], rel=1e-6)
    for side in ("low", "high"):
        ours = metrics[f"clip_fraction_{side}"].item()
        assert ours > 0
        assert ours == pytest.approx(logged[f"clip_ratio/{side}_mean"], rel=1e-6)


# Where they differ.


def test_bias_correction_of_the_kl_is_their_default_and_not_ours(trainer):
    case = Case.random()
    expected = theirs(trainer(loss_type="grpo", beta=1.0), case)
    case.assert_same(case.ours(counterpart("grpo", beta=1.0, corrected=True)), expected)
    plain = case.ours(fused_rl.grpo(beta=1.0, clip_low=LOW, clip_high=HIGH))
    gradient, corrected = (case.gradients(loss)[0] for loss in (plain, expected))
    assert (gradient - corrected).norm() > 0.1 * corrected.norm()


def test_luspo_at_token_level_is_a_masked_sum(trainer):
    """TRL 1.16 sums the counted tokens of a sequence: each weighs 1 / B. Older versions, and Liger,
    take the mean over all columns of loss * length, LengthWeightedMean but for the mask.
    """
    case = Case.random()
    loss = counterpart("luspo", "token")
    assert isinstance(loss.mean, SequenceSumMean)
    expected = theirs(trainer(loss_type="luspo"), case)
    case.assert_same(case.ours(loss), expected)
    before = case.ours(dataclasses.replace(loss, mean=fused_rl.means.LengthWeightedMean(7)))
    assert abs(before - expected) > 0.1


def test_a_masked_log_prob_may_be_anything_to_us_and_is_nan_to_them(trainer):
    """They multiply by the mask, and inf * 0 is NaN. Ours are those of the case without garbage."""
    case, clean = Case.random(), Case.random()
    case.old = case.old.masked_fill(~case.counted, -1000.0)
    assert theirs(trainer(), case).isnan()
    assert theirs(trainer(), clean).isfinite()
    loss = counterpart("dapo")
    assert torch.equal(case.ours(loss), clean.ours(loss))
    gradient, expected = (c.gradients(c.ours(loss))[0] for c in (case, clean))
    assert torch.equal(gradient, expected)


def far_off(log_ratios: list[float], advantage: float) -> Case:
    """One sequence of these log-ratios, at log-probs of -1."""
    ratios = torch.tensor([log_ratios], dtype=torch.float64)
    logprobs = torch.full_like(ratios, -1.0).requires_grad_()
    entropy = torch.zeros_like(ratios).requires_grad_()
    every = torch.ones_like(ratios, dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return Case(logprobs, entropy, logprobs.detach() - ratios, logprobs, advantages, every, every)


def test_a_ratio_beyond_exp_20_is_held_there(trainer):
    """Of one token with A = -1 theirs is exp(25), over 40 tokens; ours stops at exp(20)."""
    case = far_off([25.0], -1.0)
    expected = theirs(trainer(), case)
    assert expected.item() == pytest.approx(torch.tensor(25.0).double().exp().item() / ITEMS)
    ours = case.ours(counterpart("dapo"))
    held = torch.tensor(20.0).double().exp().item() / ITEMS
    assert ours.item() == pytest.approx(held)
    assert case.gradients(ours)[0].item() == pytest.approx(held)


def test_vespo_clamps_the_sum_alone(trainer):
    """Log-ratios of 30 and -29 make a sequence's of 1; theirs holds each within 20 and finds 0.

    The paper's weight is of the sequence: w = e, phi = e^(2 + 3 (1 - e)).
    """
    case = far_off([30.0, -29.0], 1.0)
    assert theirs(trainer(loss_type="vespo"), case).item() == pytest.approx(2 / ITEMS)
    w = torch.tensor(1.0).double().exp()
    phi = w**2 * torch.exp(3 * (1 - w))
    assert case.ours(counterpart("vespo")).item() == pytest.approx(phi.item() * 2 / ITEMS)


def test_vespo_counts_importance_weights_of_padding(trainer):
    """Their log-weights are summed without the mask: a weight at padding moves the loss."""
    case = Case.random()
    weights = torch.ones(6, 7, dtype=torch.float64).where(case.counted, 1.5)
    peer = trainer(loss_type="vespo")
    moved = theirs(peer, case, importance_sampling_ratio=weights)
    still = theirs(peer, case)
    case.assert_same(case.ours(counterpart("vespo")), still)
    assert abs(moved - still) > 0.01


def test_clip_fractions_at_sequence_level_count_sequences(trainer):
    """Theirs is the share of sequences, the empty one too; ours the share of tokens."""
    case = Case.random()
    peer = trainer(importance_sampling_level="sequence")
    theirs(peer, case)
    low, high = (peer._metrics["eval"][f"clip_ratio/{side}_mean"][-1] for side in ("low", "high"))
    metrics = counterpart("dapo", "sequence")(case.stats, case.batch).metrics
    assert (low, high) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert metrics["clip_fraction_low"].item() == pytest.approx(3 / 21)
    assert metrics["clip_fraction_high"].item() == pytest.approx(6 / 21)


# Other trainers.


def without_empty_sequence() -> Case:
    """One whose advantage is 0, so that it does not matter."""
    case = Case.random()
    case.advantages[2] = 0.0
    return case


def test_a_sequence_without_tokens_is_a_constant_to_gmpo_and_rloo(trainer):
    """Its ratio is exp(0), its loss -A / B, with a gradient of 0. Ours counts tokens: it is 0."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    case = Case.random()
    peer = trainer((gmpo.GMPOConfig, gmpo.GMPOTrainer), epsilon=0.4, epsilon_high=0.4)
    ours = case.ours(fused_rl.gmpo())
    case.assert_same(ours - case.advantages[2] / 6, theirs(peer, case), 1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_gmpo(trainer, beta):
    """TRL's experimental trainer; its KL is uncorrected."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    case = without_empty_sequence()
    bounds = {"epsilon": 0.3, "epsilon_high": 0.4}
    peer = trainer((gmpo.GMPOConfig, gmpo.GMPOTrainer), beta=beta, **bounds)
    loss = fused_rl.gmpo(clip_low=0.3, clip_high=0.4, beta=beta)
    case.assert_same(case.ours(loss), theirs(peer, case))


def test_rloo(trainer):
    """Whole sequences, and the mean over them. Its KL is in the reward, before the loss."""
    import trl

    case = without_empty_sequence()
    case.counted = case.completion
    case.old = case.logprobs.detach() - torch.randn(6, 7, dtype=torch.float64) * 0.2
    old = (case.old * case.counted).sum(1)
    peer = trainer((trl.RLOOConfig, trl.RLOOTrainer), beta=0.0)
    loss = fused_rl.rloo(clip_low=LOW, clip_high=HIGH)
    case.assert_same(case.ours(loss), theirs(peer, case, old_logps=old))


# With their model in place.


def model_inputs(trainer, case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of real tokens, and the states that predict them with the labels."""
    prompt, completion = torch.randint(3, V, (6, 2)), torch.randint(3, V, (6, 7))
    given = inputs(case, prompt_ids=prompt, completion_ids=completion)
    given["prompt_mask"] = torch.ones_like(prompt)
    ids = torch.cat([prompt, completion], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return given, hidden[:, 1:-1], completion


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_weights_of_a_model_get_the_same_gradients(trainer, loss_type, level):
    """Hidden states and head to linear_policy_loss in float32, at temperature 0.7."""
    case = Case.random(torch.float32)
    peer = trainer(loss_type=loss_type, importance_sampling_level=level, beta=0.04, temperature=0.7)
    given, hidden, labels = model_inputs(peer, case)
    head = peer.model.lm_head.weight
    with torch.no_grad():
        now = linear_logprobs(hidden, head, labels, temperature=0.7).logprobs
    case.old, case.ref = (now + t - case.logprobs.detach() for t in (case.old, case.ref))
    given |= {"old_per_token_logps": case.old, "ref_per_token_logps": case.ref}
    batch = TokenBatch.padded(
        labels, case.counted, case.advantages, old_logprobs=case.old, ref_logprobs=case.ref
    )
    loss = counterpart(loss_type, level, beta=0.04, corrected=True)
    ours = linear_policy_loss(hidden, head, batch, loss, temperature=0.7).loss
    expected = peer.compute_loss(peer.model, given)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = list(peer.model.parameters())
    for pair in zip(
        *(torch.autograd.grad(loss, weights) for loss in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_the_entropy_of_a_model_gets_the_same_gradients(trainer):
    case = Case.random(torch.float32)
    peer = trainer(loss_type="bnpo", entropy_coef=0.1, temperature=0.7)
    given, hidden, labels = model_inputs(peer, case)
    head = peer.model.lm_head.weight
    batch = TokenBatch.padded(labels, case.counted, case.advantages)
    loss = fused_rl.bnpo(clip_low=LOW, clip_high=HIGH, entropy_coef=0.1)
    ours = linear_policy_loss(hidden, head, batch, loss, temperature=0.7).loss
    expected = peer.compute_loss(peer.model, given | {"old_per_token_logps": None})
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = list(peer.model.parameters())
    for pair in zip(
        *(torch.autograd.grad(loss, weights) for loss in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
