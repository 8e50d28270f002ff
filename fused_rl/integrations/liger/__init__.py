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
    selected_token_ids  of the scaled cross-entropy are a ValueError, and it has no
                        tensor-parallel variant
    mistakes            a label outside the vocabulary, a delta that no ratio would meet, are
                        ValueErrors
"""

from fused_rl.integrations.liger.cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
from fused_rl.integrations.liger.linear import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    liger_fused_linear_grpo,
)
from fused_rl.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss

__all__ = [
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "fused_selective_log_softmax",
    "liger_fused_linear_grpo",
    "triton_grpo_loss",
]
