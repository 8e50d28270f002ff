"""Where a policy that cannot cover two modes ends, by the KL that it is trained with.

The reference has two bumps on PLACES places, and the policy is a Gaussian on them,

    log p(x) = mean / std^2 x - x^2 / (2 std^2) - log Z

which is a head of two columns, x and x^2, on a hidden state of two numbers. There is no reward but
the KL. Gradients are expected ones, summed over all places in float64: what an option does here it
does without noise. After figure 7 of "A comedy of estimators" (arXiv 2512.21852), in the small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import (
    Divergence,
    PolicyLoss,
    TokenBatch,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.losses.surrogates import Reinforce
from fused_rl.rollouts.rewards import shape_rewards
from fused_rl.study.enumeration import Expectation
from fused_rl.study.settings import OPTIONS, Option, rounded

PLACES = 64
STEPS = 50
# weight, mean, std of each bump
BUMPS = ((0.6, 1.2, 0.4), (0.4, -1.4, 0.5))
# mean, std
STARTS = {"narrow": (0.2, 0.5), "broad": (0.0, 1.2)}
WAYS = (
    *(option for option in OPTIONS if option.name != "no KL"),
    Option("exact forward in loss", loss=Divergence.FORWARD),
    Option("exact JSD in loss", loss=Divergence.JSD(0.5)),
)


@dataclass(frozen=True)
class Line:
    """The places, and the reference on them.

    Attributes:
        x: [PLACES] float64.
        reference: [PLACES]: its log-probabilities.
    """

    x: Tensor
    reference: Tensor

    @classmethod
    def with_two_bumps(cls) -> Line:
        x = (torch.arange(PLACES, dtype=torch.float64) - (PLACES - 1) / 2) / 10
        bumps = sum(w / s * torch.exp(-((x - m) ** 2) / (2 * s**2)) for w, m, s in BUMPS)
        return cls(x, bumps.log().log_softmax(-1))

    @property
    def head(self) -> Tensor:
        """[PLACES, 2]: of the policy."""
        return torch.stack([self.x, self.x**2], -1)

    def policy(self, mean: Tensor, std: Tensor) -> Tensor:
        """[1, 2]: hidden states."""
        return torch.stack([mean / std**2, -0.5 / std**2])[None]

    def logprobs(self, hidden: Tensor) -> Tensor:
        """[PLACES] of the policy with hidden [1, 2]."""
        everywhere = torch.arange(PLACES)
        return linear_logprobs(hidden.expand(PLACES, 2), self.head, everywhere).logprobs

    def divergence(self, hidden: Tensor, divergence: Divergence) -> float:
        """Of the policy from the reference, in nats."""
        teacher = torch.ones(1, 1, dtype=torch.float64), self.reference[:, None]
        stats = linear_divergence(hidden, self.head, *teacher, divergence=divergence)
        return float(stats.divergence)


def loss(line: Line, hidden: Tensor, way: Option) -> Tensor:
    """Whose gradient is the expected one of the way: every place sampled, by its probability."""
    now = line.logprobs(hidden.detach())[:, None]
    labels = torch.arange(PLACES)[:, None]
    mask = torch.ones_like(labels, dtype=torch.bool)
    rewards = torch.zeros(PLACES, dtype=torch.float64)
    if way.reward is not None:
        ref = line.reference[:, None]
        rewards = shape_rewards(rewards, now, ref, mask, beta=1.0, kind=way.reward).sum(-1)
    batch = TokenBatch.padded(labels, mask, rewards)
    mean = Expectation(now[:, 0].exp())
    policy_loss = PolicyLoss(Reinforce(), kl=way.penalty(1.0), mean=mean)
    teacher = torch.ones(PLACES, 1, 1, dtype=torch.float64), line.reference[:, None]
    states = hidden.expand(PLACES, 1, 2)
    return linear_policy_loss(states, line.head, batch, policy_loss, reference=teacher).loss


def ended(line: Line, way: Option, start: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Mean and std of the policy in the end, by steps along its natural gradient."""
    mean, log_std = torch.tensor([start[0], math.log(start[1])], dtype=torch.float64)
    for _ in range(STEPS):
        leaves = [x.detach().requires_grad_() for x in (mean, log_std)]
        value = loss(line, line.policy(leaves[0], leaves[1].exp()), way)
        slopes = torch.autograd.grad(value, leaves)
        # The Fisher information of mean and log std is 1 / std^2 and 2.
        mean = mean - (slopes[0] * (2 * log_std).exp()).clamp(-0.1, 0.1)
        log_std = log_std - (slopes[1] / 2).clamp(-0.1, 0.1)
    return mean, log_std.exp()


class Case(NamedTuple):
    """A way, from one of STARTS."""

    way: Option
    start: str


def end(case: Case) -> dict:
    """What is kept of the end."""
    line = Line.with_two_bumps()
    return of(line, *ended(line, case.way, STARTS[case.start]))


def cases() -> list[Case]:
    """Every way from every start."""
    return [Case(way, start) for start in STARTS for way in WAYS]


def gathered(found: list[dict]) -> dict:
    """What `end` found of the cases, {"x", "reference", "starts": start -> way -> what}."""
    line = Line.with_two_bumps()
    starts = {}
    for start, (mean, std) in STARTS.items():
        starts[start] = {"start": of(line, torch.tensor(mean), torch.tensor(std))}
    for (way, start), numbers in zip(cases(), found, strict=True):
        starts[start][way.name] = numbers
    return {
        "x": [rounded(x) for x in line.x],
        "reference": [rounded(p) for p in line.reference.exp()],
        "starts": starts,
    }


def of(line: Line, mean: Tensor, std: Tensor) -> dict:
    """What is kept of a policy."""
    hidden = line.policy(mean.double(), std.double())
    logprobs = line.logprobs(hidden)
    p = logprobs.exp()
    return {
        "mean": rounded(p @ line.x),
        "std": rounded(((p @ line.x**2) - (p @ line.x) ** 2).sqrt()),
        "reverse": rounded(line.divergence(hidden, Divergence.REVERSE)),
        "forward": rounded(line.divergence(hidden, Divergence.FORWARD)),
        "entropy": rounded(-(p @ logprobs)),
        "probabilities": [round(q, 4) for q in p.tolist()],
    }
