"""LigerFusedLinearGRPOLoss against linear_policy_loss: the same numbers, or a test that says where
not, with the formula by hand.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from parity import CLIPPED, HIGH, ITEMS, LENGTH, LEVELS, LOSS_TYPES, LOW, Case, counterpart
from torch import Tensor

import fused_rl
from fused_rl import LMHead, TokenBatch, linear_logprobs, linear_policy_loss
from fused_rl.means import LengthWeightedMean

pytest.importorskip("triton", reason="triton is not installed, and liger-kernel needs it")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

V, H = 37, 16
# (beta, use_bias_correction_kl)
KLS = {"no KL": (0.0, False), "KL": (0.04, False), "corrected KL": (0.04, True)}
TOKEN_ONLY = ("cispo", "sapo", "vespo")


@pytest.fixture(autouse=True)
def one_thread(threads) -> None:
    """Tensors of a few hundred numbers: a second thread would only wait for the first."""
    torch.set_num_threads(1)


class Problem:
    """The tokens of a Case, with hidden states and a head that give them their log-probs."""

    def __init__(self, bias=True, temperature=1.0, dtype=torch.float32, case=None, V=V):
        case = case or Case.random()
        self.mask, self.advantages = case.counted, case.advantages.to(dtype)
        B, T = self.mask.shape
        self.temperature = temperature
        self.hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype).mul_(0.4).requires_grad_()
        self.bias = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
        self.labels = torch.randint(0, V, (B, T))
        with torch.no_grad():
            now = linear_logprobs(self.hidden, self.head, self.labels, temperature=temperature)
        gap, ref_gap = (t.detach() - case.logprobs.detach() for t in (case.old, case.ref))
        self.old = now.logprobs + gap.where(self.mask, 0.0).to(dtype)
        self.ref = now.logprobs + ref_gap.where(self.mask, 0.0).to(dtype)

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def double(self) -> "Problem":
        """The same numbers in float64: what both are judged by."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("hidden", "weight", "bias", "old", "ref", "advantages"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor = tensor.detach().double().requires_grad_(tensor.requires_grad)
            setattr(other, name, tensor)
        return other

    def batch(self, **more: Tensor) -> TokenBatch:
        given = {"old_logprobs": self.old, "ref_logprobs": self.ref}
        return TokenBatch.padded(self.labels, self.mask, self.advantages, **(given | more))

    def ours(self, loss, batch: TokenBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_policy_loss(
            self.hidden, self.head, batch or self.batch(), loss, temperature=self.temperature
        )

    def theirs(self, weights: Tensor | None = None, **options) -> tuple[Tensor, tuple]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        defaults = {"beta": 0.0, "epsilon_low": LOW, "epsilon_high": HIGH}
        options = defaults | options
        peer = LigerFusedLinearGRPOLoss(
            compiled=False,
            use_ref_model=options["beta"] != 0,
            max_completion_length=LENGTH,
            temperature=self.temperature,
            **options,
        )
        return peer(
            self.hidden,
            self.weight,
            self.labels,
            self.mask.to(self.weight.dtype),
            self.advantages,
            bias=self.bias,
            ref_per_token_logps=self.ref,
            old_per_token_logps=self.old,
            vllm_is_ratio=weights,
            num_items_in_batch=ITEMS,
        )

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves, retain_graph=True))

    def assert_same(self, ours: Tensor, theirs: Tensor) -> None:
        """In value and in the gradients of hidden, weight and bias, to 1e-4 of their norms."""
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        for pair in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            assert relative(*pair) < 1e-4


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def is_right(loss_type: str, level: str, kl: str) -> bool:
    """Whether Liger's is the mean over counted tokens that its name promises."""
    if loss_type == "luspo":
        return level == "sequence" and kl == "no KL"
    return level == "token" or loss_type not in TOKEN_ONLY


COMBINATIONS = [
    (loss_type, level, kl, delta, bias, temperature)
    for loss_type, level, kl, delta, bias, temperature in itertools.product(
        LOSS_TYPES, LEVELS, KLS, (None, 1.5), (False, True), (1.0, 0.7)
    )
    if is_right(loss_type, level, kl) and (delta is None or loss_type in CLIPPED)
]


@pytest.mark.parametrize(("loss_type", "level", "kl", "delta", "bias", "temperature"), COMBINATIONS)
def test_every_loss_and_its_gradients(loss_type, level, kl, delta, bias, temperature):
    beta, corrected = KLS[kl]
    problem = Problem(bias, temperature)
    expected, _ = problem.theirs(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        use_bias_correction_kl=corrected,
        delta=delta,
    )
    loss = counterpart(loss_type, level, beta=beta, corrected=corrected, delta=delta)
    problem.assert_same(problem.ours(loss)[0], expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_more_than_one_chunk_of_the_vocabulary(loss_type):
    """Theirs are of 4096."""
    problem = Problem(V=5000)
    level = "sequence" if loss_type == "luspo" else "token"
    expected, _ = problem.theirs(loss_type=loss_type, importance_sampling_level=level)
    problem.assert_same(problem.ours(counterpart(loss_type, level))[0], expected)


@pytest.mark.parametrize("chunk_size", [2, 3, 6])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_chunks_of_sequences(loss_type, chunk_size):
    problem = Problem()
    expected, _ = problem.theirs(loss_type=loss_type, beta=0.04, chunk_size=chunk_size)
    problem.assert_same(problem.ours(counterpart(loss_type, beta=0.04))[0], expected)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t not in ("luspo", "vespo")])
def test_importance_weights_of_the_rollout(loss_type):
    problem = Problem()
    weights = torch.rand(6, 7) * 2
    expected, _ = problem.theirs(weights, loss_type=loss_type, beta=0.04)
    batch = problem.batch(weights=weights)
    problem.assert_same(problem.ours(counterpart(loss_type, beta=0.04), batch)[0], expected)


def test_a_gradient_from_above_scales_theirs_and_ours():
    problem = Problem()
    expected, _ = problem.theirs(loss_type="grpo")
    ours, _ = problem.ours(counterpart("grpo"))
    problem.assert_same(-3 * ours, -3 * expected)


@pytest.mark.parametrize("level", LEVELS)
def test_metrics(level):
    """Theirs: the KL, and one clip fraction of both bounds."""
    problem = Problem()
    _, (kl, clipped) = problem.theirs(
        loss_type="dapo", importance_sampling_level=level, beta=0.04, use_bias_correction_kl=True
    )
    _, metrics = problem.ours(counterpart("dapo", level, beta=0.04, corrected=True))
    assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    ours = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert ours.item() == pytest.approx(clipped.item(), rel=1e-5)
    assert ours > 0.2


# Where they differ. `naive` is the formula, token by token, in float64.


def naive(problem: Problem, beta: float = 0.0, by_sequence: bool = False) -> Tensor:
    """LUSPO: mean over sequences of the sum over counted tokens of PPO's clip + beta k3."""
    exact = problem.double()
    logits = exact.hidden @ exact.weight.T
    if exact.bias is not None:
        logits = logits + exact.bias
    logprobs = torch.log_softmax(logits / exact.temperature, -1)
    total = torch.zeros((), dtype=torch.float64)
    for i, counted in enumerate(exact.mask.tolist()):
        places = [t for t, here in enumerate(counted) if here]
        own = {t: logprobs[i, t, exact.labels[i, t]] for t in places}
        x = {t: own[t] - exact.old[i, t] for t in places}
        if by_sequence and places:
            x = dict.fromkeys(places, sum(x.values()) / len(places))
        for t in places:
            r, A, d = x[t].exp(), exact.advantages[i], exact.ref[i, t] - own[t]
            term = -torch.min(r * A, r.clamp(1 - LOW, 1 + HIGH) * A)
            total = total + (term + beta * (d.exp() - d - 1)) / len(exact.mask)
    return total


@pytest.mark.parametrize(("level", "beta"), [("token", 0.0), ("token", 1.0), ("sequence", 1.0)])
def test_luspo_that_is_not_one_number_per_sequence_counts_padding(level, beta):
    """Per-token terms are averaged over all columns, times the length, without the mask: padding
    moves theirs, in value and in the gradients of states that no counted token has. Ours is the
    formula, before and after.
    """
    problem = Problem()
    loss = counterpart("luspo", level, beta=beta)
    expected = naive(problem, beta, level == "sequence")
    options = {"loss_type": "luspo", "importance_sampling_level": level, "beta": beta}
    before, _ = problem.theirs(**options)
    assert relative(problem.ours(loss)[0], expected) < 1e-6
    assert relative(before, expected) > 0.01
    for padded in (problem.old, problem.ref):
        padded += (~problem.mask).float()
    (ours, _), (after, _) = problem.ours(loss), problem.theirs(**options)
    assert relative(ours, expected) < 1e-6
    assert relative(after, before) > 0.01
    assert not problem.gradients(ours)[0][~problem.mask].any()
    assert problem.gradients(after)[0][~problem.mask].norm() > 0.01


def test_luspo_at_token_level_without_padding_is_length_weighted():
    """Every sequence of 7: theirs is the mean over tokens times 7, which is the sum."""
    problem = Problem()
    problem.mask = torch.ones_like(problem.mask)
    expected, _ = problem.theirs(loss_type="luspo", beta=0.04)
    loss = counterpart("luspo", beta=0.04)
    problem.assert_same(problem.ours(loss)[0], expected)
    weighted = dataclasses.replace(loss, mean=LengthWeightedMean(7))
    problem.assert_same(problem.ours(weighted)[0], expected)


@pytest.mark.parametrize("loss_type", TOKEN_ONLY)
def test_sequence_level_is_refused(loss_type):
    """Ours of these is TRL's: tests/test_trl_parity.py."""
    with pytest.raises(ValueError, match="not supported"):
        Problem().theirs(loss_type=loss_type, importance_sampling_level="sequence")


@pytest.mark.parametrize("which", ["old", "ref"])
def test_a_masked_log_prob_may_be_anything_to_us_and_is_nan_to_them(which):
    """They multiply by the mask, and inf * 0 is NaN: of the loss and of every gradient."""
    problem = Problem()
    clean, _ = problem.ours(counterpart("grpo", beta=0.04))
    clean_gradients = problem.gradients(clean)
    garbage = {"old": -500.0, "ref": 500.0}[which]
    setattr(problem, which, getattr(problem, which).masked_fill(~problem.mask, garbage))
    assert problem.theirs(loss_type="grpo", beta=0.04)[0].isnan()
    ours, _ = problem.ours(counterpart("grpo", beta=0.04))
    assert torch.equal(ours, clean)
    for gradient, expected in zip(problem.gradients(ours), clean_gradients, strict=True):
        assert torch.equal(gradient, expected)


def test_advantages_per_token_are_wrong_in_chunks_of_several_sequences():
    """[B, T] advantages meet [B, T] ratios as [B, 1, T]: each ratio with each sequence's."""
    problem = Problem()
    problem.advantages = torch.randn(6, 7)
    ours, _ = problem.ours(counterpart("dapo"))
    problem.assert_same(ours, problem.theirs(loss_type="dapo", chunk_size=1)[0])
    for chunk_size in (2, 6):
        wrong, _ = problem.theirs(loss_type="dapo", chunk_size=chunk_size)
        assert relative(wrong, ours) > 0.1


@pytest.mark.parametrize("label", [-100, V])
def test_a_counted_label_outside_the_vocabulary_is_silent(label):
    """Theirs has the log-prob -lse, as if its logit were 0; ours is an error."""
    problem = Problem()
    problem.labels[0, 0] = label
    assert problem.theirs(loss_type="dapo")[0].isfinite()
    with pytest.raises(ValueError, match="label"):
        problem.ours(counterpart("dapo"))


def test_importance_weights_of_vespo_are_summed_without_the_mask():
    """The weight of a sequence is the product over its counted tokens, that of old / rollout among
    them: ours takes the rollout's log-probs as old. A weight of 1.5 at padding moves theirs.
    """
    problem = Problem()
    weights = torch.rand(6, 7) + 0.5
    batch = problem.batch(old_logprobs=problem.old - weights.log())
    ours, _ = problem.ours(counterpart("vespo"), batch)
    right, _ = problem.theirs(weights.where(problem.mask, 1.0), loss_type="vespo")
    problem.assert_same(ours, right)
    moved, _ = problem.theirs(weights.where(problem.mask, 1.5), loss_type="vespo")
    assert relative(moved, ours) > 0.1


def one_sequence(log_ratios: list[float], advantage: float) -> Problem:
    """Of these log-ratios."""
    ratios = torch.tensor([log_ratios])
    every = torch.ones_like(ratios, dtype=torch.bool)
    zeros = torch.zeros_like(ratios)
    case = Case(zeros, zeros, -ratios, zeros, torch.tensor([advantage]), every, every)
    return Problem(case=case)


def test_a_ratio_beyond_exp_20_is_held_there():
    """Of one token with A = -1, over 40: theirs is exp(25), and at a log-ratio of 100 infinite."""
    problem = one_sequence([25.0], -1.0)
    held = pytest.approx(math.exp(20) / ITEMS, rel=1e-4)
    assert problem.theirs(loss_type="dapo")[0].item() == pytest.approx(
        math.exp(25) / ITEMS, rel=1e-4
    )
    assert problem.ours(counterpart("dapo"))[0].item() == held
    problem = one_sequence([100.0], -1.0)
    assert problem.theirs(loss_type="dapo")[0].isinf()
    assert problem.ours(counterpart("dapo"))[0].item() == held


def test_vespo_clamps_the_sum_alone():
    """Log-ratios of 30 and -29: the sequence's is 1; theirs holds each within 20 and finds 0."""
    problem = one_sequence([30.0, -29.0], 1.0)
    stats = linear_logprobs(problem.hidden, problem.head, problem.labels)
    nll = -stats.logprobs.detach().sum().item() / ITEMS
    phi = math.exp(2 + 3 * (1 - math.e))
    assert problem.theirs(loss_type="vespo")[0].item() == pytest.approx(nll, rel=1e-4)
    assert problem.ours(counterpart("vespo"))[0].item() == pytest.approx(phi * nll, rel=1e-4)


def test_float64_is_computed_in_float32():
    problem = Problem(dtype=torch.float64)
    expected, _ = problem.ours(counterpart("grpo"))
    theirs, _ = problem.theirs(loss_type="grpo")
    assert theirs.dtype == torch.float32 and expected.dtype == torch.float64
    error = relative(theirs, expected)
    assert 1e-9 < error < 1e-5


def test_bf16_gradients_of_the_head_are_rounded_after_every_chunk():
    """132 sequences, in bf16: theirs adds up dweight in bf16 and rounds logits to bf16; ours
    keeps both in float32 and rounds once.
    """
    case = Case.random().rows(torch.arange(132) % 6)
    problem = Problem(dtype=torch.bfloat16, case=case)
    exact = problem.double()
    expected = exact.gradients(exact.ours(counterpart("dapo"))[0])[1]
    ours = problem.gradients(problem.ours(counterpart("dapo"))[0])[1]
    theirs = problem.gradients(problem.theirs(loss_type="dapo")[0])[1]
    assert relative(ours, expected) < 2**-8
    assert relative(theirs, expected) > 3 * relative(ours, expected)


def test_nothing_counted():
    """Both are 0 with gradients of 0."""
    problem = Problem()
    problem.mask = torch.zeros_like(problem.mask)
    for loss in (problem.ours(fused_rl.grpo())[0], problem.theirs(loss_type="grpo")[0]):
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in problem.gradients(loss))
