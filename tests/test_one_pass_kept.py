"""A policy loss by what was sampled: log-probs over kept sets, against logits of -inf elsewhere."""

import dataclasses
import math
from itertools import chain

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EVERYTHING, IGNORED
from test_one_pass import Launches, any_chunk_pays
from torch import Tensor

import fused_rl
from fused_rl import (
    LMHead,
    LossOutput,
    TokenBatch,
    TokenStats,
    linear_kept_logprobs,
    linear_policy_loss,
)
from fused_rl.preference import PreferenceBatch

B, T, H, V = 3, 5, 48, 301
any_chunk_pays = any_chunk_pays
pytestmark = pytest.mark.usefixtures("poisoned")


class Separable:
    """A sum over tokens that does not say that it asks nothing of the entropy."""

    token_separable = True

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> LossOutput:
        losses = (-stats.logprobs * batch.advantages).where(batch.loss_mask, 0.0)
        return LossOutput(losses.sum() / batch.num_tokens, {})


LOSSES = {
    "grpo": fused_rl.grpo(beta=0.1),
    "entropy": fused_rl.dapo(entropy_coef=0.3),
    "gspo": fused_rl.gspo(),
    "gspo, entropy": fused_rl.gspo(entropy_coef=0.3),
    "function": lambda stats, batch: LossOutput(_mixed(stats, batch), {}),
    "separable": Separable(),
}
IN_ONE = {"entropy", "separable"}


def _mixed(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """No sum over tokens."""
    total = (stats.logprobs * batch.advantages + 0.2 * stats.entropy).where(batch.loss_mask, 0.0)
    return total.sum() * total.detach().cos().sum()


class Rollout:
    """B sequences of T tokens with sets of up to `most` entries, some tokens masked; one token has
    the whole vocabulary, one all entries of it, one the label alone."""

    def __init__(self, dtype=torch.float32, most=9, special=True, **features) -> None:
        torch.manual_seed(0)
        N = B * T
        self.case = oracle.random_case(N, H, V, dtype, logit_std=2.0, **features)
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[1, 3:] = mask[2, 0] = False
        sets = [self._set(int(label), most) for label in self.case.labels]
        if special:
            sets[0], sets[1], sets[2] = [-1], list(range(V)), [int(self.case.labels[2])]
        # What masked tokens keep is not looked at.
        for i, n in enumerate((~mask.flatten()).nonzero()[:, 0].tolist()):
            sets[n] = [[], [-1, 10**6, -1], [3, 3]][i]
        self.sets = sets
        self.mask = mask
        plain = TokenBatch.padded(self.case.labels.reshape(B, T), mask, torch.randn(B))
        with torch.no_grad():
            own = self.naive_stats(torch.float64).logprobs
        steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64)
        near = {name: own - steps[torch.randint(4, (N,))] for name in ("old", "ref")}
        near = {f"{n}_logprobs": t.where(mask.flatten(), 0.0).float() for n, t in near.items()}
        self.plain = dataclasses.replace(plain, **near)
        self.batch = self.plain.with_kept(*self.packed)

    def _set(self, label: int, most: int) -> list[int]:
        others = [v for v in torch.randperm(V)[: int(torch.randint(most, ()))].tolist()]
        return [v for v in others if v != label] + [label]

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([0] + [len(s) for s in self.sets])
        return torch.tensor(list(chain(*self.sets))), lengths.cumsum(0)

    def leaves(self, dtype=None, trained=True) -> list[Tensor]:
        case = self.case
        given = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
        leaves = [t.detach().clone().to(dtype or t.dtype) for t in given]
        return [t.requires_grad_(trained or i == 0) for i, t in enumerate(leaves)]

    def head(self, leaves: list[Tensor]) -> LMHead:
        bias = leaves[2] if len(leaves) > 2 else None
        return LMHead(leaves[1], bias, self.case.scale, self.case.softcap)

    def ours(self, loss, leaves, batch=None, **options) -> LossOutput:
        hidden = leaves[0].reshape(B, T, H)
        options = {"temperature": self.case.temperature.reshape(B, T), **options}
        return linear_policy_loss(hidden, self.head(leaves), batch or self.batch, loss, **options)

    def naive_stats(self, dtype=None, leaves=None) -> TokenStats:
        """From all logits, formed in the dtype of the leaves, -inf outside the sets."""
        leaves = leaves or self.leaves(dtype)
        case, bias = self.case, leaves[2] if len(leaves) > 2 else None
        z = F.linear(leaves[0], leaves[1], bias) * case.scale
        z = torch.tanh(z / case.softcap) * case.softcap if case.softcap else z
        z = (z if z.dtype == torch.float64 else z.float()) / case.temperature[:, None].to(
            torch.float64 if z.dtype == torch.float64 else torch.float32
        )
        outside = torch.ones(z.shape, dtype=torch.bool)
        for n, entries in enumerate(self.sets):
            counted = bool(self.mask.flatten()[n])
            outside[n, entries if counted and entries != [-1] else slice(None)] = False
        kept = z.masked_fill(outside, -torch.inf)
        logprobs = torch.log_softmax(kept, -1).gather(-1, case.labels[:, None])[:, 0]
        logp = torch.log_softmax(z, -1)
        return TokenStats(logprobs, -(logp.exp() * logp).sum(-1))

    def naive(self, loss, leaves) -> LossOutput:
        return loss(self.naive_stats(leaves=leaves), self.plain)


def gradients(output: LossOutput, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output.loss, [t for t in leaves if t.requires_grad]))


def way(output: LossOutput) -> str:
    return type(output.loss.grad_fn).__name__


@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_no_worse_than_those_of_torch(
    name, dtype, rows, trained, features, any_chunk_pays
):
    loss, rollout = LOSSES[name], Rollout(dtype, **features)
    width = 8 if dtype == torch.float64 else 4
    options = {} if rows is None else {"chunk_bytes": rows * V * width}
    found = []
    for run, wide in ((rollout.ours, None), (rollout.naive, None), (rollout.naive, torch.float64)):
        leaves = rollout.leaves(wide, trained)
        output = run(loss, leaves, **(options if run == rollout.ours else {}))
        if run == rollout.ours:
            assert (way(output) == "_OnePassBackward") == (name in IN_ONE)
        found.append((output, gradients(output, leaves)))
    (ours, mine), (theirs, eager), (right, exact) = found
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    error, budget = ((o.loss - right.loss).abs().item() for o in (ours, theirs))
    assert error <= budget + slack * (1 + abs(right.loss.item()))
    assert ours.metrics.keys() == right.metrics.keys()
    for got, torchs, best in zip(mine, eager, exact, strict=True):
        summed_in = torch.float64 if dtype == torch.float64 else torch.float32
        oracle.assert_no_worse(got, torchs, best, summed_in=summed_in, roundings=2)


@pytest.mark.parametrize("name", ["grpo", "entropy"])
def test_metrics_are_those_of_the_renormalised_log_probs(name):
    rollout, loss = Rollout(torch.float64), LOSSES[name]
    leaves = rollout.leaves()
    ours, right = rollout.ours(loss, leaves).metrics, rollout.naive(loss, leaves).metrics
    for key, value in right.items():
        torch.testing.assert_close(ours[key], value, msg=key)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_whole_vocabularies_are_the_loss_without_sets(entropy_coef, trained):
    rollout, loss = Rollout(), fused_rl.grpo(entropy_coef=entropy_coef)
    N = B * T
    for sets in ([[-1]] * N, [list(range(V))] * N):
        rollout.sets = sets
        leaves = rollout.leaves(trained=trained)
        batch = rollout.plain.with_kept(*rollout.packed)
        found, plain = (rollout.ours(loss, leaves, b) for b in (batch, rollout.plain))
        torch.testing.assert_close(found.loss, plain.loss)
        for got, right in zip(gradients(found, leaves), gradients(plain, leaves), strict=True):
            assert oracle.relative_error(got, right) < 2e-6


def test_a_whole_vocabulary_has_the_log_prob_of_all_to_the_bit():
    rollout = Rollout()
    leaves = rollout.leaves()
    labels = rollout.case.labels.where(rollout.mask.flatten(), IGNORED)
    args = (leaves[0], rollout.head(leaves), labels, *rollout.packed)
    stats = linear_kept_logprobs(*args)
    assert stats.kept_logprobs[0] == stats.logprobs[0]
    (mine,) = torch.autograd.grad(stats.kept_logprobs[0], leaves[0], retain_graph=True)
    (right,) = torch.autograd.grad(stats.logprobs[0], leaves[0])
    oracle.assert_same_bits(mine, right)


def test_a_minus_one_beside_other_entries_is_a_mistake():
    rollout = Rollout(special=False)
    rollout.sets[4] = [-1, *rollout.sets[4]]
    for loss in (fused_rl.grpo(), LOSSES["entropy"]):
        batch = rollout.plain.with_kept(*rollout.packed)
        with pytest.raises(ValueError, match=r"is -1, outside the vocabulary"):
            rollout.ours(loss, rollout.leaves(), batch)


def test_on_policy_ratios_are_one_and_without_sets_they_are_not():
    """The old log-probs as an engine reports them: of what is sampled from the kept entries."""
    rollout = Rollout(torch.float64, special=False)
    with torch.no_grad():
        sampled = rollout.naive_stats(torch.float64).logprobs
    engine = sampled.where(rollout.mask.flatten(), math.nan)
    plain = dataclasses.replace(rollout.plain, old_logprobs=engine, ref_logprobs=None)
    for loss in (fused_rl.grpo(), LOSSES["entropy"]):
        batch = plain.with_kept(*rollout.packed)
        metrics = rollout.ours(loss, rollout.leaves(), batch).metrics
        torch.testing.assert_close(metrics["ratio_mean"].item(), 1.0, rtol=0, atol=1e-9)
        torch.testing.assert_close(metrics["ratio_max"].item(), 1.0, rtol=0, atol=1e-9)
        assert rollout.ours(loss, rollout.leaves(), plain).metrics["ratio_mean"] < 0.9


# What it costs


@pytest.mark.parametrize("trained", [True, False])
def test_without_an_entropy_the_backward_pass_looks_at_kept_entries_alone(trained):
    rollout = Rollout(most=3, special=False)
    leaves = rollout.leaves(trained=trained)
    output = rollout.ours(fused_rl.grpo(), leaves)
    counted = rollout.mask.flatten().nonzero()[:, 0].tolist()
    seen = torch.zeros(V, dtype=torch.bool)
    seen[list(chain(*(rollout.sets[n] for n in counted)))] = True
    leaves[1].data[~seen] = math.nan
    found = gradients(output, leaves)
    assert all(g.isfinite().all() for g in found)
    assert found[0].norm() > 0
    if trained:
        assert (found[1][~seen] == 0).all()


def test_a_whole_vocabulary_is_looked_at_for_its_own_token_alone():
    rollout = Rollout(most=3, special=False)
    rollout.sets[0] = [-1]
    leaves = rollout.leaves()
    batch = rollout.plain.with_kept(*rollout.packed)
    output = rollout.ours(
        lambda stats, batch: LossOutput(stats.logprobs.where(batch.loss_mask, 0.0).sum(), {}),
        *(leaves, batch),
    )
    counted = rollout.mask.flatten().nonzero()[1:, 0].tolist()
    seen = torch.zeros(V, dtype=torch.bool)
    seen[list(chain(*(rollout.sets[n] for n in counted)))] = True
    leaves[1].data[~seen] = math.nan
    dhidden, _ = gradients(output, leaves)
    assert dhidden.isnan().any(1).nonzero()[:, 0].tolist() == [0]


@pytest.mark.parametrize("trained", [True, False])
def test_with_an_entropy_the_logits_are_formed_once(trained):
    rollout = Rollout()
    leaves = rollout.leaves(trained=trained)
    with Launches() as launches:
        gradients(rollout.ours(LOSSES["entropy"], leaves), leaves)
    names = [n for n in launches.names if n.startswith("fused_rl::linear")]
    chunk = "fused_rl::linear_logprobs_chunk"
    assert names == [chunk, f"{chunk}_backward"]


def test_without_gradients_there_is_one_pass_over_the_vocabulary():
    rollout = Rollout()
    with torch.no_grad(), Launches() as launches:
        rollout.ours(LOSSES["entropy"], rollout.leaves())
    names = [n for n in launches.names if n.startswith("fused_rl::linear")]
    assert names == ["fused_rl::linear_kept_logprobs"]


# Edges


@pytest.mark.parametrize("name", ["grpo", "entropy", "gspo"])
@pytest.mark.parametrize("trained", [True, False])
def test_without_counted_tokens_and_without_entries(name, trained):
    rollout = Rollout()
    none = TokenBatch.padded(
        rollout.case.labels.reshape(B, T), torch.zeros(B, T).bool(), torch.ones(B)
    )
    none = dataclasses.replace(none, ref_logprobs=torch.zeros(B * T))
    for sets in (rollout.packed, (torch.empty(0).long(), torch.zeros(B * T + 1).long())):
        leaves = rollout.leaves(trained=trained)
        output = rollout.ours(LOSSES[name], leaves, none.with_kept(*sets))
        assert output.loss == 0
        assert all((g == 0).all() for g in gradients(output, leaves))


def test_no_tokens_at_all():
    batch = TokenBatch.padded(torch.empty(0, T).long(), torch.empty(0, T).bool(), torch.empty(0))
    batch = batch.with_kept(torch.empty(0).long(), torch.zeros(1).long())
    for loss in (fused_rl.grpo(), LOSSES["entropy"]):
        hidden = torch.empty(0, T, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        output = linear_policy_loss(hidden, weight, batch, loss)
        output.loss.backward()
        assert output.loss == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("name", ["grpo", "entropy"])
def test_nan_at_masked_tokens_reaches_nothing(name):
    rollout = Rollout()
    right = gradients(rollout.ours(LOSSES[name], leaves := rollout.leaves()), leaves)
    leaves = rollout.leaves()
    leaves[0].data[~rollout.mask.flatten()] = math.nan
    for got, same in zip(gradients(rollout.ours(LOSSES[name], leaves), leaves), right, strict=True):
        oracle.assert_same_bits(got, same)


def test_a_second_backward_pass_forms_the_gradients_again():
    rollout = Rollout()
    leaves = rollout.leaves()
    output = rollout.ours(LOSSES["entropy"], leaves)
    first = torch.autograd.grad(output.loss, leaves, retain_graph=True)
    first = [g.clone() for g in first]
    for again, right in zip(torch.autograd.grad(output.loss, leaves), first, strict=True):
        oracle.assert_same_bits(again, right)


@pytest.mark.parametrize("name", ["grpo", "entropy", "gspo"])
def test_compiled_is_eager(name):
    rollout = Rollout()
    leaves = rollout.leaves()
    eager = gradients(rollout.ours(LOSSES[name], leaves), leaves)
    compiled = torch.compile(rollout.ours, fullgraph=True)
    found = gradients(compiled(LOSSES[name], leaves), leaves)
    for got, right in zip(found, eager, strict=True):
        assert oracle.relative_error(got, right) < 1e-5


# Mistakes


@pytest.mark.parametrize("name", ["grpo", "entropy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, y: s.__setitem__(4, []), r"kept set of token 4 is empty, and labels\[0, 4\] is"),
        (lambda s, y: s.__setitem__(4, [V]), rf"is {V}, outside the vocabulary \[0, {V}\)"),
        (lambda s, y: s.__setitem__(4, [y, y]), r"twice in the kept set of token 4"),
        (lambda s, y: s.__setitem__(4, [(y + 1) % V]), r"labels\[0, 4\] is \d+, which is not in"),
    ],
)
def test_mistakes_in_sets_name_the_token(change, message, name):
    rollout = Rollout()
    change(rollout.sets, int(rollout.case.labels[4]))
    batch = rollout.plain.with_kept(*rollout.packed)
    with pytest.raises(ValueError, match=message):
        rollout.ours(LOSSES[name], rollout.leaves(), batch)


def test_what_sets_do_not_go_with_says_the_way_out():
    rollout = Rollout()
    leaves, loss = rollout.leaves(), fused_rl.grpo()
    reference = (leaves[0].detach().reshape(B, T, H), leaves[1].detach())
    bare = dataclasses.replace(rollout.batch, ref_logprobs=None)
    with pytest.raises(ValueError, match=r"give ref_logprobs over the same sets"):
        rollout.ours(loss, leaves, bare, reference=reference)
    with pytest.raises(ValueError, match=r"grad_filter is for .* leave it out"):
        rollout.ours(loss, leaves, grad_filter=1e-4)
    pair = PreferenceBatch.padded(torch.ones(2, 3).long(), torch.ones(2, 3).bool())
    sets = (torch.ones(6).long(), torch.arange(7))
    pair = dataclasses.replace(pair, tokens=pair.tokens.with_kept(*sets))
    with pytest.raises(ValueError, match=r"kept sets, .* take linear_policy_loss"):
        fused_rl.linear_preference_loss(
            torch.randn(2, 3, H), torch.randn(V, H), pair, fused_rl.preference.cpo()
        )
