"""Surrogates that choose tokens: by how far a probability has moved, by how much it tells.

DPPO masks tokens that leave a trust region of probabilities, not of ratios. Clip-Cov and KL-Cov
pick the tokens whose covariance of advantage and log-prob is high, those that take entropy away:

    covariance[n] = (A[n] - mean A) (l[n] - mean l)        over the counted tokens

The latter depend on all tokens they are called with; PolicyLoss calls them with counted ones only.
Where a step is cut into micro-batches, each is judged by itself.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.surrogates import Clip, Surrogate, bounded, promoting

__all__ = [
    "DPPOKL",
    "DPPOTV",
    "ClipCov",
    "KLCov",
    "TrustRegion",
]


def probabilities(log_ratio: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, 1 - p of the policy, then of the old policy; without gradient."""
    # Rounding may leave the log-prob of a certain token a little above 0.
    new = logprobs.detach().clamp(max=0.0)
    old = (logprobs - log_ratio).detach().clamp(max=0.0)
    return new.exp(), -new.expm1(), old.exp(), -old.expm1()


class TrustRegion(Surrogate):
    """-A sg(min(r, ratio_max)) l where `clipped` marks no bound, else 0."""

    low: float
    high: float
    ratio_max: float

    def __post_init__(self) -> None:
        for name in ("low", "high", "ratio_max"):
            checks.is_bound(name, getattr(self, name))
            checks.at_least(name, getattr(self, name), 0)
        checks.require(self.ratio_max > 0, lambda: "ratio_max must be positive, got 0")

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        low, high = self.clipped(log_ratio, logprobs, advantages)
        ratio = torch.exp(bounded(log_ratio)).detach().clamp(max=self.ratio_max)
        return (-advantages * ratio * logprobs).masked_fill(low | high, 0.0)


@dataclass(frozen=True)
class DPPOTV(TrustRegion):
    """-A sg(min(r, ratio_max)) l while p - p_old <= high (A > 0), or >= -low (else); 0 outside.

    DPPO with the total variation of {this token, the others} (arXiv 2602.04879). p is the
    probability of the token, so log_ratio must be the token's own: TokenRatio.
    """

    low: float = 0.2
    high: float = 0.2
    ratio_max: float = 20.0

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(p fell too far, A <= 0; p rose too far, A > 0): loss and gradient there are 0."""
        p, _, old, _ = probabilities(log_ratio, logprobs)
        positive = advantages > 0
        return (p - old < -self.low) & ~positive, (p - old > self.high) & positive


@dataclass(frozen=True)
class DPPOKL(TrustRegion):
    """-A sg(min(r, ratio_max)) l while KL(old, new) <= high (A > 0), or <= low (else); 0 outside.

    DPPO with the KL, in nats, of {this token, the others} (arXiv 2602.04879). Only a move in the
    direction that A pushes leaves the region. log_ratio as for DPPOTV.
    """

    low: float = 0.05
    high: float = 0.05
    ratio_max: float = 20.0

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(p fell too far, A <= 0; p rose too far, A > 0): loss and gradient there are 0."""
        p, other, old, old_other = probabilities(log_ratio, logprobs)
        # xlogy: a token that was certain, or is, has no others to speak of.
        kl = -old * log_ratio.detach() + (
            torch.xlogy(old_other, old_other) - torch.xlogy(old_other, other)
        )
        positive = advantages > 0
        return (kl > self.low) & (p < old) & ~positive, (kl > self.high) & (p > old) & positive


def covariance(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """(A - mean A) (l - mean l)."""
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def share(fraction: float, tokens: int) -> int:
    """So many of the tokens, and at least one."""
    return max(int(fraction * tokens), 1)


def fraction_is_valid(fraction: float) -> None:
    checks.is_number("fraction", fraction)
    checks.require(0 < fraction <= 1, lambda: f"fraction must lie in (0, 1], got {fraction}")


@dataclass(frozen=True)
class ClipCov(Surrogate):
    """PPO's clip, and 0 at a few tokens of high covariance (arXiv 2505.22617).

    Of the tokens that the clip leaves and whose covariance lies between cov_low and cov_high, those
    with the highest; with a seed, any of them.

    Args:
        clip: the surrogate of the tokens that stay.
        cov_low, cov_high: of the covariance, exclusive.
        fraction: of the counted tokens, how many are dropped at most; at least one.
        seed: of the choice among the candidates; None: the highest covariances.
    """

    clip: Clip = field(default_factory=Clip)
    cov_low: float = 1.0
    cov_high: float = 5.0
    fraction: float = 2e-4
    seed: int | None = None

    token_separable = False

    def __post_init__(self) -> None:
        checks.require(
            isinstance(self.clip, Clip), lambda: f"clip must be a Clip, got {self.clip!r}"
        )
        checks.is_bound("cov_low", self.cov_low)
        checks.is_bound("cov_high", self.cov_high)
        checks.require(
            self.cov_low < self.cov_high,
            lambda: f"cov_low must be below cov_high, got {self.cov_low} and {self.cov_high}",
        )
        fraction_is_valid(self.fraction)
        if self.seed is not None:
            checks.is_integer("seed", self.seed)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        losses = self.clip(log_ratio, logprobs, advantages)
        return losses.index_fill(0, self._dropped(log_ratio, logprobs, advantages), 0.0)

    @promoting
    def clipped(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those of the clip, and among the high ones the tokens dropped."""
        low, high = self.clip.clipped(log_ratio, logprobs, advantages)
        return low, high.index_fill(0, self._dropped(log_ratio, logprobs, advantages), True)

    @promoting
    def dual_clipped(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Those of the clip."""
        return self.clip.dual_clipped(log_ratio, logprobs, advantages)

    def _dropped(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        low, high = self.clip.clipped(log_ratio, logprobs, advantages)
        cov = covariance(logprobs, advantages)
        candidates = ((cov > self.cov_low) & (cov < self.cov_high) & ~low & ~high).nonzero()[:, 0]
        if self.seed is None:
            order = cov[candidates].argsort(descending=True, stable=True)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(candidates), generator=generator).to(cov.device)
        return candidates[order[: share(self.fraction, len(cov))]]


@dataclass(frozen=True)
class KLCov(Surrogate):
    """-r A, plus coef |log_ratio| at the tokens of the highest covariance (arXiv 2505.22617).

    fraction: of the counted tokens, how many are held back; at least one.
    """

    coef: float = 1.0
    fraction: float = 2e-4

    token_separable = False

    def __post_init__(self) -> None:
        checks.is_not_negative("coef", self.coef)
        fraction_is_valid(self.fraction)

    @promoting
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        order = covariance(logprobs, advantages).argsort(descending=True, stable=True)
        held = order[: share(self.fraction, len(order))]
        losses = -torch.exp(bounded(log_ratio)) * advantages
        return losses.index_add(0, held, self.coef * log_ratio[held].abs())
