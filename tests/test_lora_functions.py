"""LoRA on the head in every function that takes a head."""

from dataclasses import replace

import pytest
import torch
from lora_models import LABELS, V, adapted, hidden_of, of_logits, theirs, trained

from fused_rl import (
    Divergence,
    LMHead,
    LossOutput,
    TokenBatch,
    grpo,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
    linear_top_logprobs,
)
from fused_rl.integrations.trl.logprobs import mean_of_logits
from fused_rl.linear.at import linear_logits_at, linear_logprobs_at
from fused_rl.linear.kept import linear_kept_logprobs
from fused_rl.linear.mean_logits import mean_logits
from fused_rl.linear.statistics import Statistic, linear_statistics
from fused_rl.preference import PreferenceBatch

D = torch.float64


@pytest.fixture
def case():
    """A model, states that have a gradient, the head, and PEFT's logits."""
    model = adapted("gemma2", D)
    hidden = hidden_of(model).requires_grad_()
    return model, hidden, LMHead.from_model(model), theirs(model, hidden)


def same_gradients(ours, right, case):
    model, hidden, *_ = case
    torch.testing.assert_close(ours, right)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=D).reshape(ours.shape)
    by = (hidden, *trained(model))
    found = torch.autograd.grad((weights * ours).sum(), by, retain_graph=True)
    of_peft = torch.autograd.grad((weights * right).sum(), by, retain_graph=True)
    for a, b in zip(found, of_peft, strict=True):
        torch.testing.assert_close(a, b)


def test_top_log_probs(case):
    _, hidden, head, logits = case
    found = linear_top_logprobs(hidden, head, LABELS)
    torch.testing.assert_close(found.top_logprobs, logits.log_softmax(-1).amax(-1))
    same_gradients(found.logprobs, of_logits(logits)[0], case)


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics(case, frozen):
    """Of a head that is trained, or not, where the states are."""
    _, hidden, head, logits = case
    if frozen:
        head = head.detached()
    found = linear_statistics(hidden, head, LABELS, Statistic.COLLISION, top=2)
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(found.collision, (2 * logp).exp().sum(-1).detach())
    torch.testing.assert_close(found.top_ids, logits.topk(2).indices)
    torch.testing.assert_close(found.lse, logits.logsumexp(-1))
    if not frozen:
        same_gradients(found.logprobs, of_logits(logits)[0], case)
        return
    detached, adapter = logits.detach(), head.adapters[0]
    (ours,) = torch.autograd.grad(found.logprobs.sum(), hidden)
    states = hidden.detach().requires_grad_()
    raw = states @ head.weight.T + adapter.product(states)
    own = head.softcap * torch.tanh(raw / head.softcap)
    torch.testing.assert_close(own.detach(), detached)
    (right,) = torch.autograd.grad(of_logits(own)[0].sum(), states)
    torch.testing.assert_close(ours, right)


def test_a_filter(case):
    _, hidden, head, logits = case
    found = linear_logprobs(hidden, head, LABELS, grad_filter=1e-300)
    same_gradients(found.logprobs, of_logits(logits)[0], case)


def test_entries_of_the_vocabulary(case):
    _, hidden, head, logits = case
    ids = torch.stack([LABELS, (LABELS + 3) % V], -1)
    at = linear_logprobs_at(hidden, head, ids)
    same_gradients(at.logprobs, logits.log_softmax(-1).gather(-1, ids), case)
    same_gradients(linear_logits_at(hidden, head, ids), logits.gather(-1, ids), case)


def test_kept_sets(case):
    _, hidden, head, logits = case
    kept = torch.cat([torch.stack([y, (y + 1) % V]) for y in LABELS.flatten()])
    offsets = 2 * torch.arange(LABELS.numel() + 1)
    found = linear_kept_logprobs(hidden, head, LABELS, kept, offsets)
    pairs = logits.flatten(0, 1).gather(-1, kept.view(-1, 2)).log_softmax(-1)[:, 0]
    same_gradients(found.kept_logprobs, pairs.view(LABELS.shape), case)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_divergence(case, side):
    _, hidden, head, logits = case
    other, weight = torch.randn(*LABELS.shape, 8, dtype=D), torch.randn(V, 8, dtype=D)
    ours, theirs_ = (hidden, head), (other, weight)
    args = (*ours, *theirs_) if side == "student" else (*theirs_, *ours)
    found = linear_divergence(*args, divergence=Divergence.FORWARD).divergence
    s, t = logits.log_softmax(-1), (other @ weight.T).log_softmax(-1)
    s, t = (s, t) if side == "student" else (t, s)
    same_gradients(found, (t.exp() * (t - s)).sum(-1), case)
    some = linear_divergence(*args, vocabulary=range(3, 40)).divergence
    s, t = (x[..., 3:40].log_softmax(-1) for x in (s, t))
    same_gradients(some, (s.exp() * (s - t)).sum(-1), case)


def batch_of(logits, **more):
    torch.manual_seed(1)
    old = of_logits(logits.detach())[0] + 0.1 * torch.randn(LABELS.shape)
    advantages = torch.randn(LABELS.shape, dtype=D)
    return TokenBatch.padded(LABELS, LABELS >= 0, advantages, old_logprobs=old, **more)


@pytest.mark.parametrize("side", ["policy", "reference"])
def test_a_policy_loss_beside_a_reference(case, side):
    _, hidden, head, logits = case
    other = torch.randn(*LABELS.shape, 8, dtype=D, requires_grad=True)
    weight, loss = torch.randn(V, 8, dtype=D), grpo(beta=0.3)
    of_other = other @ weight.T
    policy, reference = ((hidden, head), (other, weight))
    rights = (logits, of_other)
    if side == "reference":
        policy, reference, rights = reference, policy, rights[::-1]
    found = linear_policy_loss(*policy, batch_of(rights[0]), loss, reference=reference)
    with torch.no_grad():
        ref = of_logits(rights[1])[0]
    stats = linear_logprobs(*policy, LABELS)
    right = loss(
        type(stats)(*(t.flatten() for t in of_logits(rights[0]))),
        batch_of(rights[0], ref_logprobs=ref),
    )
    torch.testing.assert_close(found.loss, right.loss)
    if side == "policy":
        same_gradients(found.loss, right.loss, case)
    else:
        a, b = (torch.autograd.grad(x, other)[0] for x in (found.loss, right.loss))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_preference_loss(dropout):
    """WPO's weights are of a second pass, with the dropout of the first."""
    model = adapted(dtype=D, lora_dropout=dropout).train()
    hidden = hidden_of(model)[:2].repeat(2, 1, 1).requires_grad_()
    labels = LABELS[:2].repeat(2, 1)
    batch = PreferenceBatch.padded(labels, torch.ones_like(labels, dtype=bool))
    seen = []

    def loss(stats, batch):
        seen.append((stats.logprobs, batch.sharp_logprobs))
        return LossOutput(stats.logprobs.sum(), {})

    loss.is_aligned = True
    torch.manual_seed(3)
    linear_preference_loss(hidden, LMHead.from_model(model), batch, loss)
    (adapter,) = LMHead.from_model(model).adapters
    torch.manual_seed(3)
    z = hidden @ model.get_base_model().lm_head.weight.T + adapter.product(hidden)
    for found, t in zip(seen[0], (1.0, 0.5), strict=True):
        right = (z / t).log_softmax(-1).gather(-1, labels[..., None]).flatten()
        torch.testing.assert_close(found, right)


def test_the_mean_of_logits(case):
    """With the softcap, too, as TRL logs it; without, by the means of the rows."""
    _, hidden, head, logits = case
    torch.testing.assert_close(mean_of_logits(hidden, head), logits.mean(-1).detach())
    (adapter,) = head.adapters
    head = LMHead(head.weight, adapters=(adapter,))
    before = head.logits(hidden).mean(-1).detach()
    torch.testing.assert_close(mean_logits(hidden, head), before)
    dropping = LMHead(head.weight, adapters=(replace(adapter, dropout=0.5),))
    torch.testing.assert_close(mean_logits(hidden, dropping), before)


def test_without_gradient(case):
    _, hidden, head, logits = case
    with torch.no_grad():
        found = linear_logprobs(hidden, head, LABELS)
    assert not found.logprobs.requires_grad
    torch.testing.assert_close(found.logprobs, of_logits(logits.detach())[0])
    gone = linear_logprobs(hidden.detach(), head.detached(), LABELS)
    assert not gone.logprobs.requires_grad


def test_torch_func(case):
    _, hidden, head, logits = case

    def total(up, down):
        (adapter,) = head.adapters
        of = LMHead(
            head.weight, softcap=head.softcap, adapters=(type(adapter)(down, up, adapter.scaling),)
        )
        return linear_logprobs(hidden.detach(), of, LABELS).logprobs.sum()

    (adapter,) = head.adapters
    found = torch.func.grad(total, argnums=(0, 1))(adapter.up.detach(), adapter.down.detach())
    right = torch.autograd.grad(of_logits(logits)[0].sum(), (adapter.up, adapter.down))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["log-probs", "policy loss"])
def test_compiled(case, form):
    model, hidden, _, logits = case
    batch, loss = batch_of(logits), grpo()

    def run(hidden):
        of = LMHead.from_model(model)
        if form == "log-probs":
            return linear_logprobs(hidden, of, LABELS).logprobs
        return linear_policy_loss(hidden, of, batch, loss).loss

    LMHead.from_model(model)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden)
    same_gradients(found, run(hidden), case)
