"""Schedules: how much the KL weighs as training goes on. Each has `.beta` and `.update(kl, n)`.

update takes the KL that was measured and how many steps (or samples) it stands for, and returns the
new beta. A KLPenalty follows one through a tensor: `beta.fill_(schedule.update(kl))`.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from fused_rl import checks

__all__ = [
    "AdaptiveBeta",
    "Anneal",
    "AnnealedBeta",
    "FixedBeta",
]


@dataclass
class FixedBeta:
    """beta, whatever the KL does."""

    beta: float

    def __post_init__(self) -> None:
        checks.is_not_negative("beta", self.beta)

    def update(self, kl: float, n: int = 1) -> float:
        """beta."""
        return self.beta


@dataclass
class AdaptiveBeta:
    """beta *= 1 + clip(kl / target - 1, -bound, bound) * n / horizon.

    The proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2): it holds the KL
    near target, by bounded steps.

    Args:
        beta: to begin with.
        target: the KL to hold, in the unit that update is given.
        horizon: over how many steps (or samples) beta moves by the whole of the bounded error.
        bound: how much of the relative error counts at most.
        lowest, highest: between which beta stays.

    Raises:
        ValueError: a target or horizon that is not positive; n over horizon; a KL of NaN.
    """

    beta: float
    target: float
    horizon: float = 10_000
    bound: float = 0.2
    lowest: float = 0.0
    highest: float = math.inf

    def __post_init__(self) -> None:
        for name in ("target", "horizon", "bound"):
            checks.is_positive(name, getattr(self, name))
        checks.is_number("beta", self.beta)
        for name in ("beta", "lowest", "highest"):
            checks.is_bound(name, getattr(self, name))
            checks.at_least(name, getattr(self, name), 0)
        checks.require(
            self.lowest <= self.highest,
            lambda: f"lowest must not exceed highest, got {self.lowest} and {self.highest}",
        )

    def update(self, kl: float | Tensor, n: int = 1) -> float:
        """beta after n steps at this KL: a number, or a tensor [], of any dtype."""
        kl = kl.item() if isinstance(kl, Tensor) and kl.numel() == 1 else kl
        checks.is_bound("kl", kl)
        checks.is_integer("n", n)
        checks.require(
            0 <= n <= self.horizon, lambda: f"n must be 0 to horizon = {self.horizon}, got {n}"
        )
        error = min(max(kl / self.target - 1, -self.bound), self.bound)
        beta = self.beta * (1 + error * n / self.horizon)
        self.beta = min(max(beta, self.lowest), self.highest)
        return self.beta


class Anneal(Enum):
    """The way from start to end, at the fraction x of it.

    LINEAR: start + x (end - start). COSINE: the same with (1 - cos(pi x)) / 2 for x.
    EXPONENTIAL: start (end / start)^x.
    """

    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"


@dataclass
class AnnealedBeta:
    """From start to end within so many steps, and end from there on: tight first, loose later.

    Raises:
        ValueError: steps that are not positive; an exponential way to or from 0 or below.
    """

    start: float
    end: float
    steps: int
    shape: Anneal = Anneal.LINEAR
    done: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            checks.is_not_negative(name, getattr(self, name))
        for name in ("steps", "done"):
            checks.is_integer(name, getattr(self, name))
        checks.is_positive("steps", self.steps)
        checks.at_least("done", self.done, 0)
        checks.is_one_of("shape", self.shape, Anneal)
        checks.require(
            self.shape is not Anneal.EXPONENTIAL or min(self.start, self.end) > 0,
            lambda: f"an exponential way needs start, end > 0, got {self.start}, {self.end}",
        )

    @property
    def beta(self) -> float:
        """The weight at this step."""
        x = min(self.done / self.steps, 1.0)
        if self.shape is Anneal.EXPONENTIAL:
            return self.start ** (1 - x) * self.end**x
        if self.shape is Anneal.COSINE:
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start * (1 - x) + self.end * x

    def update(self, kl: float, n: int = 1) -> float:
        """beta after n more steps; the KL does not matter."""
        checks.is_integer("n", n)
        checks.at_least("n", n, 0)
        self.done += n
        return self.beta
