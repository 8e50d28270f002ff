"""What lives on: graphs and what they keep, changes in place, hooks, inference mode, files."""

import io
import weakref
from dataclasses import fields, replace

import pytest
import torch
from by_name import loss_of

import fused_rl
from fused_rl import (
    KLPenalty,
    Level,
    LMHead,
    LossOutput,
    TokenBatch,
    TokenStats,
    diagnose,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.losses import named

B, T, V, H = 3, 5, 17, 6
TENSORS = ["labels", "loss_mask", "advantages", "old_logprobs", "ref_logprobs", "weights"]
WAYS = ["one pass", "two passes"]


class Step:
    """Operands that are no leaves, as a model's hidden states are, and a batch."""

    def __init__(self, beta=0.1) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.leaves = [normal(*shape).requires_grad_() for shape in ((B, T, H), (V, H), (V,))]
        self.hidden, self.weight, self.bias = (t * 1 for t in self.leaves)
        self.labels = torch.randint(0, V, (B, T), generator=generator)
        self.temperature = 1 + normal(B, T).abs()
        own = linear_logprobs(self.hidden, self.head, self.labels, temperature=self.temperature)
        own = own.logprobs.detach()
        self.batch = TokenBatch.padded(
            self.labels,
            torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5]),
            torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64),
            old_logprobs=own + 0.3 * normal(B, T),
            ref_logprobs=own + 0.3 * normal(B, T),
            weights=normal(B, T).exp(),
        )
        self.loss = fused_rl.grpo(beta=beta, entropy_coef=0.1)

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, scale=0.7, softcap=5.0)

    def output(self, way: str) -> LossOutput:
        if way == "one pass":
            args = (self.hidden, self.head, self.batch, self.loss)
            output = linear_policy_loss(*args, temperature=self.temperature)
            assert type(output.loss.grad_fn).__name__ == "_OnePassBackward"
            return output
        labels = self.batch.labels.reshape(B, T)
        stats = linear_logprobs(self.hidden, self.head, labels, temperature=self.temperature)
        return self.loss(stats, self.batch)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_kept_keeps_nothing_else_after_its_backward_pass(way):
    """`total += output.loss` over micro-batches would keep N * H numbers of each."""
    step = Step()
    kept = step.output(way).loss
    batch = [getattr(step.batch, f.name) for f in fields(step.batch)]
    large = [step.hidden, step.weight, *(t for t in batch if isinstance(t, torch.Tensor))]
    storages = [weakref.ref(t.untyped_storage()) for t in large]
    assert all(s() is not None for s in storages)
    kept.backward()
    del step, batch, large
    assert [s() for s in storages] == [None] * len(storages)
    assert kept.isfinite() and kept.grad_fn is not None


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "temperature", "beta", *TENSORS])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_was_changed_in_place_is_an_error_in_one_pass(name, passes):
    """As in eager torch; a second backward pass used to take the new advantages."""
    beta = torch.tensor(0.1, dtype=torch.float64)
    step = Step(beta)
    loss = step.output("one pass").loss
    for _ in range(passes - 1):
        loss.backward(retain_graph=True)
    changed = beta if name == "beta" else getattr(step.batch if name in TENSORS else step, name)
    with torch.no_grad():
        changed.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_the_caller_keeps_may_be_changed():
    """A batch has copies: buffers of the caller's may hold the next step before backward."""
    given = {
        "labels": torch.zeros(B, T).long(),
        "loss_mask": torch.ones(B, T, dtype=torch.bool),
        "advantages": torch.randn(B, T),
        "old_logprobs": torch.randn(B, T) - 3,
        "weights": torch.rand(B, T),
    }
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    right = torch.autograd.grad(
        linear_policy_loss(hidden, weight, TokenBatch.padded(**given), fused_rl.grpo()).loss, hidden
    )
    loss = linear_policy_loss(hidden, weight, TokenBatch.padded(**given), fused_rl.grpo()).loss
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], right[0])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_passes_through_a_retained_graph_agree(scale):
    step = Step()
    loss = step.output("one pass").loss * scale
    first, *others = [torch.autograd.grad(loss, step.leaves, retain_graph=True) for _ in range(3)]
    right = torch.autograd.grad(step.output("two passes").loss * scale, step.leaves)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_what_was_accumulated_is_not_what_the_graph_keeps():
    """zero_ and clipping of .grad between two backward passes of one graph."""
    step = Step()
    loss = step.output("one pass").loss
    loss.backward(retain_graph=True)
    right = [t.grad.clone() for t in step.leaves]
    for leaf in step.leaves:
        leaf.grad.zero_()
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, grad in zip(step.leaves, right, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad, rtol=1e-13, atol=0)


def test_offloading_hooks_see_all_that_is_kept():
    """Gradients too: dhidden and dweight are the largest of it."""
    step, packed = Step(), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = step.output("one pass").loss
    # hidden, weight, bias and their gradients; temperature and the batch's float tensors; ids.
    seen = [(t.dtype, t.numel()) for t in packed]
    for kind, count in (
        *(((torch.float64, B * T * H), 2), ((torch.float64, V * H), 2), ((torch.float64, V), 2)),
        *(((torch.int64, B * T), 4), ((torch.bool, B * T), 1), ((torch.float64, B * T), 5)),
    ):
        assert seen.count(kind) == count
    storages = [weakref.ref(t.untyped_storage()) for t in packed]
    leaves, other = step.leaves, Step()
    right = torch.autograd.grad(other.output("two passes").loss, other.leaves)
    del step
    packed.clear()
    assert [s() for s in storages] == [None] * len(storages)
    for _ in range(2):
        found = torch.autograd.grad(loss, leaves, retain_graph=True)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_saved_on_cpu_and_under_checkpoint():
    step = Step()
    right = torch.autograd.grad(step.output("one pass").loss, step.leaves)
    step = Step()
    with torch.autograd.graph.save_on_cpu():
        loss = step.output("one pass").loss
    found = torch.autograd.grad(loss, step.leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    step, forwards = Step(), []

    def recomputed(hidden, weight, bias):
        forwards.append(1)
        head = LMHead(weight, bias, scale=0.7, softcap=5.0)
        options = {"temperature": step.temperature}
        return linear_policy_loss(hidden, head, step.batch, step.loss, **options).loss

    args = (step.hidden, step.weight, step.bias)
    loss = torch.utils.checkpoint.checkpoint(recomputed, *args, use_reentrant=False)
    assert len(forwards) == 1
    found = torch.autograd.grad(loss, step.leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert len(forwards) == 2


def test_gradients_are_handed_over_and_not_copied():
    packed = []
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H, requires_grad=True)
    batch = TokenBatch.padded(torch.zeros(B, T).long(), torch.ones(B, T).long(), torch.randn(B))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        loss = linear_policy_loss(hidden, weight, batch, fused_rl.grpo()).loss
    (dweight,) = (
        t.data_ptr()
        for t in packed
        if t.shape == (V, H) and t is not weight and t.data_ptr() != weight.data_ptr()
    )
    packed.clear()
    (loss * 3).backward()
    assert weight.grad.data_ptr() == dweight


@pytest.mark.parametrize("name", named.NAMES)
def test_metrics_under_inference_mode(name):
    """Also of statistics and batches that were made there, and a beta."""
    for beta in (0.0, 0.1):
        step = Step()
        stats = TokenStats(
            *(t.detach() for t in linear_logprobs(step.hidden, step.head, step.labels))
        )
        right = loss_of(name, beta=beta)(stats, step.batch).metrics
        with torch.inference_mode():
            born = TokenStats(*(t.clone() for t in stats))
            parts = {
                f.name: getattr(step.batch, f.name).clone()
                for f in fields(TokenBatch)
                if isinstance(getattr(step.batch, f.name), torch.Tensor)
            }
            own_beta = torch.tensor(beta, dtype=torch.float64) if beta else beta
            for found in (
                loss_of(name, beta=beta)(stats, step.batch),
                loss_of(name, beta=own_beta)(born, replace(step.batch, **parts)),
            ):
                assert found.metrics.keys() == right.keys()
                for key, value in right.items():
                    assert torch.equal(found.metrics[key], value), key
        history = [{k: v.item() for k, v in found.metrics.items()}] * 10
        assert "dead gradient" not in [finding.name for finding in diagnose(history)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear_policy_loss_without_gradients_reports_the_same(mode):
    step = Step(beta=0.0)
    right = step.output("one pass")
    args = (step.hidden, step.head, step.batch, step.loss)
    with mode():
        found = linear_policy_loss(*args, temperature=step.temperature)
    assert right.metrics.keys() == found.metrics.keys()
    for key, value in right.metrics.items():
        torch.testing.assert_close(found.metrics[key], value, rtol=1e-12, atol=1e-14)
    # Entropy pulls at every counted token, even where the advantage is 0.
    assert found.metrics["zero_gradient_fraction"] == 0


def test_a_batch_of_what_was_made_in_inference_mode_can_be_trained_on():
    """Old log-probs are, as a rule, and masks and labels with them."""
    given = {
        "labels": torch.zeros(B, T).long(),
        "loss_mask": torch.ones(B, T, dtype=torch.bool),
        "advantages": torch.randn(B),
        "old_logprobs": torch.randn(B, T) - 3,
        "ref_logprobs": torch.randn(B, T) - 3,
    }
    with torch.inference_mode():
        born = {key: tensor.clone() for key, tensor in given.items()}
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    for loss in (fused_rl.grpo(beta=0.1), fused_rl.gspo(beta=0.1)):
        found, right = (
            torch.autograd.grad(
                linear_policy_loss(hidden, weight, TokenBatch.padded(**tensors), loss).loss, hidden
            )[0]
            for tensors in (born, given)
        )
        assert torch.equal(found, right)


def loaded(thing: object) -> object:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_batches_and_results_are_loaded_as_weights_only():
    step = Step()
    batch = loaded(step.batch)
    for field in fields(TokenBatch):
        found, right = getattr(batch, field.name), getattr(step.batch, field.name)
        same = torch.equal(found, right) if isinstance(right, torch.Tensor) else found == right
        assert same, field.name
    output = step.output("one pass")
    again = loaded(LossOutput(output.loss.detach(), output.metrics))
    assert again.loss == output.loss and again.metrics == output.metrics
    stats = TokenStats(torch.randn(3), torch.randn(3))
    assert all(torch.equal(a, b) for a, b in zip(loaded(stats), stats, strict=True))


@pytest.mark.parametrize(
    "thing",
    [
        *(loss_of(name, beta=0.1, kl=fused_rl.KL.K2) for name in named.NAMES),
        fused_rl.PolicyLoss(kl=KLPenalty(0.1, level=Level.PRODUCT, importance=Level.GEOMETRIC)),
        fused_rl.schedules.AdaptiveBeta(0.1, 0.2),
        fused_rl.schedules.AnnealedBeta(1.0, 0.1, 10, fused_rl.schedules.Anneal.COSINE, done=3),
        fused_rl.schedules.FixedBeta(0.1),
        fused_rl.overoptimisation.RewardCurve(fused_rl.overoptimisation.RewardForm.RL, 1.0, 2.0),
        fused_rl.diagnosis.Thresholds(window=3),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_losses_and_schedules_are_loaded_as_weights_only(thing):
    assert loaded(thing) == thing
