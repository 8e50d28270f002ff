"""Losses that have a name. Each composes surrogate, ratio level and mean; see PolicyLoss.

All take their options and counts as keywords, and the `Terms`: KL in the loss, entropy bonus.
Counts are of the whole step, so that micro-batches add up to it (means.py); None: of the batch.
A penalty with more to it is `dataclasses.replace(grpo(), kl=KLPenalty(...))`.

A docstring is the formula, the name and its paper, what the mean is over, the advantages, and what
TRL 1.16 and verl 0.9.1 call it; docs/losses.md is made of them.

With r the ratio policy / old policy of a token, s its geometric mean over a sequence, A advantages,
l log-probs, sg without gradient. Means are written over tokens t of sequences i.
"""

import inspect
import sys
from collections.abc import Callable

from torch import Tensor
from typing_extensions import TypedDict, Unpack

from fused_rl import checks
from fused_rl.kl.divergences import Divergence
from fused_rl.kl.estimators import KL
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import Count, FixedLengthMean, SequenceMean, SequenceSumMean, TokenMean
from fused_rl.losses.penalties import KLPenalty
from fused_rl.losses.policy import PolicyLoss
from fused_rl.losses.ratios import (
    ClippedGeometricRatio,
    GeometricRatio,
    GeometricTokenRatio,
    ProductRatio,
    TokenRatio,
)
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
from fused_rl.losses.trust_regions import DPPOTV, ClipCov, KLCov, TrustRegion


class Terms(TypedDict, total=False):
    """Options of every named loss.

    beta: weight of the KL penalty towards the reference, a number or a tensor []; 0: none.
    kl: the estimator, KL.K3 by default, of batch.ref_logprobs; or the Divergence that is exact,
        Divergence.REVERSE for one, of linear_policy_loss's reference.
    kl_grad: the estimator whose gradient is taken; None: that of kl. See kl_penalty.
    entropy_coef: weight of the entropy bonus; 0 by default.
    """

    beta: float | Tensor
    kl: KL | Divergence
    kl_grad: KL | None
    entropy_coef: float


def compose(
    surrogate: Surrogate,
    ratio: Callable[[Tensor, TokenBatch], Tensor],
    mean: Callable[[TokenBatch], Tensor],
    *,
    beta: float | Tensor = 0.0,
    kl: KL | Divergence = KL.K3,
    kl_grad: KL | None = None,
    entropy_coef: float = 0.0,
    **unknown: object,
) -> PolicyLoss:
    """The PolicyLoss of these parts and `Terms`."""
    if unknown:
        raise _unexpected(sys._getframe(1).f_code.co_name, next(iter(unknown)))
    exact = isinstance(kl, Divergence)
    penalty = KLPenalty(beta, grad=kl_grad, **{"exact" if exact else "value": kl})
    return PolicyLoss(surrogate, ratio, penalty, entropy_coef, mean)


def _unexpected(loss: str, option: str) -> TypeError:
    """What Python says of an option that a function does not have, and the options that it has."""
    # compose() may be called by a loss that has no name here.
    known = inspect.signature(NAMES[loss]).parameters if loss in NAMES else ()
    own = [name for name in known if name != "terms"]
    return TypeError(
        f"{loss}() got an unexpected keyword argument {option!r}; its options are "
        f"{', '.join([*own, *Terms.__annotations__])}"
    )


def ppo(
    *,
    num_tokens: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t max(-r A, -clip(r) A), where A < 0 at most -dual A: PPO (arXiv 1707.06347).

    Mean over tokens. Advantages: GAE. The value loss is another function.
    Elsewhere: verl "vanilla", with dual=3.
    """
    return compose(Clip(clip_low, clip_high, dual), TokenRatio(), TokenMean(num_tokens), **terms)


def grpo(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i mean_t of PPO's clip: GRPO (arXiv 2402.03300, eq. 3).

    Mean over sequences of their token means. Advantages: group_zscore_advantages.
    Elsewhere: TRL "grpo".
    """
    return compose(Clip(clip_low, clip_high), TokenRatio(), SequenceMean(num_sequences), **terms)


def bnpo(*, clip_low: float = 0.2, clip_high: float = 0.2, **terms: Unpack[Terms]) -> PolicyLoss:
    """mean_t of PPO's clip: BNPO, by the name that TRL gives it.

    Mean over the tokens of the (micro-)batch: one of few tokens weighs as much as others.
    Advantages: group_zscore_advantages.
    Elsewhere: TRL "bnpo".
    """
    return compose(Clip(clip_low, clip_high), TokenRatio(), TokenMean(), **terms)


def dapo(
    *,
    num_tokens: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t of PPO's clip, higher above: DAPO (arXiv 2503.14476, eq. 8).

    Mean over all tokens of the step. Advantages: group_zscore_advantages.
    Elsewhere: TRL "dapo".
    """
    return compose(Clip(clip_low, clip_high), TokenRatio(), TokenMean(num_tokens), **terms)


def dr_grpo(
    length: float,
    *,
    num_sequences: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i sum_t of PPO's clip / length: Dr. GRPO (arXiv 2503.20783).

    length: the longest completion that can be sampled. Mean over sequences of their token sums
    over that constant. Advantages: group_mean_advantages.
    Elsewhere: TRL "dr_grpo".
    """
    mean = FixedLengthMean(length, num_sequences)
    return compose(Clip(clip_low, clip_high), TokenRatio(), mean, **terms)


def cispo(
    *,
    num_tokens: Count | None = None,
    ratio_min: float = 0.0,
    ratio_max: float = 5.0,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t -sg(clip(r, ratio_min, ratio_max)) A l: CISPO of MiniMax-M1 (arXiv 2506.13585).

    Mean over all tokens of the step. Advantages: group_zscore_advantages.
    Elsewhere: TRL "cispo"; verl "cispo".
    """
    return compose(CISPO(ratio_min, ratio_max), TokenRatio(), TokenMean(num_tokens), **terms)


def gspo(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i max(-s A, -clip(s) A): GSPO (arXiv 2507.18071).

    Bounds are narrow, for s averages. Mean over sequences. Advantages: group_zscore_advantages.
    Elsewhere: TRL "grpo", importance_sampling_level="sequence".
    """
    return compose(
        Clip(clip_low, clip_high), GeometricRatio(), SequenceMean(num_sequences), **terms
    )


def gspo_token(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i mean_t of PPO's clip of sg(s) pi / sg(pi): GSPO-token (arXiv 2507.18071, section 4.3).

    Mean over sequences of their token means. Advantages: per token, else it is gspo.
    Elsewhere: verl "gspo".
    """
    mean = SequenceMean(num_sequences)
    return compose(Clip(clip_low, clip_high), GeometricTokenRatio(), mean, **terms)


def sapo(
    *,
    num_sequences: Count | None = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i mean_t -sigmoid(tau (r - 1)) 4 / tau A: SAPO (arXiv 2511.20347).

    Mean over sequences of their token means. Advantages: group_zscore_advantages.
    Elsewhere: TRL "sapo"; verl "sapo".
    """
    surrogate = SAPO(tau_positive, tau_negative)
    return compose(surrogate, TokenRatio(), SequenceMean(num_sequences), **terms)


def gmpo(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i -A exp(mean_t clip(log r)): GMPO (arXiv 2507.20673), log r clipped on the side of A.

    Bounds are of log r. Mean over sequences. Advantages: group_zscore_advantages.
    Elsewhere: TRL GMPOTrainer; verl "geo_mean".
    """
    ratio = ClippedGeometricRatio(clip_low, clip_high)
    return compose(Unclipped(), ratio, SequenceMean(num_sequences), **terms)


def luspo(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i T_i max(-s A, -clip(s) A): LUSPO (arXiv 2602.05261), GSPO times the length.

    Mean over sequences of their token sums. Advantages: group_zscore_advantages.
    Elsewhere: TRL "luspo", importance_sampling_level="sequence".
    """
    mean = SequenceSumMean(num_sequences)
    return compose(Clip(clip_low, clip_high), GeometricRatio(), mean, **terms)


def vespo(
    *,
    num_tokens: Count | None = None,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t -sg(w^k exp(lambda (1 - w))) A l, w = prod_t r: VESPO (arXiv 2602.10693).

    positive, negative: (k, lambda) of that sign of A. For the whole weight give the rollout's
    log-probs as old_logprobs. Mean over all tokens of the step, as TRL has it. Advantages:
    group_zscore_advantages.
    Elsewhere: TRL "vespo".
    """
    for name, pair in (("positive", positive), ("negative", negative)):
        checks.require(
            isinstance(pair, (tuple, list)) and len(pair) == 2,
            lambda name=name, pair=pair: f"{name} must be (k, lambda), got {checks.shown(pair)}",
        )
    surrogate = VESPO(*positive, *negative)
    return compose(surrogate, ProductRatio(), TokenMean(num_tokens), **terms)


def dppo(
    *,
    num_tokens: Count | None = None,
    trust_region: TrustRegion | None = None,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t -sg(min(r, 20)) A l within a trust region of p - p_old: DPPO (arXiv 2602.04879).

    trust_region: DPPOTV(...), the default, or DPPOKL(...). Mean over all tokens of the step.
    Advantages: group_mean_advantages.
    Elsewhere: verl "dppo_tv", "dppo_kl".
    """
    region = DPPOTV() if trust_region is None else trust_region
    checks.require(
        isinstance(region, TrustRegion),
        lambda: f"trust_region must be DPPOTV(...) or DPPOKL(...), got {checks.shown(region)}",
    )
    return compose(region, TokenRatio(), TokenMean(num_tokens), **terms)


def gpg(*, num_tokens: Count | None = None, **terms: Unpack[Terms]) -> PolicyLoss:
    """mean_t -A l: GPG (arXiv 2504.02546), REINFORCE on groups.

    Mean over all tokens of the step. Advantages: group_mean_advantages.
    Elsewhere: verl "gpg".
    """
    return compose(Reinforce(), TokenRatio(), TokenMean(num_tokens), **terms)


def reinforce_plus_plus(
    *,
    num_tokens: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t of PPO's clip, without a critic: REINFORCE++ (arXiv 2501.03262).

    Mean over all tokens of the step. Advantages: returns with the KL in the reward, whitened over
    the whole batch.
    """
    return compose(Clip(clip_low, clip_high), TokenRatio(), TokenMean(num_tokens), **terms)


def rloo(
    *,
    num_sequences: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_i of PPO's clip of prod_t r: RLOO (arXiv 2402.14740), with the clip that TRL gives it.

    Mean over sequences. Advantages: reward, with the KL in it, minus the mean of the others.
    Elsewhere: TRL RLOOTrainer.
    """
    mean = SequenceMean(num_sequences)
    return compose(Clip(clip_low, clip_high), ProductRatio(), mean, **terms)


def kimi(tau: float, *, num_sequences: Count | None = None, **terms: Unpack[Terms]) -> PolicyLoss:
    """mean_i (A - tau sum_t log r)^2 / (2 tau): Kimi k1.5's mirror descent (arXiv 2501.12599).

    tau: how strongly the policy is held to the old one; the report names no number. Mean over
    sequences. Advantages: group_mean_advantages.
    """
    return compose(Kimi(tau), ProductRatio(), SequenceMean(num_sequences), **terms)


def dro(
    *, num_tokens: Count | None = None, penalty: float = 0.05, **terms: Unpack[Terms]
) -> PolicyLoss:
    """mean_t -(A l - penalty / 2 (log r)^2): DRO, token by token (arXiv 2405.19107).

    Mean over all tokens of the step. Advantages: reward minus value or group mean.
    Elsewhere: verl "dro".
    """
    return compose(DRO(penalty), TokenRatio(), TokenMean(num_tokens), **terms)


def aspo(
    *,
    num_tokens: Count | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float = 3.0,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t -sg(w) A pi / sg(pi), w = 1 / r where A > 0, else r: ASPO (arXiv 2510.06062).

    Mean over all tokens of the step. Advantages: group_zscore_advantages.
    """
    surrogate = ASPO(clip_low, clip_high, dual)
    return compose(surrogate, TokenRatio(), TokenMean(num_tokens), **terms)


def clip_cov(
    *,
    num_tokens: Count | None = None,
    selection: ClipCov | None = None,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t of PPO's clip, 0 at tokens of high covariance: Clip-Cov (arXiv 2505.22617).

    selection: a ClipCov, which says which. Mean over all tokens of the step. Advantages:
    group_zscore_advantages.
    Elsewhere: verl "clip_cov".
    """
    # Clip by name: torch.compile cannot follow a default_factory in what it traces.
    chosen = ClipCov(Clip()) if selection is None else selection
    checks.require(
        isinstance(chosen, ClipCov),
        lambda: f"selection must be a ClipCov, got {checks.shown(chosen)}",
    )
    return compose(chosen, TokenRatio(), TokenMean(num_tokens), **terms)


def kl_cov(
    *,
    num_tokens: Count | None = None,
    coef: float = 1.0,
    fraction: float = 2e-4,
    **terms: Unpack[Terms],
) -> PolicyLoss:
    """mean_t -r A + coef |log r| at tokens of the highest covariance: KL-Cov (arXiv 2505.22617).

    Mean over all tokens of the step. Advantages: group_zscore_advantages.
    Elsewhere: verl "kl_cov".
    """
    return compose(KLCov(coef, fraction), TokenRatio(), TokenMean(num_tokens), **terms)


_NAMED = (
    *(ppo, grpo, bnpo, dapo, dr_grpo, cispo, gspo, gspo_token, sapo, gmpo, luspo, vespo, dppo),
    *(gpg, reinforce_plus_plus, rloo, kimi, dro, aspo, clip_cov, kl_cov),
)

NAMES: dict[str, Callable[..., PolicyLoss]] = {named.__name__: named for named in _NAMED}
"""Every named loss, by its name."""
