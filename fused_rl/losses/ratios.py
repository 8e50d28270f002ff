"""Levels at which policy and old policy are compared, as (log_ratio, batch) -> [N].

With d = logprobs - old_logprobs at the counted tokens of a sequence of T, sg = without gradient:

    TokenRatio             d[t]
    GeometricRatio          sum d / T
    GeometricTokenRatio     sg(sum d / T) + d[t] - sg(d[t])
    ProductRatio       sum d
    ClippedGeometricRatio   sum clip(d) / T

Every token holds the number of its sequence, and its gradient reaches all tokens of the sequence.
Sequences are those of the batch, padded or packed; tokens that do not count hold a number too, and
contribute none. Sums are float32, or float64 for float64 log-ratios.
"""

from dataclasses import dataclass

from torch import Tensor

from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.sequences import Level
from fused_rl.losses.surrogates import is_clip
from fused_rl.reference import promoted

__all__ = [
    "ClippedGeometricRatio",
    "GeometricRatio",
    "GeometricTokenRatio",
    "ProductRatio",
    "TokenRatio",
]


@dataclass(frozen=True)
class TokenRatio:
    """The log-ratio of each token by itself."""

    token_separable = True

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return log_ratio


@dataclass(frozen=True)
class GeometricRatio:
    """The mean log-ratio of a sequence: its geometric mean ratio, GSPO (arXiv 2507.18071)."""

    token_separable = False

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return batch.at_level(log_ratio, Level.GEOMETRIC)


@dataclass(frozen=True)
class GeometricTokenRatio:
    """The sequence's value, the token's gradient: GSPO-token (arXiv 2507.18071).

    With equal advantages in a sequence its gradient is GeometricRatio's; it is meant for others.
    """

    token_separable = False

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        value = batch.at_level(log_ratio, Level.GEOMETRIC).detach()
        return value + (log_ratio - log_ratio.detach())


@dataclass(frozen=True)
class ProductRatio:
    """The log-ratio of whole sequences, the exact importance weight: RLOO (arXiv 2402.14740)."""

    token_separable = False

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return batch.at_level(log_ratio, Level.PRODUCT)


@dataclass(frozen=True)
class ClippedGeometricRatio:
    """The mean of clipped log-ratios: GMPO (arXiv 2507.20673), with the surrogate -r A.

    A log-ratio counts as at most `high` where A > 0, and as at least -low where A < 0; what is cut
    has no gradient. Bounds are of the log-ratio.
    """

    low: float = 0.4
    high: float = 0.4

    token_separable = False

    def __post_init__(self) -> None:
        is_clip(self.low, self.high)

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        (log_ratio,) = promoted(log_ratio)
        above = log_ratio.clamp(max=self.high).where(batch.advantages > 0, log_ratio)
        clipped = log_ratio.clamp(min=-self.low).where(batch.advantages < 0, above)
        return batch.at_level(clipped, Level.GEOMETRIC)

    def clipped(self, log_ratio: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(below -low while A < 0, above high while A > 0): the token has no gradient there."""
        (log_ratio,) = promoted(log_ratio)
        low = (log_ratio < -self.low) & (batch.advantages < 0)
        return low, (log_ratio > self.high) & (batch.advantages > 0)
