"""Over-optimisation: how far from the reference a proxy reward may be followed.

With d = sqrt(KL(policy, reference)), gold rewards (of a judge that training does not see) rise and
then fall as

    BEST_OF_N    R(d) = d (alpha - beta d)        peak at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)    peak at d = exp(alpha / beta - 1)

Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (arXiv 2210.10760,
section 3). R is relative to the reference policy, whose gold reward is the baseline.
"""

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import torch

from fused_rl import checks

__all__ = [
    "RewardCurve",
    "RewardForm",
    "fit_reward_curve",
]


class RewardForm(Enum):
    """How the gold reward depends on d: by sampling the best of n, or by RL."""

    BEST_OF_N = "best of n"
    RL = "RL"


class RewardCurve(NamedTuple):
    """baseline + R(d). Without a peak, kl_peak and reward_peak are inf."""

    form: RewardForm
    alpha: float
    beta: float
    baseline: float = 0.0

    def reward(self, kl: float) -> float:
        """The gold reward at this KL."""
        if kl == 0:
            return self.baseline
        d = math.sqrt(kl)
        loss = d if self.form is RewardForm.BEST_OF_N else math.log(d)
        return self.baseline + d * (self.alpha - self.beta * loss)

    @property
    def kl_peak(self) -> float:
        """The KL at which the gold reward is highest."""
        if self.beta <= 0:
            return math.inf
        if self.form is RewardForm.BEST_OF_N:
            return max(self.alpha / (2 * self.beta), 0.0) ** 2
        exponent = 2 * (self.alpha / self.beta - 1)
        return math.exp(exponent) if exponent < 700 else math.inf

    @property
    def reward_peak(self) -> float:
        """The gold reward there."""
        return math.inf if math.isinf(self.kl_peak) else self.reward(self.kl_peak)

    def kl_budget(self, fraction: float = 0.5) -> float:
        """Where to stop: a fraction of kl_peak. By these forms half of it keeps 91% (BEST_OF_N) or
        95% (RL) of the peak's gain, and leaves room for errors of the fit and of the KL. Real
        curves differ: `fused-rl study overoptimisation` finds some 85 % for RL."""
        return fraction * self.kl_peak


def fit_reward_curve(
    kl: Sequence[float],
    gold_rewards: Sequence[float],
    *,
    form: RewardForm = RewardForm.RL,
    baseline: float | None = None,
) -> RewardCurve:
    """alpha and beta by least squares, from checkpoints of a run.

    Args:
        kl: of each checkpoint, in nats: of whole sequences, or per token, which moves the peak by
            the same factor.
        gold_rewards: of each checkpoint.
        baseline: the gold reward of the reference policy; None: fitted too.

    Raises:
        ValueError: lengths that differ; a KL below 0; anything not finite; fewer different positive
            KLs than there is to fit.
    """
    kl, gold_rewards = _numbers("kl", kl), _numbers("gold_rewards", gold_rewards)
    checks.require(
        len(kl) == len(gold_rewards),
        lambda: f"kl and gold_rewards must be as many, got {len(kl)} and {len(gold_rewards)}",
    )
    checks.is_one_of("form", form, RewardForm)
    if baseline is not None:
        checks.is_number("baseline", baseline)
    pairs = list(zip(kl, gold_rewards, strict=True))
    for x, y in pairs:
        checks.require(
            x >= 0 and math.isfinite(x) and math.isfinite(y),
            lambda x=x, y=y: f"kl must be at least 0 and all be finite, got kl {x}, reward {y}",
        )
    unknowns = 2 if baseline is not None else 3
    checks.require(
        len({x for x, _ in pairs if x > 0}) >= unknowns,
        lambda: f"a fit of {unknowns} numbers needs as many positive KLs, got {list(kl)}",
    )
    # Whatever the default device: a few numbers, in a float64 that not every device has.
    x, rewards = torch.tensor(pairs, dtype=torch.float64, device="cpu").unbind(-1)
    d = x.sqrt()
    loss = d * d if form is RewardForm.BEST_OF_N else torch.xlogy(d, d)
    columns = torch.stack([d, -loss, torch.ones_like(d)], dim=-1)[:, :unknowns]
    target = rewards - (baseline or 0.0)
    alpha, beta, *start = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0].tolist()
    return RewardCurve(form, alpha, beta, start[0] if start else baseline)


def _numbers(name: str, values: object) -> list[float]:
    """As floats, be they in a list, a tensor or an array."""
    checks.require(
        isinstance(values, Iterable), lambda: f"{name} must be numbers, got {checks.shown(values)}"
    )
    numbers = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
    for i, number in enumerate(numbers):
        checks.is_real(f"{name}[{i}]", number)
    return [float(number) for number in numbers]
