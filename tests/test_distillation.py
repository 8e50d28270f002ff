"""Losses that learn from a teacher: values and gradients against explicit logits in float64, and
against all sequences of a small world."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import fused_rl
from fused_rl import (
    Divergence,
    DivergenceStats,
    LMHead,
    LossOutput,
    TokenBatch,
    TokenStats,
    distillation,
    linear_divergence,
    linear_policy_loss,
    ops,
)
from fused_rl.advantages import discounted_returns
from fused_rl.distillation import (
    DistillationLoss,
    forward_kl,
    gkd,
    kd,
    minillm,
    minillm_advantages,
    opd,
    opd_advantages,
)
from fused_rl.rewards import shape_rewards
from fused_rl.study.enumeration import EXACT, Expectation, Target
from fused_rl.study.exact_enumeration import ExactWorld

B, T, H, TEACHER_H, V = 3, 5, 8, 6, 37
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
F64 = {"dtype": torch.float64}


@pytest.fixture
def any_chunk_pays(monkeypatch):
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 1)


class Given:
    """Two heads and a batch."""

    def __init__(self, trained=True, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, **F64).to(dtype)

        self.hidden = normal(B, T, H).requires_grad_()
        self.weight = normal(V, H).requires_grad_(trained)
        self.bias = normal(V).requires_grad_(trained)
        self.teacher = normal(B, T, TEACHER_H), LMHead(normal(V, TEACHER_H), normal(V))
        labels = torch.randint(V, (B, T), generator=generator)
        self.batch = TokenBatch.padded(
            *(labels, MASK, normal(B, T)), old_logprobs=-3 + 0.1 * normal(B, T)
        )
        self.labels = labels

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, softcap=20.0)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t.requires_grad]

    def one(self, loss, temperature=1.0, rows=None) -> LossOutput:
        """In one pass."""
        output = linear_policy_loss(
            *(self.hidden, self.head, self.batch, loss),
            reference=self.teacher,
            temperature=temperature,
            chunk_bytes=None if rows is None else rows * 2 * V * 8,
        )
        assert type(output.loss.grad_fn).__name__ == "_OnePassBackward"
        return output

    def two(self, loss, temperature=1.0) -> LossOutput:
        """By statistics."""
        stats = linear_divergence(
            *(self.hidden, self.head, *self.teacher, self.labels),
            divergence=loss.divergence,
            temperature=temperature,
        )
        return loss(stats, self.batch)

    def logs(self, temperature=1.0) -> tuple[Tensor, Tensor]:
        """[B, T, V] each: the student's and the teacher's, by autograd alone."""
        z = self.hidden @ self.weight.T + self.bias
        z = 20 * torch.tanh(z / 20)
        hidden, head = self.teacher
        teacher_z = hidden @ head.weight.T + head.bias
        return tuple(torch.log_softmax(x / temperature, -1) for x in (z, teacher_z))

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, self.leaves, retain_graph=True)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def label(s: Tensor, given: Given) -> Tensor:
    return s.gather(-1, given.labels[..., None])[..., 0]


def clipped(s: Tensor, given: Given) -> Tensor:
    ratio = (label(s, given) - given.batch.old_logprobs.reshape(B, T)).exp()
    A = given.batch.advantages.reshape(B, T)
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)


CASES = {
    "forward_kl": (forward_kl(), 1.0, lambda s, t, g: kl(t, s)),
    "opd": (opd(), 1.0, lambda s, t, g: kl(s, t)),
    "gkd": (gkd(), 1.0, lambda s, t, g: jsd(s, t, 0.5)),
    "gkd, mixed": (gkd(0.1), 0.7, lambda s, t, g: jsd(s, t, 0.1)),
    "gkd, 0": (gkd(0.0), 1.0, lambda s, t, g: kl(t, s)),
    "gkd, 1": (gkd(1.0), 1.0, lambda s, t, g: kl(s, t)),
    "kd": (kd(), 1.0, lambda s, t, g: 0.5 * (kl(t, s) - label(s, g))),
    "kd, warm": (
        kd(0.3, temperature=2.0),
        2.0,
        lambda s, t, g: -0.3 * label(s, g) + 0.7 * 4 * kl(t, s),
    ),
    "kd, hard": (kd(1.0), 1.0, lambda s, t, g: -label(s, g)),
    "kd, reverse": (
        kd(0.2, divergence=Divergence.REVERSE),
        1.0,
        lambda s, t, g: 0.8 * kl(s, t) - 0.2 * label(s, g),
    ),
    "minillm": (minillm(), 1.0, lambda s, t, g: kl(s, t) + clipped(s, g)),
}


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula_in_one_pass_and_in_two(name, trained, rows, any_chunk_pays):
    loss, temperature, formula = CASES[name]
    given = Given(trained)
    logs = given.logs(temperature)
    expected = formula(*logs, given)[MASK].mean()
    gradients = given.gradients(expected)
    for output in (given.one(loss, temperature, rows), given.two(loss, temperature)):
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
        for mine, right in zip(given.gradients(output.loss), gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_metrics_are_means_over_counted_tokens():
    given = Given()
    s, t = given.logs()
    entropies = (-(x.exp() * x).sum(-1) for x in (s, t))
    expected = dict(
        zip(
            ("divergence", "nll", "entropy", "teacher_entropy"),
            (kl(t, s), -label(s, given), *entropies),
            strict=True,
        )
    )
    for output in (given.one(kd(0.9)), given.two(kd(0.9))):
        assert output.metrics.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(output.metrics[key], values[MASK].mean().detach())


def test_counts_are_those_of_the_step():
    """Micro-batches add up: half the tokens, each of the step's count."""
    given = Given()
    whole = given.one(gkd())
    halves = []
    for keep in (torch.arange(B * T) % 2 == 0, torch.arange(B * T) % 2 == 1):
        batch = dataclasses.replace(given.batch.with_mask(keep))
        args = (given.hidden, given.head, batch, gkd(num_tokens=int(MASK.sum())))
        halves.append(linear_policy_loss(*args, reference=given.teacher).loss)
    torch.testing.assert_close(sum(halves), whole.loss)


def test_weights_of_the_batch_multiply_a_tokens_loss():
    given = Given()
    weights = torch.rand(B, T, **F64)
    weights[0, 1] = math.nan
    given.batch = given.batch.with_weights(weights)
    s, t = given.logs()
    known = weights.nan_to_num(nan=1.0)
    expected = (known * (0.5 * kl(t, s) - 0.5 * label(s, given)))[MASK].mean()
    torch.testing.assert_close(given.one(kd()).loss, expected)


@pytest.mark.parametrize("loss", [gkd(), kd(), minillm()], ids=["gkd", "kd", "minillm"])
def test_what_is_masked_reaches_nothing_and_an_empty_batch_is_0(loss):
    given = Given()
    right = given.one(loss)
    expected = given.gradients(right.loss)
    with torch.no_grad():
        given.hidden[~MASK] = math.nan
        given.teacher[0][~MASK] = math.nan
    found = given.one(loss)
    assert torch.equal(found.loss, right.loss)
    assert all(map(torch.equal, given.gradients(found.loss), expected))
    given.batch = given.batch.with_mask(torch.zeros(B, T, dtype=torch.bool))
    for output in (given.one(loss), given.two(loss)):
        assert output.loss == 0 and output.metrics["divergence"] == 0
        assert all((g == 0).all() for g in given.gradients(output.loss))


def test_an_infinite_divergence_without_weight_is_no_part_of_the_loss():
    stats = DivergenceStats(*(torch.tensor([x]) for x in (math.inf, -2.0, 1.0, -1.0, 1.0)))
    batch = TokenBatch.packed(torch.zeros(1).long(), torch.tensor([0, 1]), torch.zeros(1))
    assert kd(1.0)(stats, batch).loss == 2.0
    assert kd(0.5)(stats, batch).loss == math.inf


@pytest.mark.parametrize("loss", [gkd(0.2), kd(0.4), minillm()], ids=["gkd", "kd", "minillm"])
def test_gradcheck(loss):
    given = Given()

    def value(*_):
        return given.one(loss).loss

    assert torch.autograd.gradcheck(value, given.leaves, fast_mode=True)


def test_compiles_without_a_break():
    given = Given()

    def plain(hidden):
        args = (hidden, given.head, given.batch, kd(0.3))
        return linear_policy_loss(*args, reference=given.teacher)

    torch.compiler.reset()
    found = torch.compile(plain, fullgraph=True, backend="aot_eager")(given.hidden)
    right = given.one(kd(0.3))
    torch.testing.assert_close(found.loss, right.loss)
    for mine, expected in zip(*map(given.gradients, (found.loss, right.loss)), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_loss_of_half_precision_statistics_is_float32():
    stats = DivergenceStats(*torch.rand(5, B, T).bfloat16().unbind())
    batch = Given(dtype=torch.float32).batch
    out, right = (kd()(DivergenceStats(*s), batch) for s in (stats, [t.float() for t in stats]))
    assert out.loss.dtype == torch.float32 and out.loss == right.loss


# Advantages


def test_opd_advantages_by_hand():
    """Log-ratios of 1, 2 and 4 nats at the counted tokens; what is not known adds nothing."""
    student = torch.tensor([[-1.0, -9.0, -1.0, -1.0, math.nan]], **F64)
    teacher = torch.tensor([[-2.0, -1.0, -3.0, -5.0, -1.0]], **F64)
    mask = torch.tensor([[True, False, True, True, True]])
    own = opd_advantages(student, teacher, mask)
    assert own.tolist() == [[-1.0, 0.0, -2.0, -4.0, 0.0]]
    half = opd_advantages(student, teacher, mask, gamma=0.5)
    assert half.tolist() == [[-3.0, 0.0, -4.0, -4.0, 0.0]]
    later = minillm_advantages(student, teacher, mask)
    assert later.tolist() == [[-2.0, 0.0, -2.0, 0.0, 0.0]]
    swapped = opd_advantages(torch.tensor([[-1.0]]), torch.tensor([[math.nan]]), mask[:, :1])
    assert swapped.tolist() == [[0.0]]


def test_advantages_are_those_of_k1_in_the_reward():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, B, T, generator=generator, **F64)
    rewards = shape_rewards(torch.zeros(B, **F64), student, teacher, MASK, beta=1.0)
    for gamma in (0.0, 0.9, 1.0):
        found = opd_advantages(student, teacher, MASK, gamma=gamma)
        torch.testing.assert_close(found, discounted_returns(rewards, MASK, gamma=gamma))


@pytest.mark.parametrize("form", [opd_advantages, minillm_advantages])
def test_padded_advantages_are_packed_ones(form):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, B, T, generator=generator, **F64)
    found = form(student, teacher, MASK)
    cu_seqlens = torch.cat([torch.zeros(1).long(), MASK.sum(-1).cumsum(0)])
    every = torch.ones(int(MASK.sum()), dtype=torch.bool)
    packed = form(student[MASK], teacher[MASK], every, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, found[MASK])
    assert (found[~MASK] == 0).all()
    none = torch.zeros_like(MASK)
    assert (form(student, teacher, none) == 0).all()


# What is optimised, over all sequences of a small world


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


def expected_gradient(world: ExactWorld, loss, sampler: Tensor, advantages=None) -> Tensor:
    """[S, V]: of the loss, over all that the sampling policy may sample; the teacher is ref."""
    leaf = world.current.clone().requires_grad_()
    loss = dataclasses.replace(loss, mean=Expectation(world.probability(sampler)))
    zeros = torch.zeros(world.B, **F64)
    args = (world.labels, world.mask, zeros if advantages is None else advantages)
    batch = TokenBatch.padded(*args, old_logprobs=world.logprobs(sampler))
    head, teacher = LMHead(leaf.T), (world.hidden, world.ref.T)
    output = linear_policy_loss(world.hidden, head, batch, loss, reference=teacher)
    return torch.autograd.grad(output.loss, leaf)[0]


@pytest.mark.parametrize(
    ("loss", "sampler", "target"),
    [
        (opd(), "current", Target.TOKEN_REVERSE),
        (opd(), "old", Target.OLD_TOKEN_REVERSE),
        (forward_kl(), "current", Target.TOKEN_FORWARD),
        (forward_kl(), "ref", Target.FORWARD),
        (kd(1.0), "ref", Target.FORWARD),
    ],
)
def test_what_a_loss_optimises(world, loss, sampler, target):
    """forward_kl on the teacher's samples is the KL of whole sequences, as their likelihood is."""
    found = expected_gradient(world, loss, getattr(world, sampler))
    assert (found - world.truth[target]).abs().max() < EXACT


def test_minillm_with_the_sum_of_later_tokens_is_the_kl_of_whole_sequences(world):
    now, teacher = world.logprobs(world.current), world.logprobs(world.ref)
    to_go, own = (opd_advantages(now, teacher, world.mask, gamma=gamma) for gamma in (1.0, 0.0))
    found = expected_gradient(world, minillm(), world.current, to_go - own)
    assert (found - world.truth[Target.REVERSE]).abs().max() < EXACT
    mean = minillm_advantages(now, teacher, world.mask)
    biased = expected_gradient(world, minillm(), world.current, mean)
    assert (biased - world.truth[Target.REVERSE]).abs().max() > 1e-3


@pytest.mark.parametrize(("gamma", "target"), [(0.0, Target.TOKEN_REVERSE), (1.0, Target.REVERSE)])
def test_sampled_opd_has_the_gradient_of_the_exact_one(world, gamma, target):
    now, teacher = world.logprobs(world.current), world.logprobs(world.ref)
    advantages = opd_advantages(now, teacher, world.mask, gamma=gamma)
    found = expected_gradient(world, fused_rl.ppo(), world.current, advantages)
    assert (found - world.truth[target]).abs().max() < EXACT


# Mistakes


def test_mistakes_are_named():
    given = Given()
    args = (given.hidden, given.head, given.batch)
    for loss in (gkd(), kd()):
        with pytest.raises(ValueError, match=r"there is none: give linear_policy_loss its refer"):
            linear_policy_loss(*args, loss)
        with pytest.raises(ValueError, match=r"there is none: give linear_policy_loss its refer"):
            loss(TokenStats(torch.zeros(B, T), torch.zeros(B, T)), given.batch)
    for maker in (gkd, opd, distillation.forward_kl):
        with pytest.raises(ValueError, match=rf"loss must be a loss.*give {maker.__name__}\("):
            linear_policy_loss(*args, maker, reference=given.teacher)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        kd(2)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got -0.5"):
        gkd(-0.5)
    with pytest.raises(ValueError, match="divergence must be a Divergence, got 'jsd'"):
        DistillationLoss("jsd")
