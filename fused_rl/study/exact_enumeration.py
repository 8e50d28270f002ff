"""Which use of exact divergences optimises what, in the world of enumeration.py.

The library forms them as it does for a model: hidden states are prefixes, one-hot, and a head is a
policy's table of logits. `python -m fused_rl.study.exact_enumeration` prints the table in markdown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import (
    Divergence,
    KLPenalty,
    Level,
    LMHead,
    PolicyLoss,
    TokenBatch,
    linear_divergence,
    linear_policy_loss,
)
from fused_rl.losses.surrogates import Reinforce
from fused_rl.rollouts.advantages import discounted_returns
from fused_rl.rollouts.mismatch import truncated_weights
from fused_rl.rollouts.rewards import shape_rewards
from fused_rl.study.enumeration import BIASED, EXACT, Expectation, Target, World

DIVERGENCES = {"reverse": Divergence.REVERSE, "forward": Divergence.FORWARD}
SAMPLERS = ("current", "old", "ref")
MISSING = "reverse, of the prefixes alone"


@dataclass(frozen=True)
class Use:
    """A way to use an exact divergence.

    loss: whether it is in the loss.
    importance, attached: as of KLPenalty; the weights of whole sequences on the reward's part too.
    reward: what of a token is in the reward: "exact", the divergence, detached; "k1"; or None.
    credit: whose terms reach the advantage of a token: "own token", "to go" (its own and those of
        later tokens), or "later tokens".
    """

    loss: bool = False
    importance: Level | None = None
    attached: bool = False
    reward: str | None = None
    credit: str | None = None

    def __str__(self) -> str:
        """The first two columns of the table."""
        where = ["loss, exact"] if self.loss else []
        if self.reward:
            where.append(f"reward, {self.reward}, {self.credit}")
        how = " attached" if self.attached else " detached"
        ratio = "none" if self.importance is None else self.importance.value + how
        return f"{' + '.join(where)} | {ratio}"


USES = [
    Use(loss=True),
    Use(loss=True, importance=Level.TOKEN),
    Use(loss=True, importance=Level.TOKEN, attached=True),
    Use(loss=True, importance=Level.PRODUCT),
    Use(loss=True, importance=Level.PRODUCT, attached=True),
    Use(reward="exact", credit="own token"),
    *(
        Use(loss, ratio, reward=reward, credit=credit)
        for loss, reward, credit in (
            (False, "exact", "to go"),
            (True, "exact", "to go"),
            (True, "exact", "later tokens"),
            (True, "k1", "to go"),
            (True, "k1", "later tokens"),
        )
        for ratio in (None, Level.PRODUCT)
    ),
]


class ExactWorld(World):
    """The same sequences, whose policies are heads over one-hot prefixes."""

    @property
    def hidden(self) -> Tensor:
        """[B, T, S]."""
        return torch.nn.functional.one_hot(self.state, self.S).double()

    def targets(self) -> dict[str, Tensor]:
        """Name -> [S, V], what an expected gradient may be; nearer ones first."""
        found = {target.value: self.truth[target] for target in Target}
        found[MISSING] = found["reverse"] - found["reverse per token"]
        leaf = self.current.clone().requires_grad_()
        p, q = leaf.log_softmax(-1), self.ref.log_softmax(-1)
        at_reference = self.reach(self.ref) @ (p.exp() * (p - q)).sum(-1)
        (found["reverse per token, the reference's prefixes"],) = torch.autograd.grad(
            at_reference, leaf
        )
        return found

    def exact_gradient(self, use: Use, divergence: Divergence, sampler: Tensor) -> Tensor:
        """[S, V]: what the library's loss gives, over all that the sampling policy may sample."""
        return self.mean(self.exact_gradients(use, divergence, sampler), sampler)

    def exact_gradients(self, use: Use, divergence: Divergence, sampler: Tensor) -> Tensor:
        """[B, T, V]: as gradients. Each token has a hidden state, and a row of the heads, of its
        own.
        """
        leaf = self.current[self.state].requires_grad_()
        own = torch.eye(self.mask.numel(), dtype=torch.float64).unflatten(0, self.mask.shape)
        penalty = KLPenalty(1.0, importance=use.importance, attached=use.attached, exact=divergence)
        mean = Expectation(torch.ones(self.B, dtype=torch.float64))
        loss = PolicyLoss(Reinforce(), kl=penalty if use.loss else None, mean=mean)
        batch = TokenBatch.padded(
            *(self.labels, self.mask, self.exact_advantages(use, divergence)),
            old_logprobs=self.logprobs(sampler),
            rollout_logprobs=self.logprobs(sampler),
        )
        if use.importance is Level.PRODUCT:
            now = self.logprobs(self.current)
            options = {"level": Level.PRODUCT, "high": torch.inf, "logprobs": now}
            batch = batch.with_weights(truncated_weights(batch, **options))
        head, reference = leaf.flatten(0, 1).T, self.ref[self.state].flatten(0, 1).T
        output = linear_policy_loss(own, LMHead(head), batch, loss, reference=(own, reference))
        return torch.autograd.grad(output.loss, leaf)[0]

    def exact_advantages(self, use: Use, divergence: Divergence) -> Tensor:
        """[B, T]: of a reward that is nothing but the divergence, or k1, of the current policy."""
        now, ref = self.logprobs(self.current), self.logprobs(self.ref)
        if use.reward is None:
            return torch.zeros_like(now)
        if use.reward == "k1":
            nothing = torch.zeros(self.B, dtype=torch.float64)
            rewards = shape_rewards(nothing, now, ref, self.mask, beta=1.0)
        else:
            heads = (self.hidden, self.current.T, self.hidden, self.ref.T)
            stats = linear_divergence(*heads, divergence=divergence)
            rewards = -stats.divergence.where(self.mask, 0.0)
        if use.credit == "own token":
            return rewards
        to_go = discounted_returns(rewards, self.mask)
        return to_go if use.credit == "to go" else to_go - rewards

    def exact_verdict(self, use: Use, divergence: str, sampler: str) -> str | None:
        """The target whose gradient this is, None where it is that of none of them.

        Raises:
            AssertionError: an error between EXACT and BIASED, about which nothing can be said.
        """
        got = self.exact_gradient(use, DIVERGENCES[divergence], getattr(self, sampler))
        found = None
        for name, target in self.targets().items():
            if sampler == "current" and "old" in name:
                continue
            error = (got - target).abs().max().item()
            assert error < EXACT or error > BIASED, (use, divergence, sampler, name, error)
            if error < EXACT:
                found = name if found is None else found
        return found


def exact_markdown(world: ExactWorld) -> str:
    """The table of all uses, found by enumeration."""
    samplers = {"current": "", "old": " off-policy", "ref": " on the reference's samples"}
    cells = [(d, s) for s in samplers for d in DIVERGENCES]
    columns = " | ".join(f"{d}{samplers[s]}" for d, s in cells)
    lines = [f"| divergence in | importance ratio | {columns} |", "|---" * 8 + "|"]
    for use in USES:
        found = (world.exact_verdict(use, *cell) or "biased" for cell in cells)
        lines.append(f"| {use} | {' | '.join(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(exact_markdown(ExactWorld()))
