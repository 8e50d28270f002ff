"""PolicyLoss and linear_policy_loss: by hand, against naive formulas, one pass against two."""

import math
from functools import partial

import naive
import pytest
import torch

import fused_rl
from fused_rl import (
    KL,
    LossOutput,
    PolicyLoss,
    TokenBatch,
    TokenStats,
    linear_logprobs,
    linear_policy_loss,
    ops,
)
from fused_rl.means import FixedLengthMean, SequenceMean, TokenMean
from fused_rl.surrogates import Clip


def surrogate_at(ratio: float, advantage: float, low=0.2, high=0.2) -> tuple[float, float]:
    """Value and derivative with respect to the log-prob."""
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = Clip(low, high)(logprobs, logprobs, torch.tensor([advantage], dtype=torch.float64))
    value.backward()
    return value.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.0, 1.0, -1.0, -1.0),
        (1.7, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, value, slope):
    assert surrogate_at(ratio, advantage) == pytest.approx((value, slope), abs=1e-12)


def test_clip_higher_moves_the_upper_bound_alone():
    assert surrogate_at(1.25, 1.0, 0.2, 0.28)[0] == pytest.approx(-1.25)
    assert surrogate_at(1.35, 1.0, 0.2, 0.28) == pytest.approx((-1.28, 0.0))
    assert surrogate_at(0.75, -1.0, 0.2, 0.28) == pytest.approx((0.8, 0.0))


@pytest.mark.parametrize(("bound", "advantage"), [(1.2, 1.0), (0.8, -1.0), (1.2, -1.0)])
def test_gradient_exactly_at_a_bound_is_torchs_own(bound, advantage):
    """At a tie torch.minimum halves the gradient between its arguments; ours is written with it."""
    log_ratio = torch.tensor([bound], dtype=torch.float64).log().requires_grad_()
    A = torch.tensor([advantage], dtype=torch.float64)
    r = log_ratio.exp()
    (naive,) = torch.autograd.grad(-torch.min(r * A, r.clamp(0.8, 1.2) * A).sum(), log_ratio)
    (ours,) = torch.autograd.grad(Clip()(log_ratio, log_ratio, A).sum(), log_ratio)
    assert torch.equal(ours, naive)


class Tokens:
    """A padded batch with uneven lengths, an empty sequence and garbage outside the mask."""

    def __init__(self, dtype=torch.float64, B=4, T=7, V=19, H=6, seed=0, trained=True):
        torch.manual_seed(seed)
        self.hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype, requires_grad=trained)
        self.bias = torch.randn(V, dtype=dtype, requires_grad=trained)
        self.mask = torch.arange(T) < torch.tensor([T, 3, 0, 5])[:, None]
        self.labels = torch.randint(0, V, (B, T))
        with torch.no_grad():
            now = linear_logprobs(self.hidden, self.head, self.labels).logprobs.double()
        self.old = now + 0.3 * torch.randn(B, T)
        self.ref = now + 0.3 * torch.randn(B, T)
        self.labels[~self.mask] = -7
        self.old[~self.mask] = float("nan")
        self.ref[~self.mask] = -400.0
        self.advantages = torch.randn(B, dtype=torch.float64)
        self.advantages[1] = 0

    @property
    def head(self):
        return fused_rl.LMHead(self.weight, self.bias, scale=0.8, softcap=6.0)

    @property
    def batch(self):
        return TokenBatch.padded(
            self.labels,
            self.mask,
            self.advantages,
            old_logprobs=self.old,
            ref_logprobs=self.ref,
        )

    def stats(self):
        return linear_logprobs(self.hidden, self.head, self.labels.where(self.mask, -100))

    def gradients(self, output: LossOutput) -> list[torch.Tensor]:
        leaves = [t for t in (self.hidden, self.weight, self.bias) if t.requires_grad]
        return list(torch.autograd.grad(output.loss, leaves))


def naive_loss(tokens, stats, clip, beta, entropy_coef, mean) -> torch.Tensor:
    """By naive.py, with the two terms that it has not."""
    advantages = tokens.advantages[:, None].expand(tokens.mask.shape)
    given = naive.Tokens(stats.logprobs, tokens.old, advantages, tokens.mask)
    formula = partial(naive.ppo, low=clip.low, high=clip.high)
    found = naive.terms(given, naive.token, formula)
    for at, term in found.items():
        d = tokens.ref[at] - stats.logprobs[at]
        found[at] = term + beta * (torch.exp(d) - d - 1) - entropy_coef * stats.entropy[at]
    return naive.total(given, found, mean)


@pytest.mark.parametrize(
    ("named", "mean"),
    [
        (fused_rl.grpo, naive.sequence_mean),
        (fused_rl.bnpo, naive.token_mean),
        (fused_rl.dapo, naive.token_mean),
        (partial(fused_rl.dapo, num_tokens=60), lambda tokens, i: 1 / 60),
        (partial(fused_rl.dr_grpo, 11), naive.fixed_length_mean),
    ],
    ids=["grpo", "bnpo", "dapo", "dapo of 60 tokens", "dr_grpo"],
)
def test_named_losses_against_naive_formulas(named, mean):
    tokens = Tokens()
    loss = named(beta=0.1, entropy_coef=0.02)
    stats = tokens.stats()
    expected_loss = naive_loss(tokens, stats, loss.surrogate, 0.1, 0.02, mean)
    expected = torch.autograd.grad(expected_loss, (tokens.hidden, tokens.weight, tokens.bias))
    output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss)
    torch.testing.assert_close(output.loss, expected_loss, atol=1e-13, rtol=1e-12)
    for ours, theirs in zip(tokens.gradients(output), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-11)


def test_dapo_clips_higher_and_grpo_does_not():
    assert fused_rl.dapo().surrogate == Clip(0.2, 0.28)
    assert fused_rl.grpo().surrogate == Clip(0.2, 0.2)


LOSSES = {
    "token mean": PolicyLoss(mean=TokenMean()),
    "sequence mean, k3": fused_rl.grpo(beta=0.05),
    "fixed length, k3 value with k2 gradient": fused_rl.dr_grpo(9, beta=0.05, kl_grad=KL.K2),
    "entropy": fused_rl.bnpo(entropy_coef=0.1),
    "everything": fused_rl.dapo(beta=0.2, kl=KL.K2, entropy_coef=0.1),
}


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("chunk_tokens", [1, 16, None])
@pytest.mark.parametrize("name", LOSSES)
def test_one_pass_equals_two_passes_in_value_and_gradient(name, chunk_tokens, trained, monkeypatch):
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 1)
    # As on a GPU: here a frozen head has a way of its own.
    monkeypatch.setattr(ops, "walks_once", lambda _: False)
    tokens = Tokens(trained=trained)
    loss, batch = LOSSES[name], tokens.batch
    chunk_bytes = None if chunk_tokens is None else chunk_tokens * 19 * 8
    one = linear_policy_loss(tokens.hidden, tokens.head, batch, loss, chunk_bytes=chunk_bytes)
    assert type(one.loss.grad_fn).__name__ == "_OnePassBackward"
    two = loss(tokens.stats(), batch)
    torch.testing.assert_close(one.loss, two.loss, atol=1e-14, rtol=1e-12)
    for a, b in zip(tokens.gradients(one), tokens.gradients(two), strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-11)
    assert one.metrics.keys() == two.metrics.keys()
    for key, value in one.metrics.items():
        torch.testing.assert_close(value, two.metrics[key], atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_pass_in_the_dtypes_people_train_in(dtype):
    tokens, exact = Tokens(dtype), Tokens(torch.float64)
    with torch.no_grad():
        for to, source in ((exact.hidden, tokens.hidden), (exact.weight, tokens.weight)):
            to.copy_(source)
        exact.bias.copy_(tokens.bias)
    exact.old, exact.ref, exact.labels = tokens.old, tokens.ref, tokens.labels
    exact.advantages = tokens.advantages
    loss = fused_rl.grpo(beta=0.05, entropy_coef=0.01)
    got = tokens.gradients(linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss))
    true = exact.gradients(linear_policy_loss(exact.hidden, exact.head, exact.batch, loss))
    # Two roundings to the dtype: of the logits' gradient, and of the result.
    budget = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[dtype]
    for a, b in zip(got, true, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).norm() / b.norm()).item() < budget


def test_small_chunks_of_a_trained_head_take_two_passes():
    tokens = Tokens()
    output = linear_policy_loss(
        tokens.hidden, tokens.head, tokens.batch, fused_rl.grpo(), chunk_bytes=19 * 8
    )
    assert type(output.loss.grad_fn).__name__ != "_OnePassBackward"


def test_scaled_loss_and_two_backward_passes():
    tokens = Tokens()
    loss, batch = fused_rl.grpo(beta=0.1), tokens.batch
    leaves = (tokens.hidden, tokens.weight, tokens.bias)
    output = linear_policy_loss(tokens.hidden, tokens.head, batch, loss)
    thrice = torch.autograd.grad(output.loss * 3, leaves, retain_graph=True)
    once = torch.autograd.grad(output.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(output.loss, leaves)
    for a, b, c in zip(thrice, once, again, strict=True):
        torch.testing.assert_close(a, 3 * b)
        assert torch.equal(b, c)


def test_float16_gradients_survive_a_loss_scale():
    """Formed in the forward pass, before the scale is known, they must not underflow meanwhile."""
    tokens = Tokens(torch.float16)
    output = linear_policy_loss(
        tokens.hidden, tokens.head, tokens.batch, fused_rl.dapo(num_tokens=10**7), temperature=1.0
    )
    found = tokens.gradients(output._replace(loss=output.loss * 2.0**24))
    # The same in float32, from the same numbers.
    for t in (tokens.hidden, tokens.weight, tokens.bias):
        t.data = t.data.float()
    wide = linear_policy_loss(
        tokens.hidden, tokens.head, tokens.batch, fused_rl.dapo(num_tokens=10**7), temperature=1.0
    )
    exact = tokens.gradients(wide._replace(loss=wide.loss * 2.0**24))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float16
        assert (a - b).norm() < 1e-3 * b.norm()


def test_double_backward_raises():
    tokens = Tokens()
    output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, fused_rl.grpo())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.loss, tokens.hidden, create_graph=True)


def test_nothing_counted_gives_zero_loss_and_zero_gradients_attached_to_the_graph():
    for loss in (fused_rl.grpo(beta=0.1, entropy_coef=0.1), fused_rl.dr_grpo(5), fused_rl.dapo()):
        tokens = Tokens()
        tokens.mask = torch.zeros_like(tokens.mask)
        output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss)
        assert output.loss.item() == 0
        assert all((g == 0).all() for g in tokens.gradients(output))
        assert all(v.isfinite() for v in output.metrics.values())


def test_an_empty_batch_has_loss_zero():
    weight = torch.randn(9, 4, requires_grad=True)
    hidden = torch.zeros(0, 5, 4, requires_grad=True)
    empty = torch.zeros(0, 5)
    batch = TokenBatch.padded(empty.long(), empty.bool(), torch.zeros(0))
    output = linear_policy_loss(hidden, weight, batch, fused_rl.grpo())
    output.loss.backward()
    assert output.loss.item() == 0
    assert (weight.grad == 0).all()


def test_garbage_outside_the_mask_reaches_nothing():
    clean, dirty = Tokens(), Tokens()
    with torch.no_grad():
        dirty.hidden[~dirty.mask] = float("nan")
    dirty.old[~dirty.mask] = 1e30
    dirty.ref[~dirty.mask] = float("-inf")
    loss = fused_rl.grpo(beta=0.1, entropy_coef=0.1)
    for run in (
        lambda k: linear_policy_loss(k.hidden, k.head, k.batch, loss),
        lambda k: loss(k.stats(), k.batch),
    ):
        a, b = run(clean), run(dirty)
        assert torch.equal(a.loss, b.loss)
        for x, y in zip(clean.gradients(a), dirty.gradients(b), strict=True):
            assert torch.equal(x, y)


def test_a_log_ratio_of_two_hundred_stays_finite_in_value_and_gradient():
    for shift in (200.0, -200.0):
        tokens = Tokens()
        tokens.old[0, 0] += shift
        tokens.ref[0, 1] += shift
        loss = fused_rl.grpo(beta=0.1)
        output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss)
        assert output.loss.isfinite()
        assert all(g.isfinite().all() for g in tokens.gradients(output))


@pytest.mark.parametrize("old", [float("inf"), float("-inf")])
def test_a_token_that_the_old_policy_could_not_sample_stays_finite(old):
    tokens = Tokens()
    tokens.old[0, 0] = old
    output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, fused_rl.grpo())
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in tokens.gradients(output))
    assert all(v.isfinite() for v in output.metrics.values())


def test_without_old_logprobs_every_ratio_is_exactly_one_and_the_gradient_is_reinforce():
    tokens = Tokens()
    batch = TokenBatch.padded(tokens.labels, tokens.mask, tokens.advantages)
    output = linear_policy_loss(tokens.hidden, tokens.head, batch, fused_rl.grpo())
    assert output.metrics["ratio_mean"] == 1
    assert output.metrics["ratio_max"] == 1
    got = tokens.gradients(output)
    stats = tokens.stats()
    weights = SequenceMean()(batch).reshape(tokens.mask.shape)
    reinforce = -(weights * tokens.advantages[:, None] * stats.logprobs).sum()
    expected = torch.autograd.grad(reinforce, (tokens.hidden, tokens.weight, tokens.bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_padded_equals_packed():
    tokens = Tokens()
    loss = fused_rl.grpo(beta=0.1, entropy_coef=0.01)
    padded = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss)
    expected = tokens.gradients(padded)
    lengths = tokens.mask.sum(-1)
    packed = TokenBatch.packed(
        tokens.labels[tokens.mask],
        torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]),
        tokens.advantages,
        old_logprobs=tokens.old[tokens.mask],
        ref_logprobs=tokens.ref[tokens.mask],
    )
    output = linear_policy_loss(tokens.hidden[tokens.mask], tokens.head, packed, loss)
    torch.testing.assert_close(output.loss, padded.loss)
    for a, b in zip(tokens.gradients(output), expected, strict=True):
        torch.testing.assert_close(a, b)
    for key, value in output.metrics.items():
        torch.testing.assert_close(value, padded.metrics[key])


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (PolicyLoss(mean=TokenMean()), PolicyLoss(mean=TokenMean(num_tokens=15))),
        (PolicyLoss(mean=SequenceMean()), PolicyLoss(mean=SequenceMean(num_sequences=4))),
        (PolicyLoss(mean=FixedLengthMean(9)), PolicyLoss(mean=FixedLengthMean(9, num_sequences=4))),
    ],
)
def test_gradients_accumulated_over_uneven_micro_batches_are_those_of_the_step(whole, part):
    tokens = Tokens()
    expected = tokens.gradients(linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, whole))
    total = [torch.zeros_like(g) for g in expected]
    for rows in (slice(0, 1), slice(1, 4)):
        batch = TokenBatch.padded(
            tokens.labels[rows],
            tokens.mask[rows],
            tokens.advantages[rows],
            old_logprobs=tokens.old[rows],
        )
        output = linear_policy_loss(tokens.hidden[rows], tokens.head, batch, part)
        for sum_, g in zip(total, tokens.gradients(output), strict=True):
            sum_ += g
    for a, b in zip(total, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


def test_metrics_by_hand():
    ratios = torch.tensor([[0.5, 1.0, 1.5, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    old = torch.full((1, 4), -2.0, dtype=torch.float64)
    stats = TokenStats(old + ratios.log(), torch.tensor([[1.0, 2.0, 3.0, 99.0]]))
    for advantage, low, high, idle in ((1.0, 0, 1, 1), (-1.0, 1, 0, 1), (0.0, 0, 0, 3)):
        batch = TokenBatch.padded(
            torch.zeros(1, 4).long(),
            mask,
            torch.tensor([advantage]),
            old_logprobs=old,
            ref_logprobs=old,
        )
        metrics = PolicyLoss()(stats, batch).metrics
        assert metrics["entropy"].item() == pytest.approx(2.0)
        assert metrics["ratio_mean"].item() == pytest.approx(1.0)
        assert metrics["ratio_max"].item() == pytest.approx(1.5)
        assert metrics["clip_fraction_low"].item() == pytest.approx(low / 3)
        assert metrics["clip_fraction_high"].item() == pytest.approx(high / 3)
        assert metrics["zero_gradient_fraction"].item() == pytest.approx(idle / 3)
        k3 = sum(1 / r - 1 + math.log(r) for r in (0.5, 1.0, 1.5)) / 3
        assert metrics["kl"].item() == pytest.approx(k3)
        assert not any(v.requires_grad for v in metrics.values())


def test_a_beta_of_zero_needs_no_reference_and_reports_the_estimator_asked_for():
    tokens = Tokens()
    free = TokenBatch.padded(tokens.labels, tokens.mask, tokens.advantages)
    loss = fused_rl.grpo(beta=0.0, kl=KL.K1)
    assert "kl" not in linear_policy_loss(tokens.hidden, tokens.head, free, loss).metrics
    output = loss(tokens.stats(), tokens.batch)
    k1 = (tokens.stats().logprobs - tokens.ref)[tokens.mask].mean()
    torch.testing.assert_close(output.metrics["kl"], k1.detach())
    torch.testing.assert_close(output.loss, fused_rl.grpo()(tokens.stats(), tokens.batch).loss)


def test_a_function_of_the_users_takes_the_pass_it_asks_for():
    def reinforce(stats, batch):
        terms = -(TokenMean()(batch) * batch.advantages * stats.logprobs)
        return LossOutput(terms.where(batch.loss_mask, 0.0).sum(), {})

    tokens = Tokens()
    two = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, reinforce)
    assert type(two.loss.grad_fn).__name__ != "_OnePassBackward"
    reinforce.token_separable = True
    one = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, reinforce)
    assert type(one.loss.grad_fn).__name__ == "_OnePassBackward"
    for a, b in zip(tokens.gradients(one), tokens.gradients(two), strict=True):
        torch.testing.assert_close(a, b)


def test_a_ratio_level_that_couples_tokens_takes_two_passes():
    def sequence_ratio(log_ratio, batch):
        sums = torch.zeros(batch.num_sequences, dtype=log_ratio.dtype)
        sums = sums.index_add(0, batch.sequence, log_ratio.where(batch.loss_mask, 0.0))
        return sums[batch.sequence] / batch.sequence_tokens.clamp(min=1)

    tokens = Tokens()
    loss = PolicyLoss(ratio=sequence_ratio)
    assert not loss.token_separable
    output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, loss)
    expected = tokens.gradients(loss(tokens.stats(), tokens.batch))
    for a, b in zip(tokens.gradients(output), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_temperature_is_that_of_the_head():
    tokens = Tokens()
    temperature = torch.rand(4, 1, dtype=torch.float64) + 0.5
    loss = fused_rl.grpo(beta=0.1)
    one = linear_policy_loss(
        tokens.hidden, tokens.head, tokens.batch, loss, temperature=temperature
    )
    labels = tokens.labels.where(tokens.mask, -100)
    stats = linear_logprobs(tokens.hidden, tokens.head, labels, temperature=temperature)
    two = loss(stats, tokens.batch)
    torch.testing.assert_close(one.loss, two.loss)
    for a, b in zip(tokens.gradients(one), tokens.gradients(two), strict=True):
        torch.testing.assert_close(a, b)


def test_no_gradient_wanted_gives_the_loss_alone():
    tokens = Tokens()
    with torch.no_grad():
        output = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, fused_rl.grpo())
    assert not output.loss.requires_grad
    expected = linear_policy_loss(tokens.hidden, tokens.head, tokens.batch, fused_rl.grpo())
    torch.testing.assert_close(output.loss, expected.loss.detach())


def test_mistakes_are_named():
    tokens = Tokens()
    batch = TokenBatch.padded(tokens.labels, tokens.mask, tokens.advantages)
    with pytest.raises(ValueError, match="KL penalty, but the batch has no ref_logprobs"):
        linear_policy_loss(tokens.hidden, tokens.head, batch, fused_rl.grpo(beta=0.1))
    with pytest.raises(ValueError, match=r"hidden \[3, 7, 6\] and labels \[4, 7\]"):
        linear_policy_loss(tokens.hidden[:3], tokens.head, batch, fused_rl.grpo())
    with pytest.raises(ValueError, match=r"one entry per token of the batch, got \[\[3\], \[3\]\]"):
        PolicyLoss()(TokenStats(torch.zeros(3), torch.zeros(3)), batch)
    with pytest.raises(ValueError, match="chunk_bytes must be positive, got 0"):
        linear_policy_loss(tokens.hidden, tokens.head, batch, fused_rl.grpo(), chunk_bytes=0)
    negative = "counts by loss_mask and is negative"
    said = {19: "is 19", -1: negative, -100: negative}
    for label in said:
        tokens.labels[0, 2] = label
        wrong = TokenBatch.padded(tokens.labels, tokens.mask, tokens.advantages)
        with pytest.raises(ValueError, match=rf"labels\[0, 2\] {said[label]}, outside the"):
            linear_policy_loss(tokens.hidden, tokens.head, wrong, fused_rl.grpo())
