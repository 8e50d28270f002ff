"""A world small enough to be summed: every sequence of a tabular policy, with its probability.

Expectations here are sums over all sequences, in float64, so that an expected gradient is exact or
wrong, and nothing is left to luck. `python -m fused_rl.study.enumeration` prints, in markdown,
which KL option optimises what.
"""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from fused_rl import KL, KLPenalty, Level, PolicyLoss, TokenBatch, TokenStats
from fused_rl.losses.surrogates import Reinforce, Unclipped
from fused_rl.rollouts.advantages import discounted_returns
from fused_rl.rollouts.mismatch import truncated_weights
from fused_rl.rollouts.rewards import shape_rewards

V, T = 3, 3
EXACT, BIASED = 1e-12, 1e-3
KINDS = (KL.K1, KL.K2, KL.K3)


class Target(Enum):
    """Divergences between policy and reference, and how a table names them."""

    ZERO = "0"
    REVERSE = "reverse"
    FORWARD = "forward"
    TOKEN_REVERSE = "reverse per token"
    TOKEN_FORWARD = "forward per token"
    OLD_TOKEN_REVERSE = "reverse per token, old prefixes"
    OLD_TOKEN_FORWARD = "forward per token, old prefixes"


class Credit(Enum):
    """Which of a sequence's KL terms reach the advantage of a token."""

    OWN = "own token"
    TO_GO = "to go"
    TOTAL = "whole sequence"
    TERMINAL = "of the sum, at the end"


@dataclass(frozen=True)
class Setup:
    """A way to use an estimator.

    loss: the level of the KLPenalty, or None for no KL in the loss.
    importance, attached: as of KLPenalty.
    reward: the credit of the KL in the reward, or None for none there.
    ratio: how the surrogate corrects off-policy samples: TOKEN by the ratio of each token, PRODUCT
        by weights of whole sequences, None not at all.
    stale: the KL in the reward is that of the policy that sampled, not of the current one.
    grad: whose derivative the KL in the loss takes, as of KLPenalty; None: that of its value.
    """

    loss: Level | None = None
    importance: Level | None = None
    attached: bool = False
    reward: Credit | None = None
    ratio: Level | None = None
    stale: bool = False
    grad: KL | None = None


@dataclass(frozen=True)
class Expectation:
    """A mean for PolicyLoss that weighs each sequence by its probability."""

    probability: Tensor  # [B]

    def __call__(self, batch: TokenBatch) -> Tensor:
        return self.probability[batch.sequence] * batch.loss_mask


class World:
    """All sequences of at most T tokens out of V, the last token of which ends them.

    A policy is one row of logits per prefix, [S, V]: the current one, its reference and an old one,
    drawn from N(0, 1).
    """

    def __init__(self, seed: int = 7, *, V: int = V, T: int = T) -> None:
        end = V - 1
        prefixes = [p for t in range(T) for p in itertools.product(range(end), repeat=t)]
        ended = [(*p, end) for p in prefixes]
        sequences = ended + list(itertools.product(range(end), repeat=T))
        self.S, self.B, self.V = len(prefixes), len(sequences), V
        self.labels = torch.zeros(self.B, T, dtype=torch.int64)
        self.mask = torch.zeros(self.B, T, dtype=torch.bool)
        self.state = torch.zeros(self.B, T, dtype=torch.int64)
        for b, tokens in enumerate(sequences):
            for t, token in enumerate(tokens):
                self.labels[b, t], self.mask[b, t] = token, True
                self.state[b, t] = prefixes.index(tokens[:t])
        generator = torch.Generator().manual_seed(seed)
        self.current, self.ref, self.old = torch.randn(
            3, self.S, V, generator=generator, dtype=torch.float64
        )
        self.truth = {target: self.true_gradient(target) for target in Target}

    def at(self, **policies: Tensor) -> World:
        """The same sequences where current, ref or old are other policies, [S, V]."""
        world = copy(self)
        vars(world).update(policies)
        world.truth = {target: world.true_gradient(target) for target in Target}
        return world

    def logprobs(self, policy: Tensor) -> Tensor:
        """[B, T]; 0 outside the mask."""
        return policy.log_softmax(-1)[self.state, self.labels].where(self.mask, 0.0)

    def probability(self, policy: Tensor) -> Tensor:
        """[B]: of each sequence; they add up to 1."""
        return self.logprobs(policy).sum(-1).exp()

    def reach(self, policy: Tensor) -> Tensor:
        """[S]: how probable it is that a sequence passes each prefix."""
        passing = self.probability(policy)[:, None].expand_as(self.mask)[self.mask]
        return torch.zeros(self.S, dtype=torch.float64).index_add(0, self.state[self.mask], passing)

    def divergence(self, policy: Tensor, target: Target) -> Tensor:
        """The target at this policy, as what autograd can differentiate. Per-token divergences are
        weighted by how probable the prefix is, without the gradient of that."""
        if target is Target.ZERO:
            return 0.0 * policy.sum()
        if target in (Target.REVERSE, Target.FORWARD):
            p, q = (self.logprobs(x).sum(-1) for x in (policy, self.ref))
        else:
            p, q = policy.log_softmax(-1), self.ref.log_softmax(-1)
        if target.value.startswith("forward"):
            p, q = q, p
        kl = (p.exp() * (p - q)).sum(-1)
        if "token" not in target.value:
            return kl
        return self.reach(self.old if "old" in target.value else policy).detach() @ kl

    def true_gradient(self, target: Target) -> Tensor:
        """[S, V]: of the divergence at the current policy."""
        leaf = self.current.clone().requires_grad_()
        return torch.autograd.grad(self.divergence(leaf, target), leaf)[0]

    def expected_gradient(self, setup: Setup, kind: KL, *, off_policy: bool) -> Tensor:
        """[S, V]: what the library's loss gives, over all that the sampling policy may sample."""
        sampler = self.old if off_policy else self.current
        return self.mean(self.gradients(setup, kind, sampler), sampler)

    def gradients(self, setup: Setup, kind: KL, sampler: Tensor) -> Tensor:
        """[B, T, V]: what the library's loss gives for each sequence by itself, with respect to the
        logits of the prefixes that it passes. It passes none of them twice.
        """
        leaf = self.current[self.state].requires_grad_()
        chosen = leaf.log_softmax(-1).gather(-1, self.labels[..., None])[..., 0]
        logprobs = chosen.where(self.mask, 0.0)
        loss = PolicyLoss(
            Unclipped() if setup.ratio is Level.TOKEN else Reinforce(),
            kl=penalty(setup, kind),
            mean=Expectation(torch.ones(self.B, dtype=torch.float64)),
        )
        stats = TokenStats(logprobs, torch.zeros_like(logprobs))
        value = loss.objective(stats, self.batch(setup, kind, sampler))
        return torch.autograd.grad(value, leaf)[0]

    def mean(self, gradients: Tensor, sampler: Tensor) -> Tensor:
        """[S, V]: of each sequence's gradients [B, T, V], over what the sampling policy samples."""
        weighted = self.probability(sampler)[:, None, None] * gradients
        return torch.zeros_like(self.current).index_add(
            0, self.state.flatten(), weighted.flatten(0, 1)
        )

    def batch(self, setup: Setup, kind: KL, sampler: Tensor) -> TokenBatch:
        """All sequences as one batch, whose advantages are those of the KL in the reward."""
        old, ref, now = (self.logprobs(p) for p in (sampler, self.ref, self.current))
        batch = TokenBatch.padded(
            self.labels,
            self.mask,
            self.advantages(setup, kind, old if setup.stale else now, ref),
            old_logprobs=old,
            ref_logprobs=ref,
            rollout_logprobs=old,
        )
        if setup.ratio is not Level.PRODUCT:
            return batch
        weights = truncated_weights(batch, level=Level.PRODUCT, high=torch.inf, logprobs=now)
        return batch.with_weights(weights)

    def advantages(self, setup: Setup, kind: KL, logprobs: Tensor, ref: Tensor) -> Tensor:
        """[B, T]: of a reward that is nothing but the KL."""
        nothing = torch.zeros(self.B, dtype=torch.float64)
        if setup.reward is None:
            return torch.zeros_like(logprobs)
        level = Level.PRODUCT if setup.reward is Credit.TERMINAL else Level.TOKEN
        rewards = shape_rewards(nothing, logprobs, ref, self.mask, beta=1.0, kind=kind, level=level)
        if setup.reward is Credit.TOTAL:
            return rewards.sum(-1, keepdim=True).expand_as(rewards)
        gamma = 0.0 if setup.reward is Credit.OWN else 1.0
        return discounted_returns(rewards, self.mask, gamma=gamma)

    def verdict(self, setup: Setup, kind: KL, *, off_policy: bool) -> Target | None:
        """The target whose gradient this is, None where it is that of none of them.

        Raises:
            AssertionError: an error between EXACT and BIASED, about which nothing can be said.
        """
        got = self.expected_gradient(setup, kind, off_policy=off_policy)
        found = None
        for target in Target:
            if "old" in target.value and not off_policy:
                continue
            error = (got - self.truth[target]).abs().max().item()
            assert error < EXACT or error > BIASED, (setup, kind, target, error)
            if error < EXACT:
                found = target
        return found


def penalty(setup: Setup, kind: KL) -> KLPenalty | None:
    """The KL in the loss, if there is any."""
    if setup.loss is None:
        return None
    return KLPenalty(
        1.0, kind, setup.grad, setup.loss, importance=setup.importance, attached=setup.attached
    )


LOSS_SETUPS = [
    Setup(loss=level, importance=importance, attached=attached)
    for level in (Level.TOKEN, Level.PRODUCT)
    for importance in (None, Level.TOKEN, Level.GEOMETRIC, Level.PRODUCT)
    for attached in (False, True)
    if importance or not attached
    if level is Level.TOKEN or importance is not Level.TOKEN
]
REWARD_SETUPS = [
    Setup(reward=credit, ratio=ratio)
    for credit in Credit
    for ratio in (None, Level.TOKEN, Level.PRODUCT)
]
STALE_SETUPS = [
    Setup(reward=credit, ratio=ratio, stale=True)
    for credit in (Credit.TO_GO, Credit.TERMINAL)
    for ratio in (Level.TOKEN, Level.PRODUCT)
]
BOTH_SETUPS = [
    replace(where, importance=ratio, ratio=ratio)
    for where in (
        Setup(loss=Level.TOKEN, reward=Credit.OWN),
        Setup(loss=Level.TOKEN, reward=Credit.TO_GO),
        Setup(loss=Level.PRODUCT, reward=Credit.TERMINAL),
    )
    for ratio in (None, Level.PRODUCT)
]
SETUPS = LOSS_SETUPS + REWARD_SETUPS + STALE_SETUPS + BOTH_SETUPS


def described(setup: Setup) -> str:
    """The first two columns of the table."""
    where = []
    if setup.loss is not None:
        where.append(f"loss, {setup.loss.value}")
    if setup.reward is not None:
        where.append(f"reward, {setup.reward.value}{', stale' if setup.stale else ''}")
    importance = setup.importance or setup.ratio
    how = "" if setup.loss is None or not importance else " detached"
    how = " attached" if setup.attached else how
    return f"{' + '.join(where)} | {importance.value + how if importance else 'none'}"


def markdown(world: World) -> str:
    """The table of all setups, found by enumeration."""
    columns = [f"{kind.name.lower()}{how}" for how in ("", " off-policy") for kind in KINDS]
    lines = [f"| KL in | importance ratio | {' | '.join(columns)} |", "|---" * 8 + "|"]
    for setup in SETUPS:
        found = [
            world.verdict(setup, kind, off_policy=off_policy)
            for off_policy in (False, True)
            for kind in KINDS
        ]
        cells = " | ".join("biased" if target is None else target.value for target in found)
        lines.append(f"| {described(setup)} | {cells} |")
    return "\n".join(lines)


LEGEND = """

reverse: of KL(policy, reference) of whole sequences; forward: of KL(reference, policy). Per token:
the KL at each prefix, summed over prefixes as the policy (or the old one) reaches them, without the
gradient of reaching them. 0: no gradient at all. biased: none of these."""

if __name__ == "__main__":
    print(markdown(World()) + LEGEND)
