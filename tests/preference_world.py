"""Where preference losses lead, in the world of enumeration.py: exact, without sampling.

Preferences are Bradley-Terry's, P(i over j) = sigmoid(reward_i - reward_j); the expected loss is
the sum over all ordered pairs of sequences, drawn from a law `drawn` twice and judged once.
`python tests/preference_world.py` prints, in markdown, what each loss ends at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fused_rl import LMHead, LossOutput, linear_preference_loss, preference
from fused_rl.preference import PreferenceBatch
from fused_rl.study.exact_enumeration import ExactWorld

F64 = {"dtype": torch.float64}


class PreferenceWorld(ExactWorld):
    """Rewards, the law that the pairs are drawn from, and who is preferred."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.reward = torch.randn(self.B, generator=generator, **F64)
        self.drawn = torch.full((self.B,), 1 / self.B, **F64)
        self.flipped = 0.0  # how many of the judgements are turned round

    @property
    def length(self) -> Tensor:
        """[B]"""
        return self.mask.sum(-1).double()

    @property
    def wins(self) -> Tensor:
        """[B, B]: the probability that i is said to be better than j."""
        p = torch.sigmoid(self.reward[:, None] - self.reward)
        return (1 - self.flipped) * p + self.flipped * (1 - p)

    def loss(self, policy: Tensor, loss) -> LossOutput:
        """The expected loss of a policy [S, V], from hidden states that are its prefixes."""
        chosen, rejected = (~torch.eye(self.B).bool()).nonzero().unbind(-1)
        probability = (self.drawn[:, None] * self.drawn * self.wins)[chosen, rejected]
        loss = dataclasses.replace(loss, weight=lambda *_: probability, num_pairs=1)
        batch = PreferenceBatch.padded(self.labels, self.mask, pairs=(chosen, rejected))
        heads = (LMHead(policy.T), batch, loss)
        return linear_preference_loss(
            self.hidden, *heads, reference=(self.hidden, LMHead(self.ref.T))
        )

    def slope(self, policy: Tensor, loss) -> Tensor:
        """[S, V]: the gradient of the expected loss."""
        leaf = policy.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, loss).loss, leaf)[0]

    def trained(self, loss) -> Tensor:
        """[B]: the probabilities of the policy that a quasi-Newton method comes to."""
        policy = self.ref.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [policy],
            max_iter=2000,
            max_eval=4000,
            tolerance_grad=1e-13,
            tolerance_change=0.0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.loss(policy, loss).loss
            value.backward()
            return value

        optimizer.step(closure)
        return self.probability(policy.detach())

    def policy(self, probability: Tensor) -> Tensor:
        """[S, V]: the logits of the policy whose sequences have these probabilities [B]."""
        passing = torch.zeros(self.S, self.labels.max() + 1, **F64)
        at = (self.state[self.mask], self.labels[self.mask])
        mass = probability[:, None].expand(self.mask.shape)[self.mask]
        return passing.index_put(at, mass, accumulate=True).log()

    # Closed forms, all [B]. Constants c make probabilities add up to 1.

    @property
    def log_ref(self) -> Tensor:
        return self.logprobs(self.ref).sum(-1)

    def best(self, beta: float) -> Tensor:
        """ref exp(reward / beta) / Z: the policy of most reward - beta KL(policy, ref)."""
        return (self.log_ref + self.reward / beta).softmax(-1)

    def best_of_divergence(self, ratio: Callable[[Tensor], Tensor], beta: float, top) -> Tensor:
        """ref ratio((reward + c) / beta), ratio being the inverse of f'; below `top`."""
        ref, highest = self.log_ref.exp(), beta * top - self.reward.max()
        return self._adding_up(lambda c: ref * ratio((self.reward + c) / beta), highest)

    def best_of_ipo(self, tau: float) -> Tensor:
        """ref exp(n (P(i over a drawn one) / tau + c)): IPO's, of log-ratios per token."""
        better = self.wins @ self.drawn
        return self._adding_up(lambda c: (self.log_ref + self.length * (better / tau + c)).exp())

    def best_of_simpo(self, beta: float) -> Tensor:
        """exp(n (reward + c) / beta): SimPO's without a margin, which knows no reference."""
        return self._adding_up(lambda c: (self.length * (self.reward + c) / beta).exp())

    def _adding_up(self, of: Callable[[Tensor], Tensor], highest: float = 100.0) -> Tensor:
        """of(c) at the c where it adds up to 1; it grows with c."""
        low, high = torch.tensor(-1e4, **F64), torch.as_tensor(highest, **F64)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if of(middle).sum() > 1 else (middle, high)
        return of(low)

    # What an optimum is worth.

    def expected_reward(self, probability: Tensor) -> float:
        return float(probability @ self.reward)

    def kl(self, probability: Tensor) -> float:
        """From the reference, in nats."""
        return float((probability * (probability.log() - self.log_ref)).sum())


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation: half the sum of |p - q|."""
    return float((p - q).abs().sum() / 2)


def frontier(world: PreferenceWorld, kl: float) -> float:
    """The most reward that a policy so far from the reference can have: that of `best`."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if world.kl(world.best(beta)) > kl else (low, beta)
    return world.expected_reward(world.best(high))


# name -> (the loss, its optimum in a page's words, its optimum)
ENDS = {
    **{
        f"dpo(beta={beta})": (
            *(preference.dpo(beta), "ref exp(r / beta) / Z"),
            lambda world, beta=beta: world.best(beta),
        )
        for beta in (0.5, 1.0, 2.0)
    },
    "ipo(beta=0.3)": (
        *(preference.ipo(0.3), "ref exp(n (P(y wins) / beta + c))"),
        lambda world: world.best_of_ipo(0.3),
    ),
    "cpo(beta=1.0, likelihood=0)": (
        *(preference.cpo(1.0, likelihood=0.0), "exp(r / beta) / Z"),
        lambda world: (world.reward / 1.0).softmax(-1),
    ),
    "simpo(beta=2.0, gamma=0)": (
        *(preference.simpo(2.0, gamma=0.0), "exp(n (r + c) / beta)"),
        lambda world: world.best_of_simpo(2.0),
    ),
}


def preference_markdown(world: PreferenceWorld) -> str:
    """What each loss ends at, how far that is from the reference, and what it earns."""
    lines = [
        "| loss | its optimum | KL(optimum, ref) | reward | most reward at that KL |",
        "|---" * 5 + "|",
    ]
    for name, (_, words, optimum) in ENDS.items():
        found = optimum(world)
        kl, reward = world.kl(found), world.expected_reward(found)
        numbers = f"{kl:.3f} | {reward:.3f} | {frontier(world, kl):.3f}"
        lines.append(f"| `{name}` | `{words}` | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(preference_markdown(PreferenceWorld()))
