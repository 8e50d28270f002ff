"""What a preference loss reports beside itself; loss.py says what each is."""

import torch
from torch import Tensor

from fused_rl.losses.batch import divisor
from fused_rl.losses.preference.batch import PreferenceBatch
from fused_rl.losses.preference.sequences import SequenceStats
from fused_rl.reference import acc_dtype
from fused_rl.stats import TokenStats


def monitors(
    stats: TokenStats,
    sequences: SequenceStats,
    scores: Tensor,
    point: Tensor | float,
    batch: PreferenceBatch,
) -> dict[str, Tensor]:
    """The metrics, [] each, in the dtype of stats. stats: [N], flat."""
    means = {
        **_by_side("reward", scores, batch),
        **_by_side("logprobs", sequences.sum, batch),
        **_by_side("length", sequences.length, batch),
        "accuracy": _accuracy(scores - point, batch),
        "nll": -_mean(stats.logprobs.double().where(batch.likely, 0.0), batch.num_likely),
        "entropy": _of_scored(stats.entropy, batch),
        "empty_fraction": _of_both((sequences.length == 0).double(), batch),
        "unknown_fraction": _unknown(batch),
    }
    means["margin"] = means["reward_chosen"] - means["reward_rejected"]
    if sequences.log_ratio is not None:
        means["log_ratio"] = _of_both(sequences.log_ratio, batch)
    if batch.paired:
        means["length_bias"] = _length_bias(scores, sequences.length, batch)
    else:
        means["reference_point"] = filled(point, scores)
    return {name: value.to(acc_dtype(stats.logprobs)) for name, value in means.items()}


def filled(value: Tensor | float, like: Tensor) -> Tensor:
    """[], on the device of like; a number is filled in there, not copied to it."""
    return value if isinstance(value, Tensor) else like.new_full((), value)


def _mean(values: Tensor, count: Tensor | int) -> Tensor:
    return values.sum() / divisor(filled(count, values))


def _by_side(name: str, values: Tensor, batch: PreferenceBatch) -> dict[str, Tensor]:
    return {
        f"{name}_chosen": _mean(values[batch.chosen], batch.num_chosen),
        f"{name}_rejected": _mean(values[batch.rejected], batch.num_rejected),
    }


def _of_both(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """The mean of values [S] over all that is judged."""
    both = torch.cat([values[batch.chosen], values[batch.rejected]])
    return _mean(both, batch.num_chosen + batch.num_rejected)


def _accuracy(scores: Tensor, batch: PreferenceBatch) -> Tensor:
    """The share that is judged as it was labelled; ties are not. scores: beyond the point."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    if batch.paired:
        return _mean((chosen > rejected).double(), batch.num_chosen)
    right = torch.cat([chosen > 0, rejected < 0]).double()
    return _mean(right, batch.num_chosen + batch.num_rejected)


def _of_scored(values: Tensor, batch: PreferenceBatch) -> Tensor:
    return _mean(values.double().where(batch.scored, 0.0), batch.num_scored)


def _unknown(batch: PreferenceBatch) -> Tensor:
    if batch.ref_sums is not None:
        return _of_both(batch.ref_sums.isnan().double(), batch)
    if batch.tokens.ref_logprobs is None:
        return torch.zeros((), dtype=torch.float64, device=batch.scored.device)
    return _of_scored(batch.tokens.ref_logprobs.isnan(), batch)


def _length_bias(scores: Tensor, length: Tensor, batch: PreferenceBatch) -> Tensor:
    """The correlation over pairs of margin and difference in length; 0 where one is constant."""
    margin, longer = (t[batch.chosen] - t[batch.rejected] for t in (scores, length))
    if len(margin) == 0:
        return scores.new_zeros(())
    x, y = margin - margin.mean(), longer - longer.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0)
