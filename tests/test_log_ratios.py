"""What is not known of a token: NaN and -inf among the log-probs of other policies.

A NaN counts as the policy's own log-prob, so that the right value of everything is that of the same
batch with the policy's own number in its place.
"""

import itertools
import math

import pytest
import torch
from by_name import loss_of

import fused_rl
from fused_rl import KL, KLPenalty, Level, TokenBatch, TokenStats, kl_penalty, linear_policy_loss
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses import named
from fused_rl.mismatch import truncated_weights
from fused_rl.rewards import shape_rewards

NAN, INF = math.nan, math.inf
B, T, V, H = 4, 6, 13, 5
MASK = torch.arange(T) < torch.tensor([6, 2, 0, 5])[:, None]
# Counted tokens of two sequences; a sequence's other tokens stay known.
AT = ((0, 1), (0, 4), (3, 2))
PENALTIES = [
    KLPenalty(0.3, value, grad, level=level, importance=importance)
    for value, grad in ((KL.K1, None), (KL.K2, None), (KL.K3, None), (KL.K3, KL.K2), (KL.ABS, None))
    for level, importance in (
        *((Level.TOKEN, level) for level in (None, *Level)),
        *((Level.PRODUCT, level) for level in (None, Level.PRODUCT, Level.GEOMETRIC)),
    )
]


class Step:
    """Hidden states, and the log-probs of the policies that it is compared with."""

    def __init__(self, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = normal(B, T, H).requires_grad_(), normal(V, H).requires_grad_()
        self.labels = torch.randint(0, V, (B, T), generator=generator)
        self.advantages = normal(B)
        self.own = fused_rl.linear_logprobs(self.hidden, self.weight, self.labels).logprobs.detach()
        self.given = {
            "old_logprobs": self.own + 0.2 * normal(B, T),
            "ref_logprobs": self.own + 0.2 * normal(B, T),
            "rollout_logprobs": self.own + 0.2 * normal(B, T),
            "weights": normal(B, T).exp(),
        }

    def batch(self, **changed) -> TokenBatch:
        return TokenBatch.padded(self.labels, MASK, self.advantages, **(self.given | changed))

    def put(self, name: str, value) -> torch.Tensor:
        """`name`, with value (a number or a tensor) at the tokens AT."""
        tensor = self.given[name].clone()
        for at in AT:
            tensor[at] = value[at] if isinstance(value, torch.Tensor) else value
        return tensor

    def stats(self) -> TokenStats:
        labels = self.labels.where(MASK, -100)
        return fused_rl.linear_logprobs(self.hidden, self.weight, labels)

    def results(self, loss, batch, two_passes=False) -> tuple:
        """The loss, its gradients and its metrics."""
        if two_passes:
            output = loss(self.stats(), batch)
        else:
            output = linear_policy_loss(self.hidden, self.weight, batch, loss)
        gradients = torch.autograd.grad(output.loss, (self.hidden, self.weight))
        return output.loss.detach(), *gradients, output.metrics


@pytest.mark.parametrize("which", ["old_logprobs", "ref_logprobs", "weights"])
@pytest.mark.parametrize("name", named.NAMES)
def test_nan_counts_as_the_policys_own(name, which):
    step, loss = Step(), loss_of(name, beta=0.1, entropy_coef=0.1)
    neutral = torch.ones(B, T).double() if which == "weights" else step.own
    dirty = step.batch(**{which: step.put(which, NAN)})
    clean = step.batch(**{which: step.put(which, neutral)})
    for two_passes in (False, True):
        *found, metrics = step.results(loss, dirty, two_passes)
        *right, expected = step.results(loss, clean, two_passes)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert metrics.pop("unknown_fraction").item() == pytest.approx(len(AT) / 13)
        assert expected.pop("unknown_fraction") == 0
        # A ratio of 1 to within rounding may lie on either side of narrow bounds' 0.
        for key, value in metrics.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_penalty_does_not_pull_where_the_reference_is_not_known(penalty):
    step = Step()
    grads = []
    for value in (NAN, step.own):
        leaf = step.own.clone().requires_grad_()
        batch = step.batch(ref_logprobs=step.put("ref_logprobs", value))
        terms = penalty(leaf.reshape(-1), batch)
        (grad,) = torch.autograd.grad(terms.sum(), leaf)
        grads.append((terms.detach(), grad))
        if penalty.level is Level.TOKEN:
            assert all(terms.reshape(B, T)[at] == 0 for at in AT)
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_everything_not_known_is_reinforce():
    """Ratio 1 and KL 0 at every token: on-policy, without a reference, unweighted."""
    step = Step()
    nothing = torch.full((B, T), NAN, dtype=torch.float64)
    unknown = step.batch(**dict.fromkeys(step.given, nothing))
    bare = TokenBatch.padded(step.labels, MASK, step.advantages)
    for name in ("grpo", "gspo", "rloo", "gmpo", "ppo"):
        *found, metrics = step.results(loss_of(name, beta=0.1), unknown)
        *right, _ = step.results(loss_of(name), bare)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert metrics["unknown_fraction"] == metrics["ratio_max"] == 1
        assert metrics["kl"] == 0


@pytest.mark.parametrize("name", named.NAMES)
def test_infinities_stay_finite_for_every_loss(name):
    """Of both signs within a sequence, so that their sum is no number; and where all agree."""
    step, loss = Step(), loss_of(name, beta=0.1, entropy_coef=0.1)
    for which, (a, b) in itertools.product(
        ("old_logprobs", "ref_logprobs"), itertools.product((INF, -INF), repeat=2)
    ):
        tensor = step.given[which].clone()
        tensor[0, 1], tensor[0, 4], tensor[3, 2] = a, b, NAN
        for two_passes in (False, True):
            *found, metrics = step.results(loss, step.batch(**{which: tensor}), two_passes)
            assert all(x.isfinite().all() for x in (*found, *metrics.values()))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("own", [-INF, -1.5])
def test_infinities_stay_finite_for_every_penalty(penalty, own):
    step = Step()
    for ref, old in itertools.product((-INF, -1.0, NAN), repeat=2):
        leaf = step.put("ref_logprobs", own).requires_grad_()
        batch = step.batch(
            ref_logprobs=step.put("ref_logprobs", ref), old_logprobs=step.put("old_logprobs", old)
        )
        terms = penalty(leaf.reshape(-1), batch)
        (grad,) = torch.autograd.grad(terms.sum(), leaf)
        assert terms.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("policy", "other", "d", "slope"),
    [
        (-1.0, NAN, 0.0, 1.0),
        (-INF, NAN, 0.0, 0.0),
        (-INF, -INF, 0.0, 0.0),
        (-1.0, -INF, 20.0, 1.0),
        (-INF, -1.0, -20.0, 0.0),
        (-1.0, INF, -20.0, 1.0),
        (-50.0, -1.0, -49.0, 1.0),
    ],
)
def test_the_table_by_hand(policy, other, d, slope):
    """And every estimator at it: with d known, value and slope are those of any other d."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        p = torch.tensor([policy], dtype=dtype, requires_grad=True)
        q = torch.tensor([other], dtype=dtype)
        got = log_ratio(p, q)
        assert got.tolist() == [d]
        (grad,) = torch.autograd.grad(got.sum(), p)
        assert grad.tolist() == [slope]
        for kind in KL:
            k = kl_penalty(p, q, value=kind)
            (grad,) = torch.autograd.grad(k.sum(), p)
            at = torch.tensor([d], dtype=torch.float64, requires_grad=True)
            right = kl_penalty(at, torch.zeros_like(at), value=kind)
            (known,) = torch.autograd.grad(right.sum(), at)
            torch.testing.assert_close(k.double(), right, rtol=1e-6, atol=0)
            torch.testing.assert_close(grad.double(), slope * known, rtol=4e-3, atol=0)


def test_the_reference_has_its_gradient_too():
    p, q = torch.randn(2, 9, dtype=torch.float64, requires_grad=True).unbind()
    for kind in (KL.K1, KL.K2, KL.K3):
        assert torch.autograd.gradcheck(lambda p, q, k=kind: kl_penalty(p, q, value=k), (p, q))


def test_a_policy_of_nan_is_broken_and_says_so():
    for other in (NAN, -1.0, -INF):
        p, q = torch.tensor([NAN, -1.0]), torch.tensor([other, -1.0])
        assert log_ratio(p, q).isnan().tolist() == [True, False]
        assert kl_penalty(p, q).isnan().tolist() == [True, False]
    step = Step()
    with torch.no_grad():
        step.hidden[0, 1] = NAN
    for two_passes in (False, True):
        for old in (step.given["old_logprobs"], None):
            loss, *_ = step.results(loss_of("grpo"), step.batch(old_logprobs=old), two_passes)
            assert loss.isnan()


@pytest.mark.parametrize("name", named.NAMES)
def test_nan_outside_the_mask_reaches_nothing_and_is_not_counted(name):
    step, loss = Step(), loss_of(name, beta=0.1)
    dirty = {key: tensor.where(MASK, NAN) for key, tensor in step.given.items()}
    *found, metrics = step.results(loss, step.batch(**dirty))
    *right, _ = step.results(loss, step.batch())
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert metrics["unknown_fraction"] == 0


@pytest.mark.parametrize("level", list(Level))
def test_truncated_weights_of_an_engine_that_reports_nan(level):
    """trl#6166: one token's NaN was its weight, or its sequence's, and the loss's."""
    step = Step()
    for which in ("rollout_logprobs", "old_logprobs"):
        found = truncated_weights(step.batch(**{which: step.put(which, NAN)}), level=level)
        others = "old_logprobs" if which == "rollout_logprobs" else "rollout_logprobs"
        agreed = step.put(which, step.given[others])
        assert torch.equal(found, truncated_weights(step.batch(**{which: agreed}), level=level))
        if level is Level.TOKEN:
            assert all(found.reshape(B, T)[at] == 1 for at in AT)
    both = {key: step.put(key, -INF) for key in ("rollout_logprobs", "old_logprobs")}
    weights = truncated_weights(step.batch(**both), level=level)
    assert weights.isfinite().all()
    batch = step.batch(rollout_logprobs=step.put("rollout_logprobs", NAN))
    batch = batch.with_weights(truncated_weights(batch, level=level))
    loss, *gradients, metrics = step.results(fused_rl.grpo(beta=0.1), batch)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert metrics["unknown_fraction"].item() == pytest.approx(len(AT) / 13)


@pytest.mark.parametrize("level", list(Level))
def test_sums_of_both_infinities_are_no_weight(level):
    step = Step()
    old, rollout = step.given["old_logprobs"].clone(), step.given["rollout_logprobs"].clone()
    old[0, 1], rollout[0, 4] = -INF, -INF
    batch = step.batch(old_logprobs=old, rollout_logprobs=rollout)
    weights = truncated_weights(batch, level=level, low=0.1, high=3.0).reshape(B, T)
    assert weights.isfinite().all()
    if level is Level.TOKEN:
        assert (weights[0, 1].item(), weights[0, 4].item()) == pytest.approx((0.1, 3.0))
    else:
        assert weights[0].tolist() == [1.0] * T
        assert not fused_rl.mismatch.acceptance_mask(batch, level=level)[:T].any()


def test_the_masks_reject_what_is_not_known_and_nothing_else():
    step = Step()
    for which in ("rollout_logprobs", "old_logprobs"):
        batch = step.batch(**{which: step.put(which, NAN)})
        kept = fused_rl.mismatch.acceptance_mask(batch, level=Level.TOKEN, low=0.0, high=99.0)
        dropped = (~kept.reshape(B, T)).nonzero().tolist()
        assert dropped == [list(at) for at in AT]
        vetoed = ~fused_rl.mismatch.veto_mask(batch, floor=1e-9).reshape(B, T)
        assert torch.equal(vetoed, MASK & torch.tensor([True, False, False, True])[:, None])
    both = {key: step.put(key, -INF) for key in ("rollout_logprobs", "old_logprobs")}
    assert fused_rl.mismatch.veto_mask(step.batch(**both), floor=1e-9).all()
    assert fused_rl.mismatch.acceptance_mask(
        step.batch(**both), level=Level.TOKEN, low=0, high=99
    ).all()


def test_a_sequence_is_left_behind_by_what_is_known_of_it():
    step = Step()
    step.advantages = -torch.ones(B, dtype=torch.float64)
    current = step.given["old_logprobs"] - 1.0
    for which, value, kept in (
        ("known", 0.0, [False, False, True, False]),
        ("old", NAN, [True, False, True, True]),
        ("current", NAN, [True, False, True, True]),
        ("current", -INF, [False, False, True, False]),
    ):
        old = step.put("old_logprobs", value) if which == "old" else step.given["old_logprobs"]
        now = current.clone()
        for at in AT if which == "current" else ():
            now[at] = value
        # Of mean gaps of 1, (6 - 2) / 6 and (5 - 1) / 5.
        mask = fused_rl.mismatch.off_policy_sequence_mask(
            now, step.batch(old_logprobs=old), delta=0.85
        )
        assert mask.reshape(B, T)[:, 0].tolist() == kept


@pytest.mark.parametrize("level", [Level.TOKEN, Level.PRODUCT])
def test_shaped_rewards_have_no_kl_where_it_is_not_known(level):
    step = Step()
    rewards = torch.arange(4.0).double()
    options = {"beta": 0.1, "level": level}
    ref, own = step.given["ref_logprobs"], step.own
    agreed = step.put("ref_logprobs", own)
    right = shape_rewards(rewards, own, agreed, MASK, **options)
    for p, q in ((own, step.put("ref_logprobs", NAN)), (own.clone(), ref)):
        if q is ref:
            for at in AT:
                p[at] = NAN
        assert torch.equal(shape_rewards(rewards, p, q, MASK, **options), right)
    impossible = step.put("ref_logprobs", -INF)
    assert shape_rewards(rewards, own, impossible, MASK, **options).isfinite().all()


def test_compiled_losses_do_the_same():
    step, loss = Step(), fused_rl.grpo(beta=0.1)
    batch = step.batch(**{key: step.put(key, NAN) for key in step.given})
    stats = TokenStats(*(t.detach() for t in step.stats()))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(stats, batch)
    expected = loss(stats, batch)
    torch.testing.assert_close(compiled.loss, expected.loss)
    assert compiled.metrics["unknown_fraction"] == expected.metrics["unknown_fraction"] > 0
