"""Surrogates: the policy-gradient term of one token, from its log-ratio and its advantage.

Each is called as surrogate(log_ratio, logprobs, advantages) -> [N], to be minimised. `clipped`
says which tokens a bound has taken out of the gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def bounded(log_ratio: Tensor, bound: float = 20.0) -> Tensor:
    """log_ratio within +-bound, so that its exp is finite; the gradient is that of the identity."""
    return log_ratio + (log_ratio.clamp(-bound, bound) - log_ratio).detach()


@dataclass(frozen=True)
class Clip:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log_ratio): PPO (arXiv 1707.06347, eq. 7).

    low and high may differ: "clip-higher" of DAPO (arXiv 2503.14476, eq. 10).
    """

    low: float = 0.2
    high: float = 0.2

    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(bounded(log_ratio))
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """(below 1 - low while A < 0, above 1 + high while A > 0): the gradient there is 0."""
        ratio = torch.exp(bounded(log_ratio))
        low = (ratio < 1 - self.low) & (advantages < 0)
        high = (ratio > 1 + self.high) & (advantages > 0)
        return low, high
