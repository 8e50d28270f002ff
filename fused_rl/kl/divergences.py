"""Divergences between two distributions over a vocabulary: the student's s and the teacher's t.

    REVERSE           KL(s||t) = sum_v s log(s / t)
    FORWARD           KL(t||s) = sum_v t log(t / s)
    JSD(beta)         beta KL(t||m) + (1 - beta) KL(s||m),  m = (1 - beta) s + beta t
    ALPHA(a)          (sum_v s^a t^(1 - a) - 1) / (a (a - 1))
    CHI_SQUARE        sum_v (s - t)^2 / t            2 ALPHA(2)
    HELLINGER         1/2 sum_v (sqrt(s) - sqrt(t))^2    ALPHA(1/2) / 4
    TOTAL_VARIATION   1/2 sum_v |s - t|

All are 0 where s = t, and positive elsewhere. JSD(0) is FORWARD and JSD(1) is REVERSE, as in every
trainer, although the formula's own limit is 0; ALPHA(0) is FORWARD and ALPHA(1) is REVERSE, which
are its limits. Where an entry has t = 0 and s > 0, REVERSE, CHI_SQUARE and ALPHA(a >= 1) are
infinite; where it has s = 0 and t > 0, FORWARD and ALPHA(a <= 0) are.
Sources: S. Amari, "Alpha-divergence is unique" (2009), for ALPHA; Agarwal et al., "On-policy
distillation of language models" (arXiv 2306.13649), for JSD and its ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fused_rl import checks, ops, reference

KINDS = tuple(range(reference.REVERSE, reference.TOTAL_VARIATION + 1))


@dataclass(frozen=True)
class Divergence:
    """Which divergence, of the module's table: Divergence.REVERSE, Divergence.JSD(0.5), and so on.

    Attributes:
        kind: the number of its slopes in reference.py.
        parameter: beta or alpha, or 0.
        factor: what the slopes are multiplied by.
    """

    kind: int
    parameter: float = 0.0
    factor: float = 1.0

    REVERSE: ClassVar[Divergence]
    FORWARD: ClassVar[Divergence]
    CHI_SQUARE: ClassVar[Divergence]
    HELLINGER: ClassVar[Divergence]
    TOTAL_VARIATION: ClassVar[Divergence]

    def __post_init__(self) -> None:
        checks.is_integer("kind", self.kind)
        checks.require(self.kind in KINDS, lambda: f"kind must be one of {KINDS}, got {self.kind}")
        checks.is_number("parameter", self.parameter)
        checks.is_positive("factor", self.factor)

    @classmethod
    def JSD(cls, beta: float) -> Divergence:
        """Generalised Jensen-Shannon; FORWARD for 0, REVERSE for 1.

        Raises:
            ValueError: beta outside [0, 1].
        """
        checks.is_number("beta", beta)
        checks.require(0 <= beta <= 1, lambda: f"beta must be in [0, 1], got {beta}")
        ends = {0.0: cls.FORWARD, 1.0: cls.REVERSE}
        return ends.get(float(beta)) or cls(reference.JSD, float(beta))

    @classmethod
    def ALPHA(cls, a: float) -> Divergence:
        """Amari's alpha-divergence; FORWARD for 0, REVERSE for 1.

        Raises:
            ValueError: a that is no finite number.
        """
        checks.is_number("a", a)
        limits = {0.0: cls.FORWARD, 1.0: cls.REVERSE}
        return limits.get(float(a)) or cls(reference.ALPHA, float(a))

    def terms(self, logs: Tensor, logt: Tensor) -> Tensor:
        """c(s, t) of each entry, from log-probabilities of one shape and dtype, [...] each.

        Differentiable in both; 0 where both are -inf, and inf with a finite gradient where a term
        is infinite.
        """
        pair = ops.LogPair(logs, logt, self.kind, self.parameter, self.factor)
        return ops.divergence_terms(pair).value


Divergence.REVERSE = Divergence(reference.REVERSE)
Divergence.FORWARD = Divergence(reference.FORWARD)
Divergence.CHI_SQUARE = Divergence(reference.ALPHA, 2.0, 2.0)
Divergence.HELLINGER = Divergence(reference.ALPHA, 0.5, 0.25)
Divergence.TOTAL_VARIATION = Divergence(reference.TOTAL_VARIATION)
