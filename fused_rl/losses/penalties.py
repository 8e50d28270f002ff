"""KLPenalty: the KL term of a policy loss, one number per token.

With d = logprobs - ref_logprobs, k the estimator, n the counted tokens of a token's sequence and
w the importance ratio of the current policy to the one that sampled:

    token level       beta * w * k(d)
    product level     beta * w * k(sum of d over the sequence) / n

    exact             beta * w * D

With D the divergence of the two distributions at the token, over the whole vocabulary, which takes
the reference's hidden states: linear_policy_loss(..., reference=...).

At either level the terms of a sequence add up to its estimate, so one mean serves both. A mean that
divides by a constant (TokenMean, FixedLengthMean) keeps the direction of the KL; SequenceMean
divides each sequence's estimate by its length.

Which of them has the expected gradient of which divergence: tests/test_expected_gradients.py.
Sources: "A comedy of estimators" (arXiv 2512.21852) for the levels; DeepSeek-V3.2 (arXiv
2512.02556, section 3.1) for the importance ratio.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.divergences import Divergence
from fused_rl.kl.estimators import KL, kl_penalty
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses.batch import TokenBatch, outside_inference
from fused_rl.losses.sequences import Level
from fused_rl.losses.surrogates import bounded
from fused_rl.reference import acc_dtype

__all__ = [
    "KLPenalty",
]


@dataclass(frozen=True)
class KLPenalty:
    """The KL towards the reference, weighted by beta; see the module's formulas.

    Args:
        beta: a number, or a tensor [] whose value may be changed between steps.
        value: the estimator whose value is formed.
        grad: the estimator whose derivative is used; None: that of value.
        level: TOKEN, or PRODUCT for the estimator of the log-ratio of whole sequences, the sum.
        importance: at which level the ratio to batch.old_logprobs is formed that multiplies the
            estimate; None: no ratio. The level PRODUCT corrects all of off-policy sampling, TOKEN
            that of the token but not of its prefix. Without old_logprobs the ratio is 1. Above
            exp(20) it is held there.
        attached: whether the ratio has a gradient too, which adds that of the sampling; on-policy
            it does so although the ratio is 1.
        exact: the divergence that takes the place of the estimate, Divergence.REVERSE or any other;
            value then says what the metric `kl` estimates beside it. None: the estimate.
    """

    beta: float | Tensor
    value: KL = KL.K3
    grad: KL | None = None
    level: Level = Level.TOKEN
    importance: Level | None = None
    attached: bool = True
    exact: Divergence | None = None

    def __post_init__(self) -> None:
        checks.is_weight("beta", self.beta)
        checks.is_one_of("kl (value)", self.value, KL)
        if self.grad is not None:
            checks.is_one_of("kl_grad (grad)", self.grad, KL)
        checks.require(
            self.level in (Level.TOKEN, Level.PRODUCT),
            lambda: f"level must be Level.TOKEN or Level.PRODUCT, got {self.level!r}",
        )
        checks.require(
            self.importance is None or isinstance(self.importance, Level),
            lambda: f"importance must be a Level or None, got {self.importance!r}",
        )
        checks.require(
            self.level is Level.TOKEN or self.importance is not Level.TOKEN,
            lambda: "a KL of whole sequences has no ratio per token: give importance another level",
        )
        checks.require(
            self.exact is None or isinstance(self.exact, Divergence),
            lambda: f"exact must be a Divergence or None, got {checks.shown(self.exact)}",
        )
        checks.require(
            self.exact is None or (self.level is Level.TOKEN and self.grad is None),
            lambda: (
                "an exact divergence is that of each token, with a gradient of its own: leave "
                "level and kl_grad (grad) alone"
            ),
        )
        # Plain strings for torch.compile: it does not guard an enum member in an attribute if it
        # has met the same member as a global before, and would run this penalty as another.
        importance = None if self.importance is None else self.importance.value
        object.__setattr__(self, "_levels", (self.level.value, importance))

    @property
    def token_separable(self) -> bool:
        """Whether a token's penalty depends on no other token."""
        return self.level is Level.TOKEN and self.importance in (None, Level.TOKEN)

    def __call__(
        self, logprobs: Tensor, batch: TokenBatch, divergence: Tensor | None = None
    ) -> Tensor:
        """[N], from logprobs [N]; 0 outside loss_mask. What is not known is as in log_ratios.py.

        divergence: [N], of DivergenceStats, where the penalty is exact.

        Raises:
            ValueError: a batch without ref_logprobs, or an exact penalty without a divergence; as
                kl_penalty raises.
        """
        logprobs = logprobs.where(batch.loss_mask, 0.0)
        if self.exact is None:
            return self.with_estimate(logprobs, batch)[0]
        checks.require(
            divergence is not None,
            lambda: (
                "this loss has an exact KL penalty, but there is no divergence: give "
                "linear_policy_loss its reference=(ref_hidden, ref_head)"
            ),
        )
        _, importance = self._levels
        terms = self._beta * divergence.where(batch.loss_mask, 0.0)
        return terms if importance is None else self._ratio(logprobs, batch, importance) * terms

    def estimate(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """The estimate, without beta and without gradient, for monitoring."""
        with torch.no_grad():
            return self._terms(logprobs.where(batch.loss_mask, 0.0), batch)

    def with_estimate(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The penalty and its estimate, formed once; logprobs [N] are 0 outside loss_mask."""
        terms = self._terms(logprobs, batch)
        return self._beta * terms, terms.detach()

    @property
    def _beta(self) -> float | Tensor:
        return outside_inference(self.beta) if isinstance(self.beta, Tensor) else self.beta

    def _terms(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        if batch.ref_logprobs is None:
            raise ValueError("this loss has a KL penalty, but the batch has no ref_logprobs")
        _, importance = self._levels
        dtype = acc_dtype(logprobs, batch.ref_logprobs)
        # The gradient of an attached ratio adds k to its slope. k3 and its slope are each exp(-d)
        # where d is far below 0, and their sum is d: float32 would lose it from 15 nats on.
        wide = dtype if importance is None or not self.attached else torch.float64
        return self._estimates(logprobs.to(wide), batch).to(dtype)

    def _estimates(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        level, importance = self._levels
        weight = None if importance is None else self._ratio(logprobs, batch, importance)
        if level == "token":
            return self._kl(logprobs, batch.ref_logprobs, weight)
        total = batch.at_level(log_ratio(logprobs, batch.ref_logprobs), Level.PRODUCT)
        tokens = batch.at_level(torch.ones_like(total), Level.PRODUCT).clamp(min=1)
        return batch.loss_mask / tokens * self._kl(total, torch.zeros_like(total), weight)

    def _kl(self, logprobs: Tensor, ref_logprobs: Tensor, weight: Tensor | None) -> Tensor:
        return kl_penalty(logprobs, ref_logprobs, value=self.value, grad=self.grad, weight=weight)

    def _ratio(self, logprobs: Tensor, batch: TokenBatch, level: str) -> Tensor:
        ratio = torch.exp(bounded(batch.at_level(batch.log_ratio(logprobs), Level(level))))
        return ratio if self.attached else ratio.detach()
