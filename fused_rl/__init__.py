"""Fused log-probs, entropies, KL terms and policy losses for RL on language models."""

from fused_rl.advantages import group_mean_advantages, group_zscore_advantages
from fused_rl.backends import Backend, backends
from fused_rl.batch import TokenBatch
from fused_rl.head import LMHead
from fused_rl.kl import KL, kl_penalty
from fused_rl.logprobs import TokenStats, linear_logprobs, logprobs_from_logits
from fused_rl.losses import (
    LossOutput,
    PolicyLoss,
    bnpo,
    dapo,
    dr_grpo,
    grpo,
    linear_policy_loss,
)
from fused_rl.means import FixedLengthMean, SequenceMean, TokenMean
from fused_rl.penalties import KLPenalty
from fused_rl.surrogates import Clip

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Backend",
    "Clip",
    "FixedLengthMean",
    "KLPenalty",
    "LMHead",
    "LossOutput",
    "PolicyLoss",
    "SequenceMean",
    "TokenBatch",
    "TokenMean",
    "TokenStats",
    "backends",
    "bnpo",
    "dapo",
    "dr_grpo",
    "group_mean_advantages",
    "group_zscore_advantages",
    "grpo",
    "kl_penalty",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs_from_logits",
]
