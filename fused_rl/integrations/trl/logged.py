"""What a trainer of TRL logs of a loss of ours, under TRL's names where it has them.

Everything that is no property of the loss (rewards, lengths, entropy, the load-balancing loss, the
controller of the entropy bonus) is TRL's own to log. So is the rest, where the loss is TRL's.
"""

from typing import Any

import torch
from torch import Tensor

from fused_rl.integrations.trl.forming import StepLoss
from fused_rl.losses.policy import PolicyLoss

_LOGGED_AS = {
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
_EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
# What TRL logs of its own loss.
_OF_THEIRS = ("kl", "cispo_clip_ratio", "vespo/phi_seq_mean")
# What it has no name for.
_OURS = (
    *("ratio_mean", "ratio_max", "clip_fraction_dual", "unknown_fraction"),
    "zero_gradient_fraction",
)


def log_of(trainer: Any) -> dict[str, list[float]]:
    return trainer._metrics["train" if trainer.model.training else "eval"]


def lengths(log: dict[str, list[float]]) -> dict[str, int]:
    """How much of each metric is logged."""
    return {name: len(values) for name, values in log.items()}


@torch.no_grad()
def beside_theirs(trainer: Any, loss: StepLoss, count: Tensor) -> None:
    """Logs what TRL does not of a loss that is its own."""
    means = _means(trainer, loss.metrics(), count)
    for name in _OURS:
        if name in means:
            log_of(trainer)[name].append(means[name])


@torch.no_grad()
def in_place_of_theirs(trainer: Any, loss: StepLoss, count: Tensor, before: dict[str, int]) -> None:
    """Logs what a policy loss reports, in place of what TRL has logged of its own.

    before: lengths() from before TRL's.
    """
    log = log_of(trainer)
    for name in list(log):
        if name in _OF_THEIRS or name.startswith("clip_ratio/"):
            del log[name][before.get(name, 0) :]
            if not log[name]:
                del log[name]
    if len(log.get("policy_loss", ())) > before.get("policy_loss", 0):
        log["policy_loss"][-1] = trainer.accelerator.gather(loss.seen.value).nanmean().item()
    means = _means(trainer, loss.metrics(), count)
    # The entropy is TRL's already.
    means.pop("entropy", None)
    for name, mean in means.items():
        log[_LOGGED_AS.get(name, name)].append(mean)
    if _LOGGED_AS.keys() <= means.keys():
        log["clip_ratio/region_mean"].append(sum(means[name] for name in _LOGGED_AS))
    if isinstance(loss.policy, PolicyLoss):
        batch = loss.seen.batch
        low, high, dual = loss.policy.clipped(loss.seen.stats, batch)
        # NaN for a sequence without tokens; at least one of all is none.
        shares = [_shares(flags, batch) for flags in (low, high & ~dual)]
        least, most = (trainer.accelerator.gather(share) for share in shares)
        extremes = (least.nan_to_num(torch.inf).min(), most.nan_to_num(-torch.inf).max())
        for name, extreme in zip(_EXTREMES, extremes, strict=True):
            log[name].append(extreme.item() if extreme.isfinite() else torch.nan)


def _shares(flags: Tensor, batch: Any) -> Tensor:
    """[B]: the share of each sequence's tokens; NaN without tokens."""
    tokens = batch.sequence_sum(torch.ones_like(flags, dtype=torch.float32))
    return batch.sequence_sum(flags.float()) / tokens


def _means(trainer: Any, metrics: dict[str, Tensor], count: Tensor) -> dict[str, float]:
    """Over the tokens of all processes, with one wait for the device; the largest of ratio_max."""
    values = torch.stack([*metrics.values(), torch.ones_like(count)]).float() * count
    totals = trainer.accelerator.reduce(values, reduction="sum")
    means = dict(zip(metrics, (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True))
    # TRL's upper bound is that of gaining tokens; the losing ones have a name of their own.
    if "clip_fraction_dual" in means:
        means["clip_fraction_high"] -= means["clip_fraction_dual"]
    if "ratio_max" in means:
        means["ratio_max"] = trainer.accelerator.gather(metrics["ratio_max"]).max().item()
    return means
