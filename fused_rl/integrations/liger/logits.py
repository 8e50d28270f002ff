"""Liger's losses and log-probabilities from logits that are already there."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import PolicyLoss, TokenBatch, TokenStats, logprobs_from_logits
from fused_rl.checks import require
from fused_rl.integrations.liger.options import Options, Reported
from fused_rl.stats import IGNORE_INDEX


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
    options = Options(
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
        loss, metrics = Reported(policy, options)(stats, batch)
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


def _per_token(
    policy: PolicyLoss, logprobs: Tensor, batch: TokenBatch
) -> tuple[Tensor, Tensor | None]:
    """The loss of each token before the mean, and its KL without beta: [N], 0 outside the mask."""
    losses = policy.token_losses(TokenStats(logprobs, torch.zeros_like(logprobs)), batch)
    if policy.kl is None:
        return losses, None
    return losses, policy.kl(logprobs, batch).where(batch.loss_mask, 0.0) / policy.kl.beta
