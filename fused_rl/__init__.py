"""Fused log-probs, entropies, KL terms and policy losses for RL on language models.

The expensive half takes hidden states and a head to numbers per token and back: linear_logprobs,
linear_kept_logprobs, linear_logprobs_at, linear_divergence, logprobs_from_logits. The cheap half
makes a loss of such numbers: the named losses, PolicyLoss, those of distillation and of preference.
linear_policy_loss and linear_preference_loss do both at once. What a loss is composed of, and what
comes before and after it, has a module for each kind: surrogates, trust_regions, ratios, means,
penalties; scores, links; sampling_masks, rewards, advantages, mismatch, schedules, diagnosis,
overoptimisation. What else is had of hidden states is in linear.
"""

import sys

import torch

from fused_rl import linear
from fused_rl.kl.divergences import Divergence
from fused_rl.kl.estimators import KL, kl_penalty
from fused_rl.linear.at import linear_logprobs_at
from fused_rl.linear.divergence import linear_divergence
from fused_rl.linear.head import LMHead
from fused_rl.linear.kept import linear_kept_logprobs
from fused_rl.linear.logprobs import linear_logprobs, linear_top_logprobs, logprobs_from_logits
from fused_rl.linear.statistics import linear_statistics
from fused_rl.losses import (
    distillation,
    means,
    penalties,
    preference,
    ratios,
    surrogates,
    trust_regions,
)
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.counts import across
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
from fused_rl.losses.preference import links, scores
from fused_rl.losses.sequences import Level
from fused_rl.one_pass.policy_loss import linear_policy_loss
from fused_rl.one_pass.preference_loss import linear_preference_loss
from fused_rl.one_pass.through import model_policy_loss
from fused_rl.ops.backends import Backend, backends
from fused_rl.ops.trust import trust_kernels
from fused_rl.parallel.states import Hidden
from fused_rl.rollouts import (
    advantages,
    diagnosis,
    mismatch,
    overoptimisation,
    rewards,
    sampling_masks,
    schedules,
)
from fused_rl.rollouts.diagnosis import diagnose
from fused_rl.stats import DivergenceStats, TokenStats

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Divergence",
    "DivergenceStats",
    "Hidden",
    "KLPenalty",
    "LMHead",
    "Level",
    "LossOutput",
    "PolicyLoss",
    "TokenBatch",
    "TokenStats",
    "across",
    "aspo",
    "backends",
    "bnpo",
    "cispo",
    "clip_cov",
    "dapo",
    "diagnose",
    "dppo",
    "dr_grpo",
    "dro",
    "gmpo",
    "gpg",
    "grpo",
    "gspo",
    "gspo_token",
    "kimi",
    "kl_cov",
    "kl_penalty",
    "linear_divergence",
    "linear_kept_logprobs",
    "linear_logprobs",
    "linear_logprobs_at",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_statistics",
    "linear_top_logprobs",
    "logprobs_from_logits",
    "luspo",
    "model_policy_loss",
    "ppo",
    "reinforce_plus_plus",
    "rloo",
    "sapo",
    "trust_kernels",
    "vespo",
]

MODULES = (
    *(advantages, diagnosis, distillation, linear, links, means, mismatch, overoptimisation),
    *(penalties, preference, ratios, rewards, sampling_masks, schedules, scores, surrogates),
    trust_regions,
)
"""The public modules: fused_rl.advantages, and so on; what is public in each is its __all__."""

# The path of a public module is the one that users write, wherever its file lies.
sys.modules.update({f"{__name__}.{m.__name__.rpartition('.')[2]}": m for m in MODULES})

# What holds numbers alone may be read again: torch.load takes only types that it knows.
torch.serialization.add_safe_globals(
    [
        *(thing for thing in map(globals().get, __all__) if isinstance(thing, type)),
        *(t for m in MODULES for t in map(vars(m).get, m.__all__) if isinstance(t, type)),
        Backend,
    ]
)
