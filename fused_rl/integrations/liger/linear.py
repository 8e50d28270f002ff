"""Liger's losses straight from hidden states."""

import inspect
import warnings

import torch
from torch import Tensor

from fused_rl import LMHead, TokenBatch, linear_logprobs, linear_policy_loss
from fused_rl.checks import require
from fused_rl.integrations.liger.options import Options, Reported, sapo_temperatures
from fused_rl.stats import IGNORE_INDEX


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
        options = Options(
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
        # Positional callers of an older Liger have a flag here; +True is 1, as it is to Liger.
        temperature = +temperature
        mask = attention_mask != 0
        if use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "ref_per_token_logps and ref_input are both given. Using ref_per_token_logps.",
                stacklevel=2,
            )
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
            _input, LMHead(weight, bias), batch, Reported(policy, options), temperature=temperature
        )
        return loss, tuple(metrics.values())


liger_fused_linear_grpo = LigerFusedLinearGRPOFunction.apply
"""Liger's name for it among its functions."""


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
        sapo_temperatures(sapo_temperature_pos, sapo_temperature_neg)
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
