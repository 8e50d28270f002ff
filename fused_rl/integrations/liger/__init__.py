"""Liger's policy losses and divergences by name and signature, computed by this package.

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
    selected_token_ids  of the scaled cross-entropy are a ValueError
    mistakes            a label outside the vocabulary, a delta that no ratio would meet, are
                        ValueErrors

LigerFusedLinearScaledCrossEntropyTPFunction splits the vocabulary over ranks on any device, where
Liger's needs CUDA: it was held to the whole head on processes of a CPU, not to Liger's.

LigerFusedLinearJSDLoss, LigerFusedLinearJSD and LigerFusedLinearKLDivLoss are Liger's in float32,
the vocabularies being of one size. What differs:

    half precisions     logits and terms are float32, and terms whose sum would cancel are not
                        formed. From bfloat16, at a JSD of 4e-4 nats, Liger's chunked loss is
                        negative and its gradients are off by 45 %; ours by 0.2 %, their rounding
    padded vocabulary   of the teacher: a ValueError that says to give teacher_weight[:V]. Liger's
                        chunked loss gives the student logits of 0 for what it lacks; its op reads
                        the first V of the teacher's probabilities, which then do not sum to 1
    gradients           reach all that return_soft_hard_loss returns; Liger's are of the loss alone
    temperature         must be positive
"""

from fused_rl.integrations.liger.cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
    liger_fused_linear_scaled_cross_entropy_tp,
)
from fused_rl.integrations.liger.jsd import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDFunction,
    LigerFusedLinearJSDLoss,
)
from fused_rl.integrations.liger.kl_div import (
    LigerFusedLinearKLDivFunction,
    LigerFusedLinearKLDivLoss,
    liger_fused_linear_kl_div,
)
from fused_rl.integrations.liger.linear import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    liger_fused_linear_grpo,
)
from fused_rl.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss

__all__ = [
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivFunction",
    "LigerFusedLinearKLDivLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "fused_selective_log_softmax",
    "liger_fused_linear_grpo",
    "liger_fused_linear_kl_div",
    "liger_fused_linear_scaled_cross_entropy_tp",
    "triton_grpo_loss",
]
