"""A policy loss beside a reference: the one pass over two heads, and the exact penalty it forms."""

import dataclasses
import math

import oracle
import pytest
import torch
from test_one_pass import Launches, Objective, Step, any_chunk_pays
from torch import Tensor

import fused_rl
from fused_rl import (
    Divergence,
    DivergenceStats,
    KLPenalty,
    Level,
    LMHead,
    LossOutput,
    PolicyLoss,
    TokenBatch,
    linear_divergence,
    linear_policy_loss,
)

V, REF_H = 257, 24
DIVERGENCES = {
    "reverse": Divergence.REVERSE,
    "forward": Divergence.FORWARD,
    "jsd": Divergence.JSD(0.3),
    "hellinger": Divergence.HELLINGER,
}
any_chunk_pays = any_chunk_pays


class Beside(Step):
    """Step, and a reference of another size near its policy; the batch has no ref_logprobs."""

    def __init__(self, every=True, dtype=torch.float32, B=4, trained=True, requires=False) -> None:
        super().__init__(every, dtype, B, trained)
        self.ref_hidden, self.ref_weight, self.ref_bias = (
            (scale * torch.randn(*s)).to(dtype).requires_grad_(requires)
            for s, scale in (((B, 4, REF_H), 1.0), ((V, REF_H), 0.2), ((V,), 1.0))
        )
        self.batch = dataclasses.replace(self.batch, ref_logprobs=None)

    @property
    def reference(self) -> tuple[Tensor, LMHead]:
        return self.ref_hidden, LMHead(self.ref_weight, self.ref_bias, 0.8, 20.0)

    def output(self, loss, rows=None, **options) -> LossOutput:
        """In one pass, in chunks of `rows` tokens."""
        width = 8 if self.ref_hidden.dtype == torch.float64 else 4
        chunk_bytes = None if rows is None else rows * 2 * V * width
        options = {"chunk_bytes": chunk_bytes, "temperature": 0.9, **options}
        args = (self.leaves[0], self.head, self.batch, loss)
        output = linear_policy_loss(*args, reference=self.reference, **options)
        assert type(output.loss.grad_fn).__name__ == "_OnePassBackward"
        return output

    def two(self, loss) -> LossOutput:
        """By linear_divergence, a head and a loss of statistics apart."""
        labels = self.batch.labels.reshape(self.batch.shape)
        ref_hidden, head = self.reference
        untrained = LMHead(head.weight.detach(), head.bias.detach(), head.scale, head.softcap)
        stats = linear_divergence(
            *(self.leaves[0], self.head, ref_hidden.detach(), untrained, labels),
            divergence=loss.divergence,
            temperature=0.9,
        )
        return loss(DivergenceStats(*(t.reshape(-1) for t in stats)), self.batch)


def assert_same(step: Beside, one: LossOutput, two: LossOutput, bound: float) -> None:
    torch.testing.assert_close(one.loss, two.loss, rtol=bound, atol=bound)
    assert one.metrics.keys() == two.metrics.keys()
    for key, value in two.metrics.items():
        torch.testing.assert_close(one.metrics[key], value, rtol=bound, atol=bound, msg=key)
    for mine, right in zip(step.gradients(one), step.gradients(two), strict=True):
        assert (mine - right).norm() <= bound * right.norm()


# What is the same


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_pass_is_two_passes(name, rows, trained, every, any_chunk_pays):
    step = Beside(every, torch.float64, trained=trained)
    loss = fused_rl.dapo(beta=0.3, kl=DIVERGENCES[name], entropy_coef=0.1)
    assert_same(step, step.output(loss, rows), step.two(loss), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_add_up(dtype, trained, any_chunk_pays):
    step = Beside(False, dtype, B=12, trained=trained)
    loss = fused_rl.grpo(beta=0.5, kl=Divergence.JSD(0.5))
    exact = dtype in oracle.microkernels()
    whole = step.output(loss)
    for rows in (1, 7, 33):
        found = step.output(loss, rows)
        torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=1e-6)
        assert found.metrics.keys() == whole.metrics.keys()
        for mine, right in zip(step.gradients(found), step.gradients(whole), strict=True):
            bound = 2e-6 if dtype == torch.float32 and exact else 1e-2
            assert (mine - right).norm() <= bound * right.norm()


@pytest.mark.parametrize(
    "penalty",
    [
        KLPenalty(0.3, exact=Divergence.REVERSE, importance=Level.TOKEN),
        KLPenalty(0.3, exact=Divergence.REVERSE, importance=Level.TOKEN, attached=False),
        KLPenalty(0.3, exact=Divergence.REVERSE, importance=Level.PRODUCT),
        KLPenalty(0.3, exact=Divergence.FORWARD, importance=Level.GEOMETRIC, attached=False),
    ],
)
def test_importance_by_a_formula_of_its_own(penalty):
    """beta w D, from probabilities [N, V] in float64."""
    step = Beside(True, torch.float64)
    labels = step.batch.labels.reshape(step.batch.shape)
    loss = PolicyLoss(fused_rl.surrogates.Reinforce(), kl=penalty, mean=fused_rl.means.TokenSum())
    batch = dataclasses.replace(step.batch, advantages=torch.zeros(16))
    args = (step.leaves[0], step.head, batch, loss)
    output = linear_policy_loss(*args, reference=step.reference, temperature=0.9)
    one_pass = type(output.loss.grad_fn).__name__ == "_OnePassBackward"
    assert one_pass == (penalty.importance is Level.TOKEN)
    ref_hidden, ref_head = step.reference
    logs = torch.log_softmax(step.head.logits(step.leaves[0]) / 0.9, -1)
    logt = torch.log_softmax(ref_head.logits(ref_hidden) / 0.9, -1)
    p, q = (logs, logt) if penalty.exact is Divergence.REVERSE else (logt, logs)
    divergence = (p.exp() * (p - q)).sum(-1)
    ratio = logs.gather(-1, labels[..., None])[..., 0] - batch.old_logprobs.reshape(4, 4)
    if penalty.importance is not Level.TOKEN:
        mean = penalty.importance is Level.GEOMETRIC
        ratio = (ratio.mean if mean else ratio.sum)(-1, keepdim=True).expand(4, 4)
    ratio = ratio.exp() if penalty.attached else ratio.exp().detach()
    expected = LossOutput((0.3 * ratio * divergence).sum(), output.metrics)
    torch.testing.assert_close(output.metrics["divergence"], divergence.detach().mean())
    assert_same(step, output, expected, 1e-12)


def test_a_sampled_penalty_takes_the_references_log_probs():
    """The same as with ref_logprobs in the batch, with the exact divergence among the metrics."""
    step = Beside(False, torch.float64)
    loss = fused_rl.grpo(beta=0.1)
    labels = step.batch.labels.reshape(step.batch.shape)
    ref_hidden, head = step.reference
    ref = fused_rl.linear_logprobs(
        ref_hidden, head, labels.clamp(min=0), temperature=0.9
    ).logprobs.reshape(-1)
    given = dataclasses.replace(step.batch, ref_logprobs=ref.where(step.batch.loss_mask, 0.0))
    one = step.output(loss)
    right = linear_policy_loss(step.leaves[0], step.head, given, loss, temperature=0.9)
    assert set(one.metrics) - set(right.metrics) == {"divergence"}
    one.metrics.pop("divergence")
    assert_same(step, one, right, 1e-12)


def test_exact_and_sampled_kl_stand_side_by_side():
    step = Beside(True, torch.float64)
    exact = step.output(fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)).metrics
    sampled = step.output(fused_rl.grpo(beta=0.1)).metrics
    for key in ("kl", "divergence"):
        assert exact[key] == sampled[key] != 0
    stats = step.two(PolicyLoss()).metrics
    assert exact["divergence"] == stats["divergence"]
    k1 = PolicyLoss(kl=KLPenalty(0.1, fused_rl.KL.K1, exact=Divergence.REVERSE))
    assert step.output(k1).metrics["kl"] != exact["kl"]


def test_the_idle_fraction_counts_the_divergences_gradient():
    """A token without advantage is idle, unless it is pulled towards the reference."""
    step = Beside(False)
    step.batch = dataclasses.replace(step.batch, advantages=torch.zeros(16))
    for beta, idle in ((0.0, 1.0), (0.1, 0.0)):
        loss = fused_rl.grpo(beta=beta, kl=Divergence.REVERSE)
        assert step.output(loss).metrics["zero_gradient_fraction"] == idle
        assert step.two(loss).metrics["zero_gradient_fraction"] == idle
        with torch.no_grad():
            assert step.two(loss).metrics["zero_gradient_fraction"] == idle


@pytest.mark.parametrize("rows", [None, 5])
def test_a_subclass_and_a_function_of_the_users_get_divergences(rows, any_chunk_pays):
    step, seen = Beside(False, torch.float64), []
    subclass = Objective(kl=KLPenalty(0.2, exact=Divergence.FORWARD))
    assert_same(step, step.output(subclass, rows), step.two(subclass), 1e-12)

    def loss(stats, batch):
        seen.append((type(stats), batch.ref_logprobs is not None))
        weighed = stats.divergence * stats.teacher_logprobs.exp()
        value = (weighed - stats.logprobs).where(batch.loss_mask, 0.0).sum() / batch.num_tokens
        return LossOutput(value, {"largest": stats.divergence.max()})

    loss.token_separable, loss.divergence = True, Divergence.CHI_SQUARE
    assert_same(step, step.output(loss, rows), step.two(loss), 1e-12)
    assert seen[0] == (DivergenceStats, True)


# What has a gradient


@pytest.mark.parametrize("separable", [True, False])
def test_the_reference_is_not_trained(separable):
    step = Beside(True, torch.float64, requires=True)
    ratio = None if separable else Level.PRODUCT
    loss = PolicyLoss(kl=KLPenalty(0.3, exact=Divergence.JSD(0.5), importance=ratio))
    args = (step.leaves[0], step.head, step.batch, loss)
    linear_policy_loss(*args, reference=step.reference).loss.backward()
    assert all(t.grad is None for t in (step.ref_hidden, step.ref_weight, step.ref_bias))
    assert all(t.grad.norm() > 0 for t in step.leaves)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name, trained):
    torch.manual_seed(2)
    hidden = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=trained)
    reference = torch.randn(1, 4, 2).double(), torch.randn(5, 2).double()
    mask = torch.tensor([[1, 1, 0, 1]])
    old = torch.full((1, 4), -1.6, dtype=torch.float64)
    labels, advantages = torch.tensor([[0, 4, 1, 2]]), torch.ones(1).double()
    batch = TokenBatch.padded(labels, mask, advantages, old_logprobs=old)
    loss = fused_rl.grpo(beta=0.5, kl=DIVERGENCES[name])
    leaves = (hidden, weight, bias) if trained else (hidden,)

    def value(*_):
        head = LMHead(weight, bias, softcap=5.0)
        return linear_policy_loss(hidden, head, batch, loss, reference=reference).loss

    assert torch.autograd.gradcheck(value, leaves, fast_mode=True)


def test_a_retained_graph_gives_the_same_bits_again():
    step = Beside(False)
    output = step.output(fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE))
    first, second = step.gradients(output), step.gradients(output)
    assert all(map(torch.equal, first, second))


def test_a_reference_changed_in_place_is_an_error():
    step = Beside()
    output = step.output(fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE))
    step.ref_hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@pytest.mark.parametrize("trained", [True, False])
def test_an_empty_batch_has_loss_0_and_gradients_of_zeros(trained):
    step = Beside(trained=trained)
    step.batch = step.batch.with_mask(torch.zeros(4, 4, dtype=torch.bool))
    loss = fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)
    for output in (step.output(loss), step.two(loss)):
        assert output.loss == 0 and output.metrics["divergence"] == 0
        assert all((g == 0).all() for g in step.gradients(output))


def test_nothing_at_a_masked_token_reaches_the_loss():
    step = Beside(False, torch.float64)
    loss = fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)
    right = step.output(loss)
    expected = step.gradients(right)
    with torch.no_grad():
        step.leaves[0][1, 2:] = math.nan
        step.ref_hidden[1, 2:] = math.nan
    found = step.output(loss)
    assert found.loss == right.loss
    assert all(map(torch.equal, step.gradients(found), expected))


# How


@pytest.mark.parametrize("trained", [True, False])
def test_one_pass_forms_both_heads_logits_once(trained):
    """8 NHV, or 6: a chunk's logits, and their gradient."""
    step = Beside(trained=trained)
    with Launches() as launches:
        step.output(fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE))
    ours = [name for name in launches.names if name.startswith("fused_rl::linear")]
    chunk = "fused_rl::linear_divergence_chunk"
    assert ours == [chunk, f"{chunk}_backward"]


def test_without_gradient_and_for_other_losses_it_takes_linear_divergence():
    step = Beside()
    args = (step.leaves[0], step.head, step.batch)
    loss = fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)
    gspo = fused_rl.gspo(beta=0.1, kl=Divergence.REVERSE)
    with Launches() as launches:
        with torch.no_grad():
            found = linear_policy_loss(*args, loss, reference=step.reference)
        linear_policy_loss(*args, gspo, reference=step.reference)
    ours = [name for name in launches.names if name.startswith("fused_rl::linear")]
    assert ours == ["fused_rl::linear_divergence"] * 2
    right = linear_policy_loss(*args, loss, reference=step.reference)
    torch.testing.assert_close(found.loss, right.loss)


def test_compiles_without_a_break():
    step, loss = Beside(False), fused_rl.grpo(beta=0.1, kl=Divergence.JSD(0.5))

    def plain(hidden, ref_hidden):
        reference = (ref_hidden, step.ref_weight)
        return linear_policy_loss(hidden, step.head, step.batch, loss, reference=reference)

    torch.compiler.reset()
    args = (step.leaves[0], step.ref_hidden)
    found = torch.compile(plain, fullgraph=True, backend="aot_eager")(*args)
    right = plain(*args)
    torch.testing.assert_close(found.loss, right.loss)
    torch.testing.assert_close(found.metrics["divergence"], right.metrics["divergence"])
    torch.testing.assert_close(step.gradients(found)[0], step.gradients(right)[0])


def test_torch_func_gives_the_same_gradient():
    step, loss = Beside(False, torch.float64), fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)

    def value(hidden):
        args = (hidden, step.head, step.batch, loss)
        return linear_policy_loss(*args, reference=step.reference, temperature=0.9).loss

    found = torch.func.grad(value)(step.leaves[0].detach())
    torch.testing.assert_close(found, step.gradients(step.output(loss))[0])


# Mistakes


def test_mistakes_are_named():
    step = Beside()
    args = (step.leaves[0], step.head, step.batch)
    loss = fused_rl.grpo(beta=0.1, kl=Divergence.REVERSE)
    hidden, head = step.reference

    def fails(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            linear_policy_loss(*args, **options)

    fails(r"exact KL penalty.*give linear_policy_loss its reference=\(ref_hidden", *args, loss)
    fails(
        r"reference must be \(ref_hidden, ref_head\), got a tensor", *args, loss, reference=hidden
    )
    fails("ref_hidden must be a torch.Tensor", *args, loss, reference=([1.0], head))
    fails(r"ref_hidden must be \[\*labels", *args, loss, reference=(hidden[:2], head))
    fails("ref_hidden and ref_weight must agree in H", *args, loss, reference=(hidden, step.head))
    short = LMHead(step.ref_weight[:-7])
    fails("weight has 257 .* and ref_weight 250", *args, loss, reference=(hidden, short))
    filtered = {"reference": step.reference, "grad_filter": 1e-3}
    fails("grad_filter is for a policy without a reference, got 0.001", *args, loss, **filtered)
    both = dataclasses.replace(step.batch, ref_logprobs=torch.zeros(16))
    fails("the batch has ref_logprobs, and", *args[:2], both, loss, reference=step.reference)


def test_statistics_without_labels_are_a_mistake():
    step = Beside()
    stats = linear_divergence(step.leaves[0], step.head, *step.reference)
    with pytest.raises(ValueError, match="give linear_divergence the labels of the batch"):
        fused_rl.grpo()(stats, step.batch)
