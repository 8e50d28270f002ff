"""Scores: the reward that a policy implicitly gives a sequence, from its SequenceStats.

With S the log-prob of the sequence, n its tokens, s = S / n, r = S - R its log-ratio to the
reference:

    LogRatio(beta)               beta r                                    DPO and most of its kin
    LogRatio(beta, f')           beta f'(e^r)                              f-DPO
    MeanLogRatio(beta)           beta r / n                                IPO
    LogProb(beta)                beta S                                    CPO
    MeanLogProb(beta)            beta s                                    SimPO
    LogOdds()                    log(P / (1 - P)), P = e^s                 ORPO
    AlphaMeanLogProb(beta, a)    beta (1 - e^(-a s)) / a                   AlphaPO
    Ranked(beta)                 as LogRatio; links get it sorted          AOT

A score is called as score(stats) -> [S]; `sides` says what of the chosen and the rejected ones a
link is given, where that is not each one's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_rl import checks
from fused_rl.kl.log_ratios import held, log1mexp
from fused_rl.losses.preference.sequences import SequenceStats

__all__ = [
    "Alpha",
    "AlphaMeanLogProb",
    "ForwardKL",
    "JensenShannon",
    "LogOdds",
    "LogProb",
    "LogRatio",
    "MeanLogProb",
    "MeanLogRatio",
    "Ranked",
    "RankedMargins",
]

# The least 1 - P of odds: log-probs in float32 know no less.
LEAST_REST = 2.0**-24


def scores_of(score: Callable[[SequenceStats], Tensor], stats: SequenceStats) -> Tensor:
    """[S]: the scores, 0 of a sequence without tokens."""
    return score(stats).where(stats.length > 0, 0.0)


@dataclass(frozen=True)
class _Scaled:
    beta: float = 0.1

    def __post_init__(self) -> None:
        checks.is_positive("beta", self.beta)


@dataclass(frozen=True)
class LogRatio(_Scaled):
    """beta f'(e^r), r the log-ratio of whole sequences: the implicit reward (arXiv 2305.18290).

    derivative: f' as a function of r: ForwardKL(), JensenShannon() or Alpha(alpha) of f-DPO (arXiv
        2309.16240); None: r itself, the reverse KL.
    """

    derivative: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.derivative is not None:
            checks.is_callable("derivative", self.derivative, "fused_rl.scores.ForwardKL()")

    def __call__(self, stats: SequenceStats) -> Tensor:
        r = stats.log_ratio_to_reference()
        return self.beta * (r if self.derivative is None else self.derivative(r))


@dataclass(frozen=True)
class ForwardKL:
    """1 - e^-r: f'(e^r) of the forward KL, for f-DPO (arXiv 2309.16240). e^-r is held at e^20."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return -torch.expm1(held(-log_ratio))


@dataclass(frozen=True)
class JensenShannon:
    """log 2 + log sigmoid(r): f'(e^r) of the Jensen-Shannon divergence (arXiv 2309.16240)."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return math.log(2.0) + logsigmoid(log_ratio)


@dataclass(frozen=True)
class Alpha:
    """(e^((alpha - 1) r) - 1) / (alpha - 1): f'(e^r) of an alpha divergence (arXiv 2309.16240).

    alpha of 1: r, the reverse KL. The power is held at e^20.
    """

    alpha: float

    def __post_init__(self) -> None:
        checks.is_number("alpha", self.alpha)

    def __call__(self, log_ratio: Tensor) -> Tensor:
        power = self.alpha - 1
        return torch.expm1(held(power * log_ratio)) / power if power else log_ratio


@dataclass(frozen=True)
class MeanLogRatio(_Scaled):
    """beta r / n: the log-ratio per token, which length does not scale."""

    def __call__(self, stats: SequenceStats) -> Tensor:
        return self.beta * stats.log_ratio_to_reference() / stats.length.clamp(min=1)


@dataclass(frozen=True)
class LogProb(_Scaled):
    """beta S: the log-prob of the sequence, without a reference (CPO, arXiv 2401.08417)."""

    def __call__(self, stats: SequenceStats) -> Tensor:
        return self.beta * stats.sum


@dataclass(frozen=True)
class MeanLogProb(_Scaled):
    """beta S / n: the mean log-prob, without a reference (SimPO, arXiv 2405.14734, eq. 4)."""

    def __call__(self, stats: SequenceStats) -> Tensor:
        return self.beta * stats.mean


@dataclass(frozen=True)
class LogOdds:
    """log(P / (1 - P)) with P = e^(S / n): ORPO's odds (arXiv 2403.07691, eq. 4).

    1 - P is held at 2^-24, which float32 log-probs of a certain sequence know no less of; the
    gradient there is that at the bound.
    """

    def __call__(self, stats: SequenceStats) -> Tensor:
        s = stats.mean
        s = s + (s.clamp(max=math.log1p(-LEAST_REST)) - s).detach()
        return s - log1mexp(s)


@dataclass(frozen=True)
class AlphaMeanLogProb(_Scaled):
    """beta (1 - e^(-alpha S / n)) / alpha: AlphaPO's reward (arXiv 2501.03884).

    alpha of 0: beta S / n, SimPO's. The power is held at e^20.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.is_number("alpha", self.alpha)

    def __call__(self, stats: SequenceStats) -> Tensor:
        s = stats.mean
        if not self.alpha:
            return self.beta * s
        return self.beta * -torch.expm1(held(-self.alpha * s)) / self.alpha


@dataclass(frozen=True)
class Ranked(_Scaled):
    """beta r, of which links get sorted values: those of equal rank are compared (AOT).

    AOT, unpaired (arXiv 2406.05882): rank by rank, the chosen ones' log-ratios with the rejected
    ones', so that the chosen dominate as a distribution.
    """

    def __call__(self, stats: SequenceStats) -> Tensor:
        return self.beta * stats.log_ratio_to_reference()

    def sides(self, chosen: SequenceStats, rejected: SequenceStats) -> tuple[Tensor, Tensor]:
        """Both sorted."""
        return tuple(scores_of(self, side).sort().values for side in (chosen, rejected))


@dataclass(frozen=True)
class RankedMargins(Ranked):
    """beta r, of which links get the sorted margins of the policy and of the reference.

    AOT, paired (arXiv 2406.05882): rank by rank, S_w - S_l with R_w - R_l.
    """

    def sides(self, chosen: SequenceStats, rejected: SequenceStats) -> tuple[Tensor, Tensor]:
        """The margins of both, sorted."""
        policy = chosen.sum - rejected.sum
        reference = (
            policy - chosen.log_ratio_to_reference() + rejected.log_ratio_to_reference()
        ).detach()
        return self.beta * policy.sort().values, self.beta * reference.sort().values
