"""Reference points: the score that an answer has to beat, where answers are judged one by one.

Called as point(scores [S], batch) -> [], without gradient, over all ranks that the batch knows of.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.preference.batch import PreferenceBatch


@dataclass(frozen=True)
class MismatchedMean:
    """max(mean score of the mismatched sequences, 0): KTO's z0 (arXiv 2402.01306, section 4.1).

    With log-ratios for scores the mean estimates the KL of policy and reference, by answers to
    other prompts.
    """

    def __call__(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        # What one rank lacks another may have.
        checks.require(
            batch.group is not None or len(batch.mismatched) > 0,
            lambda: (
                "KTO's reference point is the mean over mismatched sequences, and the batch has "
                "none: give PreferenceBatch mismatched, or the loss point"
            ),
        )
        return _mean(scores[batch.mismatched], batch).clamp(min=0.0)


@dataclass(frozen=True)
class BatchMean:
    """The mean score of all that is judged: BCO's shift (arXiv 2404.04656), of this batch alone."""

    def __call__(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        return _mean(scores[torch.cat([batch.chosen, batch.rejected])], batch)


@torch.no_grad()
def _mean(scores: Tensor, batch: PreferenceBatch) -> Tensor:
    """[] over the ranks of the batch; 0 of nothing."""
    both = torch.stack([scores.sum(), scores.new_full((), len(scores))])
    if batch.group is not None:
        dist.all_reduce(both, group=batch.group)
    return both[0] / both[1].clamp(min=1)
