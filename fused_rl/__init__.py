"""Fused log-probs, entropies, KL terms and policy losses for RL on language models."""

import torch

from fused_rl import ops_cuda as _ops_cuda  # noqa: F401 - registers the kernels for CUDA
from fused_rl.backends import Backend, backends
from fused_rl.checkout import find_kernels as _find_kernels
from fused_rl.head import LMHead
from fused_rl.kept import KeptStats, linear_kept_logprobs
from fused_rl.kl import KL, kl_penalty
from fused_rl.logprobs import linear_logprobs, linear_top_logprobs, logprobs_from_logits
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import (
    FixedLengthMean,
    LengthWeightedMean,
    RolloutMean,
    SequenceMean,
    SequenceSumMean,
    TokenMean,
    TokenSum,
)
from fused_rl.losses.named import (
    aspo,
    bnpo,
    cispo,
    clip_cov,
    dapo,
    dppo,
    dr_grpo,
    dro,
    gmpo,
    gpg,
    grpo,
    gspo,
    gspo_token,
    kimi,
    kl_cov,
    luspo,
    ppo,
    reinforce_plus_plus,
    rloo,
    sapo,
    vespo,
)
from fused_rl.losses.penalties import KLPenalty
from fused_rl.losses.policy import LossOutput, PolicyLoss
from fused_rl.losses.ratios import (
    ClippedSequenceRatio,
    FullProductRatio,
    SequenceRatio,
    SequenceTokenRatio,
    TokenRatio,
)
from fused_rl.losses.sequences import Level
from fused_rl.losses.surrogates import (
    ASPO,
    CISPO,
    DRO,
    SAPO,
    VESPO,
    Clip,
    Kimi,
    Reinforce,
    Surrogate,
    Unclipped,
)
from fused_rl.losses.trust_regions import DPPOKL, DPPOTV, ClipCov, KLCov
from fused_rl.one_pass import linear_policy_loss
from fused_rl.rollouts.advantages import (
    GAEOutput,
    clipped_value_loss,
    discounted_returns,
    gae,
    group_mean_advantages,
    group_zscore_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)
from fused_rl.rollouts.diagnosis import Finding, Thresholds, diagnose
from fused_rl.rollouts.mismatch import (
    acceptance_mask,
    masked_weights,
    off_policy_sequence_mask,
    top_entropy_mask,
    truncated_weights,
    veto_mask,
)
from fused_rl.rollouts.overoptimisation import RewardCurve, RewardForm, fit_reward_curve
from fused_rl.rollouts.rewards import (
    Moments,
    length_rewards,
    merge_moments,
    moments,
    overlong_penalty,
    shape_rewards,
    whiten,
)
from fused_rl.rollouts.schedules import AdaptiveBeta, Anneal, AnnealedBeta, FixedBeta
from fused_rl.stats import TokenStats, TopStats

_find_kernels()

__version__ = "0.1.0"

__all__ = [
    "ASPO",
    "CISPO",
    "DPPOKL",
    "DPPOTV",
    "DRO",
    "KL",
    "SAPO",
    "VESPO",
    "AdaptiveBeta",
    "Anneal",
    "AnnealedBeta",
    "Backend",
    "Clip",
    "ClipCov",
    "ClippedSequenceRatio",
    "Finding",
    "FixedBeta",
    "FixedLengthMean",
    "FullProductRatio",
    "GAEOutput",
    "KLCov",
    "KLPenalty",
    "KeptStats",
    "Kimi",
    "LMHead",
    "LengthWeightedMean",
    "Level",
    "LossOutput",
    "Moments",
    "PolicyLoss",
    "Reinforce",
    "RewardCurve",
    "RewardForm",
    "RolloutMean",
    "SequenceMean",
    "SequenceRatio",
    "SequenceSumMean",
    "SequenceTokenRatio",
    "Surrogate",
    "Thresholds",
    "TokenBatch",
    "TokenMean",
    "TokenRatio",
    "TokenStats",
    "TokenSum",
    "TopStats",
    "Unclipped",
    "acceptance_mask",
    "aspo",
    "backends",
    "bnpo",
    "cispo",
    "clip_cov",
    "clipped_value_loss",
    "dapo",
    "diagnose",
    "discounted_returns",
    "dppo",
    "dr_grpo",
    "dro",
    "fit_reward_curve",
    "gae",
    "gmpo",
    "gpg",
    "group_mean_advantages",
    "group_zscore_advantages",
    "grpo",
    "gspo",
    "gspo_token",
    "kimi",
    "kl_cov",
    "kl_penalty",
    "leave_one_out_advantages",
    "length_rewards",
    "length_weighted_advantages",
    "linear_kept_logprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_top_logprobs",
    "logprobs_from_logits",
    "luspo",
    "masked_weights",
    "merge_moments",
    "moments",
    "off_policy_sequence_mask",
    "overlong_penalty",
    "pass_at_k_advantages",
    "ppo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "rloo",
    "sapo",
    "shape_rewards",
    "top_entropy_mask",
    "truncated_weights",
    "vespo",
    "veto_mask",
    "whiten",
]

# What holds numbers alone may be read again: torch.load takes only types that it knows.
torch.serialization.add_safe_globals(
    [public for public in map(globals().get, __all__) if isinstance(public, type)]
)
