"""What verl's policy losses report, each by its own definition, over the counted tokens.

            pg_clipfrac                       pg_clipfrac_lower           ppo_kl, d the log-ratio
vanilla     beyond a bound in A's direction   A < 0 and r > clip_ratio_c  mean -d, |d| <= 20
gspo        as vanilla, r of GSPO-token       0                           mean -d
cispo       weight cut on either side         0                           as vanilla
sapo        0                                 0                           as vanilla
dppo_*      out of the trust region           in it, and r > clip_ratio_c as vanilla
geo_mean    A > 0, d beyond either bound      A < 0, d beyond either one  mean -d
clip_cov    dropped for their covariance      -                           mean -d
kl_cov      -                                 -                           mean |d|
dro         -                                 -                           mean -d
gpg         -                                 -                           -
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.policy import PolicyLoss


@dataclass(frozen=True, eq=False)
class Moved:
    """The counted tokens of a batch, [n] each, without gradient: how far they have moved.

    log_ratio is that of the token, level that of the loss's ratio.
    """

    log_ratio: Tensor
    level: Tensor
    logprobs: Tensor
    advantages: Tensor

    @classmethod
    def of(cls, policy: PolicyLoss, logprobs: Tensor, batch: TokenBatch) -> "Moved":
        """logprobs: [N], of the policy."""
        logprobs = logprobs.detach().reshape(-1).where(batch.loss_mask, 0.0)
        log_ratio = batch.log_ratio(logprobs)
        every = (log_ratio, policy.ratio(log_ratio, batch), logprobs, batch.advantages)
        return cls(*(t[batch.loss_mask] for t in every))

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.clamp(-20, 20).exp()

    def bounds(self, surrogate: Any) -> tuple[Tensor, Tensor]:
        return surrogate.clipped(self.level, self.logprobs, self.advantages)


# (verl's actor config, the loss, the tokens) -> what is reported.
Metrics = Callable[[Any, PolicyLoss, Moved], dict[str, Tensor]]


def mean(x: Tensor) -> Tensor:
    """[]: 0 for no tokens."""
    return x.float().sum() / max(len(x), 1)


def reported(
    moved: Moved, clipped: Tensor | float, lower: Tensor | float, limit: float = 20.0
) -> dict[str, Tensor]:
    """clipped, lower: [n] bool, or 0 where there is none; limit: of the log-ratios in the KL."""
    none = torch.zeros_like(moved.log_ratio)
    return {
        "actor/pg_clipfrac": mean(none + clipped),
        "actor/ppo_kl": mean(-moved.log_ratio.clamp(-limit, limit)),
        "actor/pg_clipfrac_lower": mean(none + lower),
    }


def of_clip(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    """Bounds that hold in one direction of A. The upper one where A < 0 is the dual clip's."""
    low, high = moved.bounds(policy.surrogate)
    losing = moved.advantages < 0
    return reported(moved, low | (high & ~losing), high & losing)


def of_gspo(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    low, high = moved.bounds(policy.surrogate)
    return reported(moved, low | high, 0.0, limit=torch.inf)


def of_cispo(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    low, high = moved.bounds(policy.surrogate)
    return reported(moved, low | high, 0.0)


def of_sapo(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    return reported(moved, 0.0, 0.0)


def of_trust_region(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    low, high = moved.bounds(policy.surrogate)
    outside = low | high
    return reported(moved, outside, ~outside & (moved.ratio > policy.surrogate.ratio_max))


def of_geo_mean(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    d, A = moved.log_ratio, moved.advantages
    outside = (d < -policy.ratio.low) | (d > policy.ratio.high)
    return reported(moved, outside & (A > 0), outside & (A < 0), limit=torch.inf)


def of_clip_cov(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    low, high = moved.bounds(policy.surrogate)
    kept = moved.bounds(policy.surrogate.clip)
    dropped = (low | high) & ~(kept[0] | kept[1])
    found = reported(moved, dropped, 0.0, limit=torch.inf)
    return {name: found[name] for name in ("actor/pg_clipfrac", "actor/ppo_kl")}


def of_kl_cov(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    return {"actor/ppo_kl": mean(moved.log_ratio.abs())}


def of_kl(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    return {"actor/ppo_kl": mean(-moved.log_ratio)}


def of_nothing(config: Any, policy: PolicyLoss, moved: Moved) -> dict[str, Tensor]:
    return {}
