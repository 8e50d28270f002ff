"""One evaluation of a loss gives value, gradient and metrics, and nothing large is copied."""

from dataclasses import dataclass, field

import oracle
import pytest
import torch
from by_name import loss_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rl
from fused_rl import (
    KLPenalty,
    LMHead,
    LossOutput,
    PolicyLoss,
    TokenBatch,
    TokenStats,
    linear_logprobs,
    linear_policy_loss,
    ops,
)
from fused_rl.one_pass.chunks import scale_

V, H = 257, 32


class Step:
    """B sequences of 4 tokens; where some are masked, the last two of the second."""

    def __init__(self, every=True, dtype=torch.float32, B=4, trained=True) -> None:
        torch.manual_seed(0)
        hidden, weight, bias = (torch.randn(*s).to(dtype) for s in ((B, 4, H), (V, H), (V,)))
        self.leaves = [
            hidden.requires_grad_(),
            *(t.requires_grad_(trained) for t in (weight, bias)),
        ]
        labels, mask = torch.randint(0, V, (B, 4)), torch.ones(B, 4, dtype=torch.bool)
        mask[1, 2:] = every
        with torch.no_grad():
            own = linear_logprobs(hidden, self.head, labels).logprobs
        given = {f"{name}_logprobs": own + 0.3 * torch.randn(B, 4) for name in ("old", "ref")}
        self.batch = TokenBatch.padded(labels, mask, torch.randn(B), **given)

    @property
    def head(self) -> LMHead:
        return LMHead(*self.leaves[1:])

    def output(self, loss, rows=None) -> LossOutput:
        """In one pass, in chunks of `rows` tokens."""
        chunk_bytes = None if rows is None else rows * V * 4
        args = (self.leaves[0], self.head, self.batch, loss)
        output = linear_policy_loss(*args, chunk_bytes=chunk_bytes)
        assert type(output.loss.grad_fn).__name__ == "_OnePassBackward"
        return output

    def stats(self) -> TokenStats:
        labels = self.batch.labels.reshape(self.batch.shape)
        stats = linear_logprobs(self.leaves[0], self.head, labels)
        return TokenStats(*(t.reshape(-1) for t in stats))

    def gradients(self, output: LossOutput) -> tuple[Tensor, ...]:
        leaves = [t for t in self.leaves if t.requires_grad]
        return torch.autograd.grad(output.loss, leaves, retain_graph=True)


class Launches(TorchDispatchMode):
    """The operators that run, and how many numbers each writes into memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.written = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor) and out.untyped_storage()._cdata not in given:
                self.written.append((function.name(), out.numel()))
        copied = args[0].numel() if function.name() in IN_PLACE else 0
        self.written.append((function.name(), copied))
        return result

    def launched(self) -> list[str]:
        """Without detach, which makes a view."""
        return [name for name in self.names if name != "aten::detach"]


IN_PLACE = ("aten::copy_", "aten::index_put_", "aten::zero_", "aten::fill_.Scalar")


@pytest.fixture
def any_chunk_pays(monkeypatch):
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 1)


# How often


def test_operators_of_a_step():
    """153 with torch 2.13: 16 check the arguments, 93 form the loss and its gradients, 44 the
    metrics. 362 if the loss were formed three times.
    """
    step, loss = Step(), fused_rl.grpo(beta=0.1)
    with Launches() as launches:
        step.output(loss)
    assert len(launches.launched()) <= 165
    for once in ("kl", "kl_backward", "linear_logprobs_chunk", "linear_logprobs_chunk_backward"):
        assert launches.names.count(f"fused_rl::{once}") == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_operators_of_a_loss_of_statistics(mode):
    """134 with torch 2.13, either way; 222 if the idle fraction took an evaluation of its own."""
    step, loss = Step(), fused_rl.grpo(beta=0.1)
    stats = step.stats()
    with mode(), Launches() as launches:
        loss(stats, step.batch)
    assert len(launches.launched()) <= 145
    assert launches.names.count("fused_rl::kl") == 1


@dataclass(frozen=True)
class Counting:
    """A part of a PolicyLoss that counts its calls."""

    part: object
    calls: list[int] = field(default_factory=list)
    token_separable = True

    def __call__(self, *args):
        self.calls.append(len(args[0]) if isinstance(args[0], Tensor) else len(args[0].labels))
        return self.part(*args)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(None, [16]), (7, [7, 7])])
def test_each_part_of_a_loss_is_called_once_for_each_token(rows, tokens, every, any_chunk_pays):
    step = Step(every)
    if rows:
        tokens = [7, 7, 2] if every else tokens
    plain = PolicyLoss()
    parts = [Counting(part) for part in (plain.surrogate, plain.ratio, plain.mean)]
    surrogate, ratio, mean = parts
    loss = PolicyLoss(surrogate, ratio, mean=mean, kl=KLPenalty(0.1))
    step.output(loss, rows)
    assert [part.calls for part in parts] == [tokens] * 3
    stats = step.stats()
    for mode in (torch.enable_grad, torch.no_grad):
        for part in parts:
            part.calls.clear()
        with mode():
            loss(stats, step.batch)
        assert [part.calls for part in parts] == [[16]] * 3


def test_a_function_of_the_users_is_called_once_where_one_chunk_holds_the_tokens(any_chunk_pays):
    step, calls = Step(every=False), []

    def loss(stats, batch):
        calls.append(len(batch.labels))
        value = -(batch.loss_mask * stats.logprobs).sum() / batch.num_tokens
        return LossOutput(value, {"largest": stats.logprobs.max(), "tokens": 16})

    loss.token_separable = True
    output = step.output(loss)
    assert calls == [16]
    assert not output.metrics["largest"].requires_grad and output.metrics["tokens"] == 16
    several = step.output(loss, rows=5)
    assert calls == [16, 5, 5, 4, 16]
    assert torch.equal(output.loss, several.loss)
    assert torch.equal(output.metrics["largest"], several.metrics["largest"])


# What is the same


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "aspo", "gpg"])
def test_chunks_add_up(name, dtype, trained, every, any_chunk_pays):
    """A loss and its metrics are sums over tokens, added in the same order whatever the chunks.

    Not a bit less, as long as torch rounds a token alike wherever it stands: its sigmoid, sapo's,
    rounds the last few of a vector in another way, and so may a matrix library where no microkernel
    serves.
    """
    exact = dtype in oracle.microkernels()

    def assert_same(mine: Tensor, right: Tensor) -> None:
        if exact:
            assert torch.equal(mine, right)
        else:
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)

    step = Step(every, dtype, B=12, trained=trained)
    loss = loss_of(name, beta=0.1, entropy_coef=0.02)
    whole = step.output(loss)
    expected = step.gradients(whole)
    for rows in (1, 7, 16, 33):
        found = step.output(loss, rows)
        assert_same(found.loss.detach(), whole.loss.detach())
        assert found.metrics.keys() == whole.metrics.keys()
        for key, metric in whole.metrics.items():
            assert_same(found.metrics[key], metric)
        for i, (mine, right) in enumerate(zip(step.gradients(found), expected, strict=True)):
            if exact and i == 0:
                assert torch.equal(mine, right)
            bound = 1e-2 if dtype == torch.bfloat16 else 2e-6
            assert (mine - right).norm() <= bound * right.norm()


class Objective(PolicyLoss):
    def objective(self, stats, batch):
        return super().objective(stats, batch) + 0.1 * stats.entropy.sum()


class TokenLosses(PolicyLoss):
    def token_losses(self, stats, batch):
        return 2 * super().token_losses(stats, batch)


class Call(PolicyLoss):
    def __call__(self, stats, batch):
        loss, metrics = super().__call__(stats, batch)
        return LossOutput(0.5 * loss, {**metrics, "tokens": batch.num_tokens})


@pytest.mark.parametrize("kind", [Objective, TokenLosses, Call])
@pytest.mark.parametrize("rows", [None, 5])
def test_a_subclass_forms_its_own_loss(kind, rows, any_chunk_pays):
    """Value, gradient and idle tokens are those of the loss that is returned."""
    step, loss = Step(every=False, dtype=torch.float64), kind(kl=KLPenalty(0.2))
    one, two = step.output(loss, rows and 2 * rows), loss(step.stats(), step.batch)
    plain = PolicyLoss(kl=KLPenalty(0.2))(step.stats(), step.batch)
    assert not torch.isclose(one.loss, plain.loss)
    for found, right in zip(step.gradients(one), step.gradients(two), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(one.loss, two.loss)
    assert one.metrics.keys() == two.metrics.keys()
    for key, value in two.metrics.items():
        torch.testing.assert_close(one.metrics[key], value)


def test_a_subclass_may_have_tokens_with_a_gradient_where_the_clip_has_none():
    step = Step()
    advantages = torch.zeros_like(step.batch.advantages).reshape(4, 4)
    batch = TokenBatch.padded(step.batch.labels.reshape(4, 4), advantages == 0, advantages)
    for kind, idle in ((PolicyLoss, 1), (Objective, 0)):
        assert kind()(step.stats(), batch).metrics["zero_gradient_fraction"] == idle
        with torch.no_grad():
            assert kind()(step.stats(), batch).metrics["zero_gradient_fraction"] == idle


def test_the_gradient_of_the_idle_fraction_leaves_hooks_alone():
    """Those of the caller's tensors, and those that offload what the graph has saved."""
    step, loss = Step(), fused_rl.grpo(beta=0.1, entropy_coef=0.1)
    stats, seen, given_back = step.stats(), [], []
    right = loss(stats, step.batch)
    for tensor in stats:
        tensor.register_hook(seen.append)
    found = loss(stats, step.batch)
    assert not seen

    def unpack(tensor):
        given_back.append(tensor)
        return tensor

    with saved_tensors_hooks(lambda tensor: tensor, unpack):
        hooked = loss(stats, step.batch)
    assert not given_back
    expected = step.gradients(right)
    for output in (found, hooked):
        assert all(map(torch.equal, output.metrics.values(), right.metrics.values()))
        assert all(map(torch.equal, step.gradients(output), expected))
    assert given_back and len(seen) == 3 * 2


def test_the_graph_of_a_loss_serves_other_gradients_too():
    """Of a beta that is learned, and of the gradient itself."""
    step, beta = Step(dtype=torch.float64), torch.tensor(0.1, requires_grad=True)
    stats = step.stats()
    loss = PolicyLoss(kl=KLPenalty(beta))(stats, step.batch).loss
    (found,) = torch.autograd.grad(loss, beta)
    d = stats.logprobs.detach() - step.batch.ref_logprobs
    torch.testing.assert_close(found.double(), (torch.expm1(-d) + d).mean(), rtol=1e-6, atol=0)
    leaves = [t.detach().requires_grad_() for t in stats]
    surrogate = fused_rl.surrogates.Kimi(0.5)
    loss = PolicyLoss(surrogate)(TokenStats(*leaves), step.batch).loss
    (slope,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), leaves[0])
    torch.testing.assert_close(curvature, torch.full_like(curvature, 0.5 / 16))


# What is copied


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_large_is_copied_where_every_token_counts(dtype, trained):
    """The gradients and the logits are written once, by the operators; dweight has its room."""
    step, loss = Step(dtype=dtype, trained=trained), fused_rl.grpo(beta=0.1, entropy_coef=0.1)
    step.leaves[0] = step.leaves[0] * 1
    with Launches() as launches:
        step.output(loss)
    large = [(name, count) for name, count in launches.written if count >= V]
    empty = "aten::new_empty" if ops.native_missing else "fused_rl::cpu_empty"
    room = [(empty, V * H), (empty, V)] if trained else []
    assert large == [
        *room,
        ("fused_rl::linear_logprobs_chunk", V * 32),  # tokens come in groups of 32
        ("fused_rl::linear_logprobs_chunk_backward", 16 * H),
    ]


def test_chunks_are_views_where_every_token_counts(any_chunk_pays):
    """What is copied is each chunk's part of dhidden, to its place."""
    step, loss = Step(), fused_rl.grpo(beta=0.1)
    with Launches() as launches:
        step.output(loss, rows=5)
    assert not {"aten::index.Tensor", "aten::index_put_"} & set(launches.names)
    copied = [count for name, count in launches.written if name == "aten::copy_"]
    assert [count for count in copied if count >= H] == [5 * H] * 3 + [H]
    assert launches.written.count(("aten::new_empty", 16 * H)) == 1
    assert ("aten::new_zeros", 16 * H) not in launches.written


def test_scaling_by_one_leaves_gradients_alone_on_a_cpu():
    held = [torch.randn(3, 2), torch.randn(3, dtype=torch.float64)]
    before = [g.clone() for g in held]
    versions = [g._version for g in held]
    scale_(held, torch.tensor(1.0))
    assert [g._version for g in held] == versions
    scale_(held, torch.tensor(0.5))
    assert all(torch.equal(g, b / 2) for g, b in zip(held, before, strict=True))


def test_elsewhere_the_scale_is_not_read_by_the_host():
    """A meta tensor has no value: to ask for it is an error."""
    dloss = torch.ones((), device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(dloss == 1)
    held = [torch.empty(3, 2, dtype=torch.bfloat16, device="meta")]
    scale_(held, dloss)
    assert held[0]._version == 1 and held[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_with_one_changes_no_bit(dtype):
    """What CUDA computes instead of asking; with the smallest and largest numbers."""
    info = torch.finfo(dtype)
    values = [info.smallest_normal, info.max, -info.max, -0.0, torch.inf, info.eps]
    gradient = torch.cat([torch.randn(1000), torch.tensor(values)]).to(dtype)
    before = gradient.clone()
    gradient.mul_(torch.tensor(1.0))
    assert torch.equal(gradient, before)
    assert torch.equal(gradient.signbit(), before.signbit())
