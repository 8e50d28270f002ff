"""SequenceStats: what a preference loss knows of each sequence.

    sum[i]        = sum_t logprobs[t]
    length[i]     = its scored tokens
    log_ratio[i]  = sum_t logprobs[t] - ref_logprobs[t]
    alignment[i]  = mean_t log(p[t] / sum_v p[t, v]^2)

with t over the scored tokens of sequence i. All are float64: from float32 log-probs, a float32 sum
of 4096 of them would be rounded to 2e-4 nats.

Where p is softmax(z), p / sum_v p^2 = softmax(2 z) / softmax(z): the alignment is the mean of how
far log-probs rise when the temperature is halved.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses.preference.batch import PreferenceBatch


class SequenceStats(NamedTuple):
    """Numbers per sequence, [S] float64 each; the module has the formulas."""

    sum: Tensor
    length: Tensor
    log_ratio: Tensor | None = None  # None without a reference
    alignment: Tensor | None = None  # of WPO; None elsewhere

    @property
    def mean(self) -> Tensor:
        """[S]: the mean log-prob per token; 0 for a sequence without tokens."""
        return self.sum / self.length.clamp(min=1)

    def log_ratio_to_reference(self) -> Tensor:
        """log_ratio.

        Raises:
            ValueError: there is no reference.
        """
        checks.require(
            self.log_ratio is not None,
            lambda: (
                "this loss compares with a reference, and there is none: give the batch "
                "ref_logprobs, or linear_preference_loss reference=(ref_hidden, ref_head)"
            ),
        )
        return self.log_ratio

    def at(self, rows: Tensor) -> "SequenceStats":
        """Those of the sequences at rows [n] int64."""
        return SequenceStats(*(None if t is None else t[rows] for t in self))


def sequence_stats(logprobs: Tensor, batch: PreferenceBatch, tail: float = 1.0) -> SequenceStats:
    """Of a batch, from the policy's log-probs.

    Args:
        logprobs: [N] float32 or float64; 0 outside the tokens' loss_mask.
        batch: the sequences.
        tail: what tokens beyond the length of the shorter of a pair weigh in both sums; 1: as all.

    Raises:
        ValueError: a tail for what it is not defined for.
    """
    weights = 1.0 if tail == 1 else _tail_weights(batch, tail)
    known = logprobs.double()
    total = batch.sequence_sum(known * weights)
    length = batch.sequence_sum(torch.ones_like(known))
    ratio = None
    if batch.tokens.ref_logprobs is not None:
        ratio = batch.sequence_sum(log_ratio(known, batch.tokens.ref_logprobs) * weights)
    elif batch.ref_sums is not None:
        ratio = log_ratio(total, batch.ref_sums)
    alignment = None
    if batch.sharp_logprobs is not None:
        rise = batch.sequence_sum(batch.sharp_logprobs.double() - known.detach())
        alignment = rise / length.clamp(min=1)
    return SequenceStats(total, length, ratio, alignment)


def _tail_weights(batch: PreferenceBatch, tail: float) -> Tensor:
    """[N]: 1 for the tokens that both of a pair have a counterpart of, tail for those beyond."""
    for wrong, what in (
        (not batch.paired, "an unpaired batch has no pairs to compare lengths in"),
        (batch.ref_sums is not None, "ref_logprobs are sums: give them token by token"),
        (batch.tokens.context is not None, "its sequences are split over ranks"),
    ):
        checks.require(not wrong, lambda what=what: f"tail is {tail}, and {what}")
    both = torch.cat([batch.chosen, batch.rejected])
    checks.require(
        len(both.unique()) == len(both),
        lambda: f"tail is {tail}, and a sequence is in several pairs, of lengths of their own",
    )
    length = batch.sequence_sum(torch.ones_like(batch.scored, dtype=torch.float64)).long()
    shared = length.clone()
    shorter = torch.minimum(length[batch.chosen], length[batch.rejected])
    shared[batch.chosen] = shared[batch.rejected] = shorter
    before = (length.cumsum(0) - length)[batch.tokens.sequence]
    position = batch.scored.cumsum(0) - before
    beyond = position > shared[batch.tokens.sequence]
    return torch.ones_like(position, dtype=torch.float64).masked_fill(beyond, tail)
