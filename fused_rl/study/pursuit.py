"""RL on the proxy of a flawed world, by the library's own parts, watched exactly.

A step samples SEQUENCES from the policy, puts beta KL (k1) into the proxy rewards, takes the
advantage of each over the others of its group (RLOO), and makes one update by Adam. So what a run
maximises is proxy - beta KL, with the KL of whole sequences in nats.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from fused_rl import linear_divergence, linear_policy_loss, rloo
from fused_rl.losses.batch import TokenBatch
from fused_rl.rollouts.advantages import leave_one_out_advantages
from fused_rl.rollouts.rewards import shape_rewards
from fused_rl.rollouts.schedules import AdaptiveBeta, AnnealedBeta, FixedBeta
from fused_rl.study.flawed import FLATTERY, Policy, T, World

SEQUENCES, GROUP = 128, 16
Schedule = FixedBeta | AdaptiveBeta | AnnealedBeta


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        world: seed of the world.
        seed: of what is sampled.
        steps: updates.
        every: steps from one checkpoint to the next.
        rate: Adam's learning rate.
        schedule: of beta; it is told the KL of whole sequences, after every step.
        scale: what the proxy is multiplied by before it is trained on.
    """

    world: int
    seed: int
    steps: int
    every: int = 10
    rate: float = 0.002
    schedule: Schedule = field(default_factory=lambda: FixedBeta(0.0))
    scale: float = 1.0


world_of = lru_cache(maxsize=2)(World)


def run(case: Case) -> dict[str, list[float]]:
    """What is true at each checkpoint, and what its samples say.

    Returns:
        step, beta; kl, proxy, gold, exact; seen_kl, seen_proxy, seen_gold and entropy, the means of
        what the next step samples, KL and entropy per token; flattery, tokens of a sequence.
    """
    world = world_of(case.world)
    generator = torch.Generator().manual_seed(case.seed)
    policy, schedule = world.reference.copied(), deepcopy(case.schedule)
    optimiser = torch.optim.Adam(list(policy), lr=case.rate)
    found: list[dict[str, float]] = []
    for step in range(case.steps + 1):
        checkpoint = step % case.every == 0
        beta = schedule.beta
        true = world.point(policy.logprobs())._asdict() if checkpoint else {}
        seen = update(world, policy, optimiser, beta, case.scale, generator)
        schedule.update(T * seen["seen_kl"])
        if checkpoint:
            found.append({"step": step, "beta": beta} | true | seen)
    return {name: [point[name] for point in found] for name in found[0]}


def update(
    world: World,
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    beta: float,
    scale: float,
    generator: torch.Generator,
) -> dict[str, Any]:
    """One step; returns what its samples say of the policy before it."""
    tokens = policy.sampled(SEQUENCES, generator)
    chosen = world.index(tokens)
    reference = world.reference
    hidden, mask = policy.hidden(tokens), torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        stats = linear_divergence(
            hidden, policy.head, reference.hidden(tokens), reference.head, tokens
        )
    shaped = shape_rewards(
        scale * world.proxy[chosen], stats.logprobs, stats.teacher_logprobs, mask, beta=beta
    )
    batch = TokenBatch.padded(tokens, mask, leave_one_out_advantages(shaped.sum(-1), GROUP))
    optimiser.zero_grad()
    linear_policy_loss(hidden, policy.head, batch, rloo()).loss.backward()
    optimiser.step()
    return {
        "seen_kl": stats.divergence.mean().item(),
        "seen_proxy": world.proxy[chosen].mean().item(),
        "seen_gold": world.gold[chosen].mean().item(),
        "entropy": stats.entropy.mean().item(),
        "flattery": (tokens == FLATTERY).sum(-1).double().mean().item(),
    }
