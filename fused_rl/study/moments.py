"""Exact means and variances of gradients, and the policies at which they are taken.

For each sequence b of a World the library's loss on b alone has a gradient g_b, and so

    mean     = sum_b p_b g_b
    variance = sum_b p_b |g_b|^2 - |mean|^2     its trace, of one sampled sequence

with p of the policy that sampled. Nothing is sampled, everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import KL, Divergence
from fused_rl.kl.log_ratios import BOUND
from fused_rl.study.enumeration import Setup, Target, World
from fused_rl.study.exact_enumeration import MISSING, ExactWorld, Use

ROUNDING = 1e-9
"""Below it a relative number is 0: what is left of sums that vanish differs between processors."""


@dataclass(frozen=True)
class Way:
    """A way to use a KL: where it is, and which estimator or divergence it is."""

    where: Setup | Use
    kind: KL | Divergence

    def gradients(self, world: ExactWorld, sampler: Tensor) -> Tensor:
        """[B, T, V]: of each sequence by itself."""
        if isinstance(self.where, Use):
            return world.exact_gradients(self.where, self.kind, sampler)
        return world.gradients(self.where, self.kind, sampler)

    def moments(self, world: ExactWorld, sampler: Tensor) -> dict[str, float | str]:
        """With truth, the gradient of the reverse KL of whole sequences:

        bias: |mean - truth| / |truth|
        bias_token: the same for the reverse KL per token, relative to its gradient.
        cosine: of mean and truth, 0 without a mean.
        noise: sqrt(variance) / |truth|, of one sequence.
        target: what the mean is the gradient of, or "biased".
        """
        gradients = self.gradients(world, sampler)
        mean = world.mean(gradients, sampler)
        squares = world.probability(sampler) @ gradients.square().sum((-2, -1))
        truth = world.truth[Target.REVERSE]
        size = truth.norm()
        empty = mean.norm() / size < ROUNDING
        found = {
            "bias": away(mean, truth),
            "bias_token": away(mean, world.truth[Target.TOKEN_REVERSE]),
            "cosine": 0.0 if empty else (mean * truth).sum() / (mean.norm() * size),
            "noise": (squares - mean.square().sum()).clamp(min=0).sqrt() / size,
        }
        numbers = {name: zeroed(float(value)) for name, value in found.items()}
        return {**numbers, "target": "0" if empty else target_of(world, mean)}


def target_of(world: World, mean: Tensor) -> str:
    """The name of the divergence that has this gradient, or "biased"."""
    targets = {t.value: world.truth[t] for t in Target if t is not Target.ZERO}
    targets[MISSING] = targets["reverse"] - targets["reverse per token"]
    found = [name for name, target in targets.items() if away(mean, target) < ROUNDING]
    return found[0] if found else "biased"


def away(mean: Tensor, target: Tensor) -> Tensor:
    """[]: the distance from a target, in lengths of the target."""
    return (mean - target).norm() / target.norm()


def batch_error(bias: float, noise: float, sequences: int) -> float:
    """Root mean square, of the mean gradient of so many sequences."""
    return math.sqrt(bias**2 + noise**2 / sequences)


def zeroed(value: float) -> float:
    return 0.0 if abs(value) < ROUNDING else value


def kl(world: World, policy: Tensor, other: Tensor) -> float:
    """KL(policy, other) of whole sequences, in nats."""
    p, q = (world.logprobs(x).sum(-1) for x in (policy, other))
    return (p.exp() * (p - q)).sum().item()


def crossing(distance_of: Callable[[float], float], distance: float) -> float:
    """The argument at which a function that is 0 at 0, and grows at first, is `distance`.

    By bisection, below the first power of two, from 1/1024 on, that is beyond it.

    Raises:
        ValueError: a distance that is not reached.
    """
    low, high = 0.0, 2.0**-10
    while distance_of(high) < distance:
        low, high = high, 2 * high
        if high > 2.0**20:
            raise ValueError(f"no policy here is {distance} nats away")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distance_of(middle) < distance else (low, middle)
    return high


def on_line(world: World, direction: Tensor, distance: float) -> Tensor:
    """The policy in that direction from the reference that is `distance` nats from it."""
    ref = world.ref
    return ref + direction * crossing(lambda s: kl(world, ref + s * direction, ref), distance)


def behind(world: World, direction: Tensor, distance: float) -> Tensor:
    """The policy in that direction from the current one from which that is `distance` nats away."""
    now = world.current
    return now + direction * crossing(lambda s: kl(world, now, now + s * direction), distance)


def run_to(world: World, reward: Tensor, distance: float, *, steps: int) -> list[Tensor]:
    """The policies of a run whose last is `distance` nats from the reference."""

    def run(rate: float) -> list[Tensor]:
        return trained(world, reward, rate, steps=steps)

    return run(crossing(lambda rate: kl(world, run(rate)[-1], world.ref), distance))


def trained(
    world: World, reward: Tensor, rate: float, *, steps: int, beta: float = 0.1
) -> list[Tensor]:
    """steps + 1 policies [S, V], from the reference on: exact gradient ascent on
    E[reward] - beta KL(policy, reference), with reward [B] of each sequence.
    """
    policies = [world.ref]
    for _ in range(steps):
        leaf = policies[-1].clone().requires_grad_()
        value = world.probability(leaf) @ reward
        value = value - beta * world.divergence(leaf, Target.REVERSE)
        policies.append(policies[-1] + rate * torch.autograd.grad(value, leaf)[0])
    return policies


def drawn(world: World, generator: torch.Generator, farthest: float) -> tuple[Tensor, Tensor]:
    """A direction [S, V] and a reward [B] that lead twice as far from the reference as `farthest`
    nats, all the way along them, and the direction so far without a log-ratio of a token that the
    library would cut off; others are drawn again.
    """
    limit = -world.logprobs(world.ref).sum(-1)
    # Where no sequence is so rare, nearly the rarest will do.
    enough = min(2 * farthest, 0.8 * limit.max().item())
    while True:
        direction = torch.randn(world.S, world.V, generator=generator, dtype=torch.float64)
        likeliest = world.logprobs(1e6 * direction).sum(-1).argmax()
        if limit[likeliest] > enough and _within(world, direction, farthest):
            break
    while True:
        reward = torch.randn(world.B, generator=generator, dtype=torch.float64)
        if limit[reward.argmax()] > enough:
            return direction, reward


def _within(world: World, direction: Tensor, distance: float) -> bool:
    policy = on_line(world, direction, distance)
    return (world.logprobs(policy) - world.logprobs(world.ref)).abs().max().item() < BOUND
