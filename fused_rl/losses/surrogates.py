"""Surrogates: the policy-gradient term of one token, from its log-ratio and its advantage.

Each is called as surrogate(log_ratio, logprobs, advantages) -> [N], to be minimised, and names its
formula with r = exp(log_ratio), l = logprobs, A = advantages, sg = without gradient. `clipped` of
the same arguments says at which tokens a lower and an upper bound are at work.

log_ratio is what a level of ratios.py has made of logprobs - old_logprobs. Every exp is held within
exp(+-20), where the derivative goes on as that at the bound: nothing overflows, nothing dies.
Results are float32, or float64 where an argument is; half precision is computed with in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.log_ratios import BOUND
from fused_rl.reference import promoted

__all__ = [
    "ASPO",
    "CISPO",
    "DRO",
    "SAPO",
    "VESPO",
    "Clip",
    "Kimi",
    "Reinforce",
    "Surrogate",
    "Unclipped",
]


def bounded(log_ratio: Tensor) -> Tensor:
    """log_ratio within +-BOUND, so that its exp is finite; the gradient is that of the identity."""
    # An infinite log-ratio, of a token that one policy cannot sample, is at the bound for good.
    finite = log_ratio.nan_to_num(nan=torch.nan, posinf=BOUND, neginf=-BOUND)
    return finite + (finite.clamp(-BOUND, BOUND) - finite).detach()


def promoting(method: Callable) -> Callable:
    """A method of a surrogate, which then hears of float32 or float64 alone, and of one of them."""

    @wraps(method)
    def wide(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor):
        return method(self, *promoted(log_ratio, logprobs, advantages))

    return wide


class Surrogate:
    """What surrogates say of themselves unless they say otherwise: token by token, no bounds."""

    token_separable = True

    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """No token."""
        none = torch.zeros_like(log_ratio, dtype=torch.bool)
        return none, none

    def dual_clipped(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Which tokens above the upper bound are losing ones, held from above: no token."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


def is_clip(low: object, high: object) -> None:
    """Distances from 1, or 0 for logarithms, that bounds lie at; inf: no bound on that side."""
    # Named losses give them as clip_low and clip_high.
    for name, value in (("low (clip_low)", low), ("high (clip_high)", high)):
        checks.is_bound(name, value)
        checks.at_least(name, value, 0)


@dataclass(frozen=True)
class Clip(Surrogate):
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347, eq. 7).

    low and high may differ: "clip-higher" of DAPO (arXiv 2503.14476, eq. 10). A low of 1 or more is
    no bound, since no ratio is below 0.

    dual: where A < 0 the loss is at most -dual A: dual clip (arXiv 1912.09729).
    delta: r A becomes min(r, delta) A, the other branch stays: two-sided clipping (INTELLECT-2,
        arXiv 2505.07291). With delta >= 1 + high it is dual = delta.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        is_clip(self.low, self.high)
        for name in ("dual", "delta"):
            if getattr(self, name) is not None:
                checks.is_number(name, getattr(self, name))
        checks.require(
            self.dual is None or self.dual > 1, lambda: f"dual must exceed 1, got {self.dual}"
        )
        checks.require(
            self.delta is None or self.delta > 0,
            lambda: f"delta must be positive, got {self.delta}",
        )

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(bounded(log_ratio))
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        if self.delta is not None:
            ratio = ratio.clamp(max=self.delta)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        if self.dual is None:
            return losses
        bound = -self.dual * advantages
        return torch.minimum(losses, bound).where(advantages < 0, losses)

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(below 1 - low while A < 0, above the bound for A's sign): the gradient there is 0."""
        ratio = torch.exp(bounded(log_ratio))
        gaining = (ratio > min(1 + self.high, self.delta or math.inf)) & (advantages > 0)
        losing = self._losing(ratio, advantages)
        return (ratio < 1 - self.low) & (advantages < 0), gaining | losing

    @promoting
    def dual_clipped(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Above dual, or delta, while A < 0: the gradient there is 0."""
        if self.dual is None and self.delta is None:
            return super().dual_clipped(log_ratio, logprobs, advantages)
        return self._losing(torch.exp(bounded(log_ratio)), advantages)

    def _losing(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        delta = max(1 + self.high, self.delta or math.inf)
        return (ratio > min(self.dual or math.inf, delta)) & (advantages < 0)


@dataclass(frozen=True)
class Unclipped(Surrogate):
    """-r A: the importance-weighted policy gradient (arXiv 1502.05477)."""

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -torch.exp(bounded(log_ratio)) * advantages


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """-A l: REINFORCE; GPG (arXiv 2504.02546). Old log-probs do not matter."""

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * logprobs


@dataclass(frozen=True)
class CISPO(Surrogate):
    """-sg(clip(r, ratio_min, ratio_max)) A l: a truncated weight, and no token without gradient.

    The defaults bound r from above alone, as TRL does. MiniMax-M1 (arXiv 2506.13585) has
    ratio_min = 1 - low and ratio_max = 1 + high. Bounds are of r itself, not of its distance to 1.
    """

    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        checks.is_bound("ratio_min", self.ratio_min)
        checks.is_bound("ratio_max", self.ratio_max)
        checks.require(
            self.ratio_max >= max(self.ratio_min, 0),
            lambda: (
                "ratio_max must be at least 0 and ratio_min, "
                f"got {self.ratio_max} and {self.ratio_min}"
            ),
        )

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(bounded(log_ratio)).detach()
        return -ratio.clamp(self.ratio_min, self.ratio_max) * advantages * logprobs

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(r below ratio_min, r above ratio_max): the weight is truncated there."""
        ratio = torch.exp(bounded(log_ratio))
        return ratio < self.ratio_min, ratio > self.ratio_max


@dataclass(frozen=True)
class SAPO(Surrogate):
    """-sigmoid(tau (r - 1)) 4 / tau A: a gate that closes softly (arXiv 2511.20347).

    tau = tau_positive where A > 0, else tau_negative. At r = 1 the gradient is REINFORCE's.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        checks.is_positive("tau_positive", self.tau_positive)
        checks.is_positive("tau_negative", self.tau_negative)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(bounded(log_ratio))
        positive = torch.sigmoid(self.tau_positive * (ratio - 1)) * (4 / self.tau_positive)
        negative = torch.sigmoid(self.tau_negative * (ratio - 1)) * (4 / self.tau_negative)
        return -positive.where(advantages > 0, negative) * advantages


@dataclass(frozen=True)
class ASPO(Surrogate):
    """-sg(w) A (1 + l - sg(l)), w = min(1 / r, dual) where A > 0, min(r, dual) elsewhere.

    The ratio is flipped where A > 0, so that improbable tokens learn the most (arXiv 2510.06062).
    Beyond r > 1 + high while A > 0, and r < 1 - low elsewhere, the gradient is 0, as PPO's is; the
    bound `dual` of the weight leaves a gradient.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = 3.0

    def __post_init__(self) -> None:
        is_clip(self.low, self.high)
        checks.is_positive("dual", self.dual)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(bounded(log_ratio)).detach()
        flipped = 1 / ratio.clamp(max=1 + self.high)
        weight = flipped.where(advantages > 0, ratio.clamp(min=1 - self.low)).clamp(max=self.dual)
        low, high = self.clipped(log_ratio, logprobs, advantages)
        step = (logprobs - logprobs.detach()).masked_fill(low | high, 0.0)
        return -weight * advantages * (1 + step)

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(below 1 - low unless A > 0, above 1 + high while A > 0): the gradient there is 0."""
        ratio = torch.exp(bounded(log_ratio))
        positive = advantages > 0
        return (ratio < 1 - self.low) & ~positive, (ratio > 1 + self.high) & positive


@dataclass(frozen=True)
class VESPO(Surrogate):
    """-sg(phi) A l, phi = r^k exp(lambda (1 - r)): a soft weight of sequences (arXiv 2602.10693).

    k and lambda are those of the sign of A, 0 being positive; phi is 1 at r = 1. r is meant to be
    the ratio of whole sequences, ProductRatio, within [1e-8, e^20].
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            checks.is_not_negative(name, getattr(self, name))

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        log_r = log_ratio.detach().clamp(math.log(1e-8), 20.0)
        negative = advantages < 0
        k = torch.full_like(log_r, self.k_positive).masked_fill(negative, self.k_negative)
        rate = torch.full_like(k, self.lambda_positive).masked_fill(negative, self.lambda_negative)
        phi = torch.exp(k * log_r - rate * torch.expm1(log_r))
        return -phi * advantages * logprobs


@dataclass(frozen=True)
class DRO(Surrogate):
    """-(A l - penalty / 2 log_ratio^2): off-policy, without ratios (arXiv 2405.19107).

    A is reward minus value or baseline. Token by token as verl and Tinker have it; the paper's sums
    over sequences are `Kimi`.
    """

    penalty: float = 0.05

    def __post_init__(self) -> None:
        checks.is_not_negative("penalty", self.penalty)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return 0.5 * self.penalty * log_ratio.square() - advantages * logprobs


@dataclass(frozen=True)
class Kimi(Surrogate):
    """(A - tau log_ratio)^2 / (2 tau): policy mirror descent (arXiv 2501.12599, section 2.3.2).

    A is reward - mean reward of the group, which stands for tau log Z; log_ratio is meant to be
    that of whole sequences, ProductRatio. Divided by 2 tau, the gradient is the one the report
    prints: -A dl + tau / 2 d(log_ratio^2).
    """

    tau: float

    def __post_init__(self) -> None:
        checks.is_positive("tau", self.tau)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        return (advantages - self.tau * log_ratio).square() / (2 * self.tau)
