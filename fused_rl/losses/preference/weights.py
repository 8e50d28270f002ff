"""Weights of pairs: what each pair's loss is multiplied by, without gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.preference.sequences import SequenceStats


@dataclass(frozen=True)
class WPOWeight:
    """The product over a pair of exp(mean_t log(p / sum_v p^2)) (WPO, arXiv 2406.11827, eq. 2).

    How much the policy would give such answers, against those that it samples itself.
    """

    is_aligned = True

    def __call__(self, chosen: SequenceStats, rejected: SequenceStats) -> Tensor:
        """[P], of the two sides of each pair."""
        checks.require(
            chosen.alignment is not None and rejected.alignment is not None,
            lambda: (
                "WPO weighs by the policy's log-probs at half the temperature: call "
                "linear_preference_loss, or give the batch sharp_logprobs"
            ),
        )
        return torch.exp(chosen.alignment + rejected.alignment)
