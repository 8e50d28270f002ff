"""Liger's policy losses, preference losses and divergences by name and signature, computed here.

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
    scaled CE           entropies are float32, of half precision too
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

LigerFusedLinearDPOLoss, -CPOLoss, -SimPOLoss, -ORPOLoss and -KTOLoss are Liger's to 1e-5 in
float32, in value, gradients and what they return beside it. LigerFusedLinearSimPOLoss adds the NLL
of the chosen to SimPO, with a weight of 1 beside a beta of 0.1, unless it is given
compute_nll_loss=False: Liger's default, which is kept, and not its function's. What differs:

    empty completion    has score 0. Wherever log-probs are averaged (SimPO, ORPO, average_log_prob)
                        one of them makes Liger's loss and the head's gradients NaN; chosen ones
                        without any token do in CPO and DPO, even without an NLL
    certain completion  of ORPO, a mean log-prob that is 0 in float32: its odds are held at 2^24.
                        Liger's are infinite and its gradients NaN
    "discopop"          of a pair that is lost by more than 88: linear. Liger's is NaN
    "ipo"               is there; Liger's raises
    label_smoothing     of a loss_type that does not know it is a ValueError; Liger's ignores it
    kl of KTO           may be one number per sequence. Liger takes each from every sequence where
                        chunks are of one: of 6 sequences the loss is 6 times as large
    KTO, saturated      sigmoid(-x), not 1 - sigmoid(x): of rewards of -8 Liger's gradients are off
                        by 2e-5, ours by 1e-7
    bfloat16            logits are float32. Of 1024 tokens and 2000 vocabulary entries Liger's
                        log-probs are off by 0.3 nats, of 4096 by 1.3; ours by 5e-5 before they are
                        returned as float32. dweight is rounded once: of 64 pairs it is off by
                        0.24 %, Liger's, added up pair by pair, by 0.74 %
    float64             is float64; Liger's is float32
    padding             may hold NaN, which then is in the means of logits alone: these are Liger's,
                        over padding too, and no logits are formed for them
    odd sequences       of losses of pairs are a ValueError; Liger compares one with several
"""

from fused_rl.integrations.liger.cpo import (
    LigerFusedLinearCPOFunction,
    LigerFusedLinearCPOLoss,
    LigerFusedLinearSimPOFunction,
    LigerFusedLinearSimPOLoss,
    liger_fused_linear_cpo,
    liger_fused_linear_simpo,
)
from fused_rl.integrations.liger.cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
    liger_fused_linear_scaled_cross_entropy_tp,
)
from fused_rl.integrations.liger.dpo import (
    LigerFusedLinearDPOFunction,
    LigerFusedLinearDPOLoss,
    liger_fused_linear_dpo,
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
from fused_rl.integrations.liger.kto import (
    LigerFusedLinearKTOFunction,
    LigerFusedLinearKTOLoss,
    liger_fused_linear_kto,
)
from fused_rl.integrations.liger.linear import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    liger_fused_linear_grpo,
)
from fused_rl.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss
from fused_rl.integrations.liger.orpo import (
    LigerFusedLinearORPOFunction,
    LigerFusedLinearORPOLoss,
    liger_fused_linear_orpo,
)

__all__ = [
    "LigerFusedLinearCPOFunction",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOFunction",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivFunction",
    "LigerFusedLinearKLDivLoss",
    "LigerFusedLinearKTOFunction",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOFunction",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "LigerFusedLinearSimPOFunction",
    "LigerFusedLinearSimPOLoss",
    "fused_selective_log_softmax",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_kl_div",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_scaled_cross_entropy_tp",
    "liger_fused_linear_simpo",
    "triton_grpo_loss",
]
