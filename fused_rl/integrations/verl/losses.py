"""verl's policy losses: each a composition of ours, called as verl calls it."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fused_rl.checks import require
from fused_rl.integrations.verl import metrics as of
from fused_rl.losses import named
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import (
    FixedLengthMean,
    SequenceMean,
    SequenceSumMean,
    TokenMean,
    TokenSum,
)
from fused_rl.losses.policy import PolicyLoss
from fused_rl.losses.surrogates import Clip
from fused_rl.losses.trust_regions import DPPOKL, DPPOTV, ClipCov, TrustRegion
from fused_rl.stats import TokenStats

PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]
Mean = Callable[[TokenBatch], Tensor]


def policy_loss_fn(
    compose: Callable[[Any], PolicyLoss],
    *,
    metrics: of.Metrics = of.of_clip,
    mean: Callable[..., Mean] | None = None,
    weights: Callable[[Tensor, Tensor], Tensor] | None = None,
    default_mode: str = "token-mean",
) -> PolicyLossFn:
    """A function for verl's registry of policy losses.

    The mean of the PolicyLoss is replaced by the one that loss_agg_mode names. Counts of the whole
    step come from config.global_batch_info, where verl puts them.

    Args:
        compose: verl's actor config -> PolicyLoss.
        metrics: (config, loss, tokens) -> what is reported, see metrics.py.
        mean: (loss_agg_mode, mask [B, T], **config.global_batch_info) -> the mean; None: as verl's
            agg_loss has it.
        weights: (rollout_is_weights, mask), [B, T] each -> the weight of each token, [B, T]; None:
            rollout_is_weights themselves.
        default_mode: loss_agg_mode where none is given.
    """

    def compute(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T] bool or 0/1
        loss_agg_mode: str = default_mode,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, float]]:
        """(the loss, what to log under verl's names)."""
        mask = response_mask.bool()
        info = getattr(config, "global_batch_info", None) or {}
        policy = compose(config)
        loss = replace(policy, mean=(mean or mean_of)(loss_agg_mode, mask, **info))
        if rollout_is_weights is not None and weights is not None:
            rollout_is_weights = weights(rollout_is_weights, mask)
        batch = TokenBatch.padded(
            torch.zeros_like(mask, dtype=torch.int64),
            mask,
            advantages,
            old_logprobs=old_log_prob,
            weights=rollout_is_weights,
        )
        value = loss(TokenStats(log_prob, torch.zeros_like(log_prob)), batch).loss
        report = metrics(config, policy, of.Moved.of(policy, log_prob, batch))
        return value, {name: number.item() for name, number in report.items()}

    return compute


def mean_of(
    loss_agg_mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Mean:
    """The mean that loss_agg_mode names; parameters as of verl's agg_loss.

    Sequences are those with a counted token. "seq-mean-token-sum-norm" is a mean over them too.

    Raises:
        ValueError: another mode; dp_size > 1 without the count that the mode divides by, since the
            ranks' own would weigh their tokens differently.
    """
    local = mask.any(dim=-1).sum()

    def count(name: str, given: float | Tensor | None, own: Tensor | None) -> Any:
        require(
            given is not None or dp_size == 1,
            lambda: f"{name} is required when dp_size > 1, got None with dp_size {dp_size}",
        )
        return own if given is None else given / dp_size

    def sequences() -> Any:
        return count("global_batch_size", global_batch_size, local)

    means = {
        "token-mean": lambda: TokenMean(count("batch_num_tokens", batch_num_tokens, None)),
        # Gradients are averaged over the ranks afterwards, and are to be summed.
        "token-sum": lambda: lambda batch: dp_size * TokenSum()(batch),
        "seq-mean-token-mean": lambda: SequenceMean(sequences()),
        "seq-mean-token-sum": lambda: SequenceSumMean(sequences()),
        "seq-mean-token-sum-norm": lambda: FixedLengthMean(
            loss_scale_factor or mask.shape[-1], sequences()
        ),
    }
    require(
        loss_agg_mode in means,
        lambda: f"loss_agg_mode must be one of {list(means)}, got {loss_agg_mode!r}",
    )
    return means[loss_agg_mode]()


def _sequence_means(_: str, mask: Tensor, **info: Any) -> Mean:
    """Of SAPO, whatever loss_agg_mode."""
    return mean_of("seq-mean-token-mean", mask, **info)


def _rows(_: str, mask: Tensor, **info: Any) -> Mean:
    """Of GMPO, whatever loss_agg_mode and counts: over the rows at hand, also those without a
    counted token.
    """
    return SequenceMean(len(mask))


def _geometric(weights: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: the geometric mean of a sequence's weights, at each of its tokens; NaN is a 1."""
    logs = torch.log(weights + 1e-10).where(mask & ~weights.isnan(), 0.0).sum(-1, keepdim=True)
    return (logs / mask.sum(-1, keepdim=True).clamp(min=1)).exp().expand(mask.shape)


def _bounds(config: Any) -> dict[str, float]:
    """The clip's bounds: each side's own, else clip_ratio."""
    sides = {"low": "clip_ratio_low", "high": "clip_ratio_high"}
    own = {side: getattr(config, name, None) for side, name in sides.items()}
    return {side: config.clip_ratio if bound is None else bound for side, bound in own.items()}


def _clips(config: Any) -> dict[str, float]:
    return {f"clip_{side}": bound for side, bound in _bounds(config).items()}


def _vanilla(config: Any) -> PolicyLoss:
    return named.ppo(**_clips(config), dual=getattr(config, "clip_ratio_c", 3.0))


def _cispo(config: Any) -> PolicyLoss:
    bounds = _bounds(config)
    return named.cispo(ratio_min=1 - bounds["low"], ratio_max=1 + bounds["high"])


def _sapo(config: Any) -> PolicyLoss:
    return named.sapo(tau_positive=config.tau_pos, tau_negative=config.tau_neg)


def _dppo(region: Callable[..., TrustRegion]) -> Callable[[Any], PolicyLoss]:
    def compose(config: Any) -> PolicyLoss:
        ratio_max = getattr(config, "clip_ratio_c", 20.0)
        return named.dppo(trust_region=region(**_bounds(config), ratio_max=ratio_max))

    return compose


def _option(config: Any, name: str, default: float) -> float:
    """An option of config.policy_loss; None stands for the default."""
    value = getattr(config.policy_loss, name, None)
    return default if value is None else value


def _clip_cov(config: Any) -> PolicyLoss:
    # Which of the candidates are dropped is drawn anew in each call, from torch's generator.
    seed = int(torch.randint(2**62, ()))
    selection = ClipCov(
        Clip(**_bounds(config)),
        cov_low=_option(config, "clip_cov_lb", 1.0),
        cov_high=_option(config, "clip_cov_ub", 5.0),
        fraction=_option(config, "clip_cov_ratio", 2e-4),
        seed=seed,
    )
    return named.clip_cov(selection=selection)


def _kl_cov(config: Any) -> PolicyLoss:
    coef = _option(config, "ppo_kl_coef", 1.0)
    return named.kl_cov(coef=coef, fraction=_option(config, "kl_cov_ratio", 2e-4))


def _dro(config: Any) -> PolicyLoss:
    penalty = _option(config, "dro_beta", 0.0)
    require(penalty > 0, lambda: f"policy_loss.dro_beta must be positive, got {penalty}")
    return named.dro(penalty=penalty)


def _gpg(config: Any) -> PolicyLoss:
    return named.gpg()


_of_rollout = policy_loss_fn(_gpg, metrics=of.of_kl)
_of_clip = policy_loss_fn(_vanilla)


def _bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """old_log_prob are the rollout's; weights and rejected tokens are what verl's own correction
    makes of them, by config.policy_loss.rollout_correction. Needs verl.

    Raises:
        ValueError: no rollout_correction; a loss_type but "ppo_clip" and "reinforce".
    """
    from verl.trainer.ppo import rollout_corr_helper

    options = getattr(getattr(config, "policy_loss", None), "rollout_correction", None)
    require(
        options is not None, lambda: "bypass_mode needs policy_loss.rollout_correction, got None"
    )
    kind = options.get("loss_type", "ppo_clip")
    losses = {"ppo_clip": _of_clip, "reinforce": _of_rollout}
    require(kind in losses, lambda: f"loss_type must be one of {list(losses)}, got {kind!r}")
    defaults = {"rollout_is": None, "rollout_is_threshold": 2.0}
    defaults |= {"rollout_is_batch_normalize": False, "rollout_rs": None}
    defaults |= {"rollout_rs_threshold": None}
    correct = rollout_corr_helper.compute_rollout_correction_and_rejection_mask
    with torch.no_grad():
        found, mask, report = correct(
            old_log_prob=log_prob,
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            **{name: options.get(name, default) for name, default in defaults.items()},
        )
    # The ratio of ppo_clip is to the rollout already.
    corrects = kind == "reinforce" and found
    weights = found.batch["rollout_is_weights"] if corrects else None
    given = (old_log_prob, log_prob, advantages, mask, loss_agg_mode, config, weights)
    loss, own = losses[kind](*given)
    return loss, own | report


policy_losses = MappingProxyType(
    {
        "vanilla": _of_clip,
        "dppo_tv": policy_loss_fn(_dppo(DPPOTV), metrics=of.of_trust_region),
        "dppo_kl": policy_loss_fn(_dppo(DPPOKL), metrics=of.of_trust_region),
        "gspo": policy_loss_fn(
            lambda config: named.gspo_token(**_clips(config)),
            metrics=of.of_gspo,
            default_mode="seq-mean-token-mean",
        ),
        "sapo": policy_loss_fn(_sapo, metrics=of.of_sapo, mean=_sequence_means),
        "gpg": policy_loss_fn(_gpg, metrics=of.of_nothing),
        "clip_cov": policy_loss_fn(_clip_cov, metrics=of.of_clip_cov),
        "kl_cov": policy_loss_fn(_kl_cov, metrics=of.of_kl_cov),
        "geo_mean": policy_loss_fn(
            lambda config: named.gmpo(**_clips(config)),
            metrics=of.of_geo_mean,
            mean=_rows,
            weights=_geometric,
        ),
        "dro": policy_loss_fn(_dro, metrics=of.of_kl),
        "cispo": policy_loss_fn(_cispo, metrics=of.of_cispo),
        "bypass_mode": _bypass_mode,
    }
)
"""By verl's names, all of its twelve. Where verl ignores loss_agg_mode (sapo: seq-mean-token-mean;
geo_mean: the mean over rows) these ignore it too."""
