"""Liger's options: the losses they name as compositions of ours, and what Liger reports of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import KLPenalty, Level, LossOutput, PolicyLoss, TokenBatch, TokenStats
from fused_rl.checks import require
from fused_rl.losses.means import FixedLengthMean, SequenceMean, SequenceSumMean, TokenMean
from fused_rl.losses.ratios import GeometricRatio, ProductRatio, TokenRatio
from fused_rl.losses.surrogates import CISPO, SAPO, VESPO, Clip

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")


@dataclass(frozen=True)
class _RolloutProductRatio:
    """The log-ratio of whole sequences to what sampled them: policy / old times old / rollout."""

    log_weights: Tensor  # [N], of each token's sequence

    token_separable = False

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return ProductRatio()(log_ratio, batch) + self.log_weights


@dataclass(frozen=True)
class Options:
    """What a loss of Liger's is named by, and the PolicyLoss that it is."""

    loss_type: str
    level: str
    low: float
    high: float
    beta: float
    corrected: bool
    delta: float | None
    sapo: tuple[float, float]  # temperatures where A > 0, elsewhere
    vespo: tuple[float, float, float, float]  # k, lambda where A >= 0, elsewhere

    def __post_init__(self) -> None:
        require(
            self.loss_type in _LOSS_TYPES,
            lambda: f"loss_type must be one of {', '.join(_LOSS_TYPES)}, got {self.loss_type!r}",
        )
        require(
            self.level in ("token", "sequence"),
            lambda: f"importance_sampling_level must be 'token' or 'sequence', got {self.level!r}",
        )
        require(
            self.level == "token" or self.loss_type in _CLIPPED,
            lambda: (
                "Sequence-level importance sampling is not supported: loss_type "
                f"{self.loss_type!r} has importance_sampling_level 'token' alone"
            ),
        )
        require(
            self.delta is None or self.loss_type in _CLIPPED,
            lambda: f"delta bounds no ratio of loss_type {self.loss_type!r}, got {self.delta}",
        )
        if self.loss_type == "sapo":
            sapo_temperatures(*self.sapo)

    def policy(
        self,
        batch: TokenBatch,
        length: int | None,
        num_items: float | Tensor | None,
        log_weights: Tensor | None = None,
    ) -> PolicyLoss:
        """The composition.

        Args:
            length: what dr_grpo divides by.
            num_items: counted tokens of the step, over all processes; None: of the batch.
            log_weights: [N] of VESPO, see with_rollout.
        """
        kl = None
        if self.beta and batch.ref_logprobs is not None:
            level = Level.TOKEN if self.level == "token" else Level.GEOMETRIC
            kl = KLPenalty(self.beta, importance=level if self.corrected else None)
        return PolicyLoss(
            self._surrogate, self._ratio(log_weights), kl, 0.0, self._mean(batch, length, num_items)
        )

    @property
    def _surrogate(self) -> Clip | CISPO | SAPO | VESPO:
        if self.loss_type == "cispo":
            return CISPO(0.0, self.high)
        if self.loss_type == "sapo":
            return SAPO(*self.sapo)
        if self.loss_type == "vespo":
            return VESPO(*self.vespo)
        return Clip(self.low, self.high, delta=self.delta)

    def _ratio(self, log_weights: Tensor | None):
        if self.loss_type == "vespo":
            if log_weights is None:
                return ProductRatio()
            return _RolloutProductRatio(log_weights)
        return TokenRatio() if self.level == "token" else GeometricRatio()

    def _mean(self, batch: TokenBatch, length: int | None, num_items: float | Tensor | None):
        if self.loss_type in ("grpo", "sapo"):
            return SequenceMean()
        if self.loss_type == "bnpo":
            return TokenMean()
        if self.loss_type == "luspo":
            return SequenceSumMean()
        if self.loss_type == "dr_grpo":
            require(length is not None, lambda: "loss_type 'dr_grpo' needs max_completion_length")
            return FixedLengthMean(length)
        return TokenMean(_tokens_per_process(batch, num_items))

    def with_rollout(
        self, batch: TokenBatch, weights: Tensor | None
    ) -> tuple[TokenBatch, Tensor | None]:
        """The batch with importance weights [B, T], [B, 1] or [B], or VESPO's log-weights [N]."""
        if weights is None:
            return batch, None
        B, T = batch.shape
        require(
            weights.shape in ((B, T), (B, 1), (B,)),
            lambda: (
                f"vllm_is_ratio must be [{B}, {T}], [{B}, 1] or [{B}], got {list(weights.shape)}"
            ),
        )
        once = weights.numel() == B and T != 1
        per_token = weights.detach().reshape(B, -1).expand(B, T)
        if self.loss_type != "vespo":
            return batch.with_weights(per_token), None
        log_weights = per_token.clamp(min=1e-8).log().clamp(max=20.0).reshape(-1)
        if once:
            return batch, log_weights
        return batch, batch.at_level(log_weights, Level.PRODUCT)

    def reported(self, policy: PolicyLoss, stats: TokenStats, batch: TokenBatch) -> dict:
        """Liger's metrics: the KL where beta is not 0, and the fraction of clipped tokens."""
        metrics = {}
        count = batch.num_tokens.clamp(min=1)
        logprobs = stats.logprobs.detach().reshape(-1).where(batch.loss_mask, 0.0)
        if self.beta:
            kl = policy.kl.estimate(logprobs, batch) if policy.kl else torch.zeros_like(logprobs)
            metrics["kl"] = kl.where(batch.loss_mask, 0.0).sum() / count
        metrics["clip_ratio"] = self.clipped(policy, logprobs, batch).sum() / count
        return metrics

    @torch.no_grad()
    def clipped(self, policy: PolicyLoss, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """[N] bool: beyond a bound, in the direction in which the bound holds; delta is none."""
        if self.loss_type in ("sapo", "vespo"):
            return torch.zeros_like(batch.loss_mask)
        log_ratio = policy.ratio(batch.log_ratio(logprobs), batch)
        given = (log_ratio, logprobs, batch.advantages)
        if self.loss_type == "cispo":
            _, high = CISPO(0.0, self.high).clipped(*given)
            return high & (batch.advantages > 0) & batch.loss_mask
        low, high = Clip(self.low, self.high).clipped(*given)
        return (low | high) & batch.loss_mask


@dataclass(frozen=True)
class Reported:
    """A PolicyLoss with Liger's metrics in place of its own."""

    policy: PolicyLoss
    options: Options

    @property
    def token_separable(self) -> bool:
        return self.policy.token_separable

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> LossOutput:
        metrics = self.options.reported(self.policy, stats, batch)
        return LossOutput(self.policy.objective(stats, batch), metrics)


def _tokens_per_process(batch: TokenBatch, num_items: float | Tensor | None) -> Tensor:
    """[]: counted tokens of the step divided by the number of processes, at least 1."""
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        if num_items is None:
            num_items = batch.num_tokens.clone()
            torch.distributed.all_reduce(num_items)
    like = {"dtype": batch.advantages.dtype, "device": batch.advantages.device}
    count = torch.as_tensor(batch.num_tokens if num_items is None else num_items, **like)
    return (count / world).clamp(min=1)


def sapo_temperatures(positive: float, negative: float) -> None:
    """ValueError unless both are positive."""
    for name, value in (("pos", positive), ("neg", negative)):
        require(value > 0, lambda: f"sapo_temperature_{name} must be positive, got {value}")  # noqa: B023 - called at once
