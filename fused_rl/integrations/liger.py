"""Liger's policy losses by name and signature, computed by this package.

For code that uses liger-kernel one import changes:

    from fused_rl.integrations.liger import LigerFusedLinearGRPOLoss

    loss_fn = LigerFusedLinearGRPOLoss(beta=0.04, loss_type="dapo", use_ref_model=True)
    loss, metrics = loss_fn(
        hidden,
        lm_head.weight,
        completion_ids,
        completion_mask,
        advantages,
        ref_per_token_logps=ref_logprobs,
        old_per_token_logps=old_logprobs,
    )
    loss.backward()

Signatures and defaults are those of liger-kernel 0.8.5, which is not needed. Values and gradients
are Liger's wherever its formula is the one its name promises; where it is not they are the
formula's. What differs:

    masked tokens       count nowhere: not in luspo, which Liger averages over padding, not in
                        VESPO's rollout weights, and whatever numbers they hold
    "luspo"             mean over sequences of token sums, at both levels and with a KL too
    log-ratios          are held within +-20 before any exp
    advantages          may be one per token, in all losses
    logits              are never written to: `inplace` is accepted and means nothing, as are
                        `compiled` and `chunk_size`
    gradients           reach every output that requires one, per_token_kl among them
    mistakes            a label outside the vocabulary, a delta that no ratio would meet, are
                        ValueErrors
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import (
    CISPO,
    SAPO,
    VESPO,
    Clip,
    FixedLengthMean,
    FullProductRatio,
    KLPenalty,
    Level,
    LMHead,
    LossOutput,
    PolicyLoss,
    SequenceMean,
    SequenceRatio,
    SequenceSumMean,
    TokenBatch,
    TokenMean,
    TokenRatio,
    TokenStats,
    linear_logprobs,
    linear_policy_loss,
    logprobs_from_logits,
)
from fused_rl.checks import require
from fused_rl.logprobs import IGNORE_INDEX

__all__ = [
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "fused_selective_log_softmax",
    "triton_grpo_loss",
]

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_LOSS_TYPES = (*_CLIPPED, "cispo", "sapo", "vespo")


@dataclass(frozen=True)
class _RolloutProductRatio:
    """The log-ratio of whole sequences to what sampled them: policy / old times old / rollout."""

    log_weights: Tensor  # [N], of each token's sequence

    token_separable = False

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return FullProductRatio()(log_ratio, batch) + self.log_weights


@dataclass(frozen=True)
class _Options:
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
            lambda: f"loss_type {self.loss_type!r} has importance_sampling_level 'token' alone",
        )
        require(
            self.delta is None or self.loss_type in _CLIPPED,
            lambda: f"delta bounds no ratio of loss_type {self.loss_type!r}, got {self.delta}",
        )
        _sapo_temperatures(*self.sapo)

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
        others = {
            "cispo": CISPO(0.0, self.high),
            "sapo": SAPO(*self.sapo),
            "vespo": VESPO(*self.vespo),
        }
        if self.loss_type in others:
            return others[self.loss_type]
        return Clip(self.low, self.high, delta=self.delta)

    def _ratio(self, log_weights: Tensor | None):
        if self.loss_type == "vespo":
            if log_weights is None:
                return FullProductRatio()
            return _RolloutProductRatio(log_weights)
        return TokenRatio() if self.level == "token" else SequenceRatio()

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
        return batch, batch.at_level(log_weights, Level.SEQUENCE)

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
        bounds = Clip(self.low, self.high)
        if self.loss_type == "cispo":
            bounds = Clip(torch.inf, self.high - 1)
        low, high = bounds.clipped(_log_ratio(policy, logprobs, batch), logprobs, batch.advantages)
        return (low | high) & batch.loss_mask


@dataclass(frozen=True)
class _Reported:
    """A PolicyLoss with Liger's metrics in place of its own."""

    policy: PolicyLoss
    options: _Options

    @property
    def token_separable(self) -> bool:
        return self.policy.token_separable

    def objective(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.policy.objective(stats, batch)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> LossOutput:
        metrics = self.options.reported(self.policy, stats, batch)
        return LossOutput(self.objective(stats, batch), metrics)


class LigerFusedLinearGRPOFunction:
    """The function behind LigerFusedLinearGRPOLoss, as apply() of 31 positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of the module, from hidden states; gradients of _input, weight and bias.

        Args:
            _input: [B, T, H]; weight: [V, H]; bias: [V] or None.
            selected_token_ids: [B, T] int64; attention_mask: [B, T], 0 does not count.
            advantages: [B] or [B, T].
            ref_per_token_logps, old_per_token_logps: [B, T] or None.
            ref_input, ref_weight, ref_bias: as the first three, of the reference model; used where
                ref_per_token_logps is None.
            vllm_is_ratio: [B, T], [B, 1] or [B], multiplies the policy term.

        Returns:
            (loss [], metrics): (KL [], clip ratio []) where beta is not 0, else (clip ratio [],).

        Raises:
            ValueError: options that do not go together; tensors that do not fit; a KL penalty
                without a reference.
        """
        options = _Options(
            loss_type,
            importance_sampling_level,
            epsilon_low,
            epsilon_high,
            beta,
            use_bias_correction_kl,
            delta,
            (sapo_temperature_pos, sapo_temperature_neg),
            (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        )
        mask = attention_mask != 0
        if not (use_ref_model and beta):
            ref_per_token_logps = None
        elif ref_per_token_logps is None:
            require(
                ref_input is not None and ref_weight is not None,
                lambda: "use_ref_model needs ref_per_token_logps, or ref_input and ref_weight",
            )
            with torch.no_grad():
                ref_per_token_logps = linear_logprobs(
                    ref_input,
                    LMHead(ref_weight, ref_bias),
                    selected_token_ids.where(mask, IGNORE_INDEX),
                    temperature=temperature,
                ).logprobs
        batch = TokenBatch.padded(
            selected_token_ids,
            mask,
            advantages,
            old_logprobs=old_per_token_logps,
            ref_logprobs=ref_per_token_logps,
        )
        batch, log_weights = options.with_rollout(batch, vllm_is_ratio)
        policy = options.policy(batch, max_completion_length, num_items_in_batch, log_weights)
        loss, metrics = linear_policy_loss(
            _input, LMHead(weight, bias), batch, _Reported(policy, options), temperature=temperature
        )
        return loss, tuple(metrics.values())


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its relatives straight from hidden states: linear_policy_loss by Liger's options.

    Args:
        beta: weight of the k3 KL penalty.
        compiled, chunk_size: accepted; they change nothing here.
        use_ref_model: False: no KL, whatever beta.
        epsilon_low, epsilon_high: bounds of the ratio; of "cispo", epsilon_high is the bound of the
            ratio itself.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: what "dr_grpo" divides by.
        importance_sampling_level: "token" or "sequence".
        sapo_temperature_pos, sapo_temperature_neg: of "sapo", where A > 0 and elsewhere.
        temperature: what the tokens were sampled at.
        delta: upper bound of the unclipped ratio (two-sided clipping), or None.
        use_bias_correction_kl: multiplies the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo", by the sign of A.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        _sapo_temperatures(sapo_temperature_pos, sapo_temperature_neg)
        require(delta is None or delta > 0, lambda: f"delta must be positive, got {delta}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss [], metrics); arguments as LigerFusedLinearGRPOFunction.apply has them."""
        return LigerFusedLinearGRPOFunction.apply(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **{name: getattr(self, name) for name in _SETTINGS},
        )


_SETTINGS = tuple(inspect.signature(LigerFusedLinearGRPOLoss).parameters)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """GRPO and its relatives from logits that are already there.

    Args:
        logits: [B, L + 1, V]; the last column, which predicts a token not yet there, is not used.
        old_logp, ref_logp: [B, L] or None.
        completion_ids: [B, L] int64.
        advantages: [B] or [B, L].
        completion_mask: [B, L], 0 does not count; None: all count.
        temperature, eps_high: mind the defaults, which are Liger's.
        inplace: accepted; logits are never written to.
        max_completion_length: what "dr_grpo" divides by; None: L.
        reduce: whether the loss is reduced.
        vllm_is_ratio: [B, L], [B, 1] or [B].
        All others: as of LigerFusedLinearGRPOLoss.

    Returns:
        reduce: (loss [], metrics), [KL [], clip ratio []] where beta is not 0, else [clip ratio].
        otherwise: (loss, KL or None where beta is 0, clipped), each [B, L] and 0 outside the mask.

    Raises:
        ValueError: options that do not go together; tensors that do not fit; a KL penalty without
            ref_logp.
    """
    options = _Options(
        loss_type,
        importance_sampling_level,
        eps_low,
        eps_high,
        beta,
        use_bias_correction_kl,
        delta,
        (sapo_temperature_pos, sapo_temperature_neg),
        (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )
    require(not beta or ref_logp is not None, lambda: f"beta is {beta}, but ref_logp is None")
    if completion_mask is None:
        completion_mask = torch.ones_like(completion_ids)
    mask = completion_mask != 0
    batch = TokenBatch.padded(
        completion_ids,
        mask,
        advantages,
        old_logprobs=old_logp,
        ref_logprobs=ref_logp if beta else None,
    )
    batch, log_weights = options.with_rollout(batch, vllm_is_ratio)
    length = batch.shape[1] if max_completion_length is None else max_completion_length
    policy = options.policy(batch, length, num_items_in_batch, log_weights)
    stats = _completion_stats(logits, completion_ids, mask, temperature)
    if reduce:
        loss, metrics = _Reported(policy, options)(stats, batch)
        return loss, list(metrics.values())
    logprobs = stats.logprobs.reshape(-1)
    loss, kl = _per_token(policy, logprobs, batch)
    clipped = options.clipped(policy, logprobs, batch).to(loss.dtype)
    return tuple(None if t is None else t.reshape(batch.shape) for t in (loss, kl, clipped))


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities [B, L] of the last L input_ids, without gradients; 0 where mask is 0.

    Args:
        logits: [B, L + 1, V]; the last column is not used.
        input_ids: [B, >= L] int64; the last L columns are those that logits predict.
        temperature: mind the default, which is Liger's.
        mask: [B, >= L] or None: its last L columns.

    Raises:
        ValueError: shapes and dtypes that do not fit.
    """
    L = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - L :]
    counted = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - L :]
    return _completion_stats(logits, ids, counted != 0, temperature).logprobs


def _completion_stats(logits: Tensor, ids: Tensor, mask: Tensor, temperature: float) -> TokenStats:
    """Of ids [B, L] by logits [B, L + 1, V]; the last column is ignored, not cut off by a copy."""
    labels = pad(ids.where(mask, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)
    stats = logprobs_from_logits(logits, labels, temperature=temperature)
    return TokenStats(*(t[:, :-1] for t in stats))


def _log_ratio(policy: PolicyLoss, logprobs: Tensor, batch: TokenBatch) -> Tensor:
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    return policy.ratio(logprobs - old, batch)


def _per_token(
    policy: PolicyLoss, logprobs: Tensor, batch: TokenBatch
) -> tuple[Tensor, Tensor | None]:
    """The loss of each token before the mean, and its KL without beta: [N], 0 outside the mask."""
    losses = policy.token_losses(TokenStats(logprobs, torch.zeros_like(logprobs)), batch)
    if policy.kl is None:
        return losses, None
    return losses, policy.kl(logprobs, batch).where(batch.loss_mask, 0.0) / policy.kl.beta


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


def _sapo_temperatures(positive: float, negative: float) -> None:
    for name, value in (("pos", positive), ("neg", negative)):
        require(value > 0, lambda: f"sapo_temperature_{name} must be positive, got {value}")  # noqa: B023 - called at once
