"""Links: what a loss makes of the scores of the chosen and the rejected, to be minimised.

Each is called as link(chosen [P], rejected [P]) -> [P]. With w the score of the chosen, l of the
rejected, m = w - l:

    Logistic(e, g)       -(1 - e) log sigmoid(m - g) - e log sigmoid(g - m)
    Robust(e)            (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)
    Hinge(g)             max(g - m, 0)
    Squared(g)           (m - g)^2
    Exponential()        e^-m
    EXO(e)               KL((sigmoid(m), sigmoid(-m)), (1 - e, e))
    DiscoPOP(t)          -sigmoid(-m / t) log sigmoid(m) + sigmoid(m / t) e^-m
    SigmoidDown()        sigmoid(w) + sigmoid(-m)

Where the two are judged apart, `chosen` and `rejected` say how, and unpaired sequences will do:

    CrossEntropy()       -log sigmoid(w)                                -log sigmoid(-l)
    NCA()                -log sigmoid(w) - 1/2 log sigmoid(-w)          -1/2 log sigmoid(-l)
    Regression(g)        (w - g)^2                                      (l + g)^2
    Sigmoid(a, b)        a sigmoid(-w)                                  b sigmoid(l)

sigmoid(-x) takes the place of 1 - sigmoid(x), which would cancel. Powers are held at e^20.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fused_rl import checks
from fused_rl.kl.log_ratios import held

__all__ = [
    "EXO",
    "NCA",
    "CrossEntropy",
    "DiscoPOP",
    "Exponential",
    "Hinge",
    "Logistic",
    "Regression",
    "Robust",
    "Sides",
    "Sigmoid",
    "SigmoidDown",
    "Squared",
]


def is_smoothing(value: float, *, below: float = 1.0) -> None:
    checks.is_number("smoothing", value)
    checks.require(0 <= value < below, lambda: f"smoothing must be in [0, {below}), got {value}")


@dataclass(frozen=True)
class Logistic:
    """-(1 - smoothing) log sigmoid(m - margin) - smoothing log sigmoid(margin - m).

    Bradley-Terry, DPO's (arXiv 2305.18290, eq. 7). smoothing: the share of pairs that are taken to
    be labelled wrongly, cDPO. margin: SimPO's gamma.
    """

    smoothing: float = 0.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        is_smoothing(self.smoothing)
        checks.is_number("margin (gamma)", self.margin)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        m = chosen - rejected - self.margin
        losses = -(1 - self.smoothing) * logsigmoid(m)
        return losses - self.smoothing * logsigmoid(-m) if self.smoothing else losses


@dataclass(frozen=True)
class Robust:
    """Unbiased where a share `smoothing` of the labels is flipped (arXiv 2403.00409)."""

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        is_smoothing(self.smoothing, below=0.5)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        m, e = chosen - rejected, self.smoothing
        return (-(1 - e) * logsigmoid(m) + e * logsigmoid(-m)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge:
    """max(margin - m, 0): SLiC (arXiv 2305.10425), RSO (arXiv 2309.06657)."""

    margin: float = 1.0

    def __post_init__(self) -> None:
        checks.is_number("margin (gamma)", self.margin)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return relu(self.margin - (chosen - rejected))


@dataclass(frozen=True)
class Squared:
    """(m - target)^2: IPO (arXiv 2310.12036, eq. 17)."""

    target: float = 0.5

    def __post_init__(self) -> None:
        checks.is_number("target", self.target)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - self.target).square()


@dataclass(frozen=True)
class Exponential:
    """e^-m: AdaBoost's, of the GPO family (arXiv 2402.05749)."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.exp(held(rejected - chosen))


@dataclass(frozen=True)
class EXO:
    """KL of (sigmoid(m), sigmoid(-m)) from (1 - smoothing, smoothing): arXiv 2402.00856, eq. 16."""

    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        is_smoothing(self.smoothing)
        checks.is_positive("smoothing", self.smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        m = chosen - rejected
        won = torch.sigmoid(m) * (logsigmoid(m) - math.log1p(-self.smoothing))
        return won + torch.sigmoid(-m) * (logsigmoid(-m) - math.log(self.smoothing))


@dataclass(frozen=True)
class DiscoPOP:
    """-sigmoid(-m / temperature) log sigmoid(m) + sigmoid(m / temperature) e^-m.

    Found by a language model (arXiv 2406.08414, eq. 5).
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        checks.is_positive("temperature", self.temperature)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        m = chosen - rejected
        at = m / self.temperature
        # In one power: of a lost pair e^-m alone is inf, and its weight 0.
        exponential = torch.exp(held(logsigmoid(at) - m))
        return exponential - torch.sigmoid(-at) * logsigmoid(m)


@dataclass(frozen=True)
class SigmoidDown:
    """sigmoid(w) + sigmoid(-m): APO-down (arXiv 2408.06266, eq. 8)."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


class Sides:
    """A link that judges the chosen and the rejected apart; of a pair, the sum."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.chosen(chosen) + self.rejected(rejected)


@dataclass(frozen=True)
class CrossEntropy(Sides):
    """-log sigmoid(w), -log sigmoid(-l): BCO's classifier of desirable ones (arXiv 2404.04656)."""

    def chosen(self, score: Tensor) -> Tensor:
        return -logsigmoid(score)

    def rejected(self, score: Tensor) -> Tensor:
        return -logsigmoid(-score)


@dataclass(frozen=True)
class NCA(Sides):
    """-log sigmoid(w) - 1/2 log sigmoid(-w), -1/2 log sigmoid(-l): NCA (arXiv 2402.05369)."""

    def chosen(self, score: Tensor) -> Tensor:
        return -logsigmoid(score) - 0.5 * logsigmoid(-score)

    def rejected(self, score: Tensor) -> Tensor:
        return -0.5 * logsigmoid(-score)


@dataclass(frozen=True)
class Regression(Sides):
    """(w - target)^2, (l + target)^2: SPPO with certain wins (arXiv 2405.00675, eq. 4.7)."""

    target: float = 0.5

    def __post_init__(self) -> None:
        checks.is_number("target", self.target)

    def chosen(self, score: Tensor) -> Tensor:
        return (score - self.target).square()

    def rejected(self, score: Tensor) -> Tensor:
        return (score + self.target).square()


@dataclass(frozen=True)
class Sigmoid(Sides):
    """desirable sigmoid(-w), undesirable sigmoid(l): KTO's value (arXiv 2402.01306), APO-zero."""

    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        checks.is_not_negative("desirable", self.desirable)
        checks.is_not_negative("undesirable", self.undesirable)

    def chosen(self, score: Tensor) -> Tensor:
        return self.desirable * torch.sigmoid(-score)

    def rejected(self, score: Tensor) -> Tensor:
        return self.undesirable * torch.sigmoid(score)
