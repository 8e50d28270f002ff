"""The tokens whose two log-probs are known, the difference of each, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.estimators import KL, kl_penalty
from fused_rl.losses.sequences import segment_sum, sequence_ids


class TokenGap(NamedTuple):
    """A token's place, (sequence, token) or (token,), and its two log-probs in nats."""

    at: tuple[int, ...]
    logprob: float
    rollout_logprob: float

    @property
    def difference(self) -> float:
        """logprob - rollout_logprob."""
        return self.logprob - self.rollout_logprob


@dataclass(frozen=True)
class Gaps:
    """Vectors [n] on the host, float64: of the tokens that count, those with two finite log-probs.

    logprobs, rollout: in nats. sequence, token: int64, where they stand. sequences: how many there
    are, None where that was not said.
    """

    logprobs: Tensor
    rollout: Tensor
    sequence: Tensor
    token: Tensor
    sequences: int | None

    def __len__(self) -> int:
        return len(self.logprobs)

    def where(self, keep: Tensor) -> Gaps:
        """Those tokens alone."""
        vectors = (self.logprobs, self.rollout, self.sequence, self.token)
        return Gaps(*(vector[keep] for vector in vectors), self.sequences)

    @cached_property
    def d(self) -> Tensor:
        """logprobs - rollout."""
        return self.logprobs - self.rollout

    @cached_property
    def sizes(self) -> Tensor:
        """|d|."""
        return self.d.abs()

    @property
    def mean_size(self) -> float:
        return self.sizes.mean().item()

    def kl(self, kind: KL) -> float:
        """The mean estimate per token of KL(rollout || trainer): the rollout is what sampled."""
        return kl_penalty(self.rollout, self.logprobs, value=kind).mean().item()

    def sums(self, values: Tensor) -> Tensor:
        """[B]: of values [n], over each sequence."""
        return segment_sum(values, self.sequence, self.sequences or 1)

    @cached_property
    def lengths(self) -> Tensor:
        """[B]: tokens of each sequence."""
        return self.sums(torch.ones_like(self.d))

    def gap(self, i: int) -> TokenGap:
        """The token at i, by its place."""
        place = (self.sequence[i], self.token[i])[0 if self.sequences is not None else 1 :]
        at = tuple(int(index) for index in place)
        return TokenGap(at, self.logprobs[i].item(), self.rollout[i].item())


class Counts(NamedTuple):
    """Tokens under the mask, and those among them that are apart: NaN, or infinite."""

    tokens: int
    unknown: int
    unknown_of_trainer: int
    infinite: int
    infinite_of_trainer: int
    # Of the tokens that only the engine does not know: those that are certain to the trainer.
    unknown_but_certain: int


# A log-prob above it belongs to a token that is all but certain.
CERTAIN = -1e-2


def counted(
    logprobs: Tensor, rollout: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Gaps, Counts]:
    """What is known, and what is not. Errors: as of mismatch_report."""
    _are_right(logprobs, rollout, loss_mask)
    shape = logprobs.shape
    host = torch.device("cpu")
    sequences, starts = None, torch.zeros(1, dtype=torch.int64, device=host)
    sequence = torch.zeros(logprobs.numel(), dtype=torch.int64, device=host)
    if cu_seqlens is not None or len(shape) == 2:
        sequence, sequences = sequence_ids(shape, cu_seqlens, host)
        starts = torch.searchsorted(sequence, torch.arange(sequences, device=host))
    token = torch.arange(logprobs.numel(), device=host)
    if sequences:
        token = token - starts[sequence]
    current, sampled = (t.detach().to(host).double().reshape(-1) for t in (logprobs, rollout))
    mask = torch.ones_like(token, dtype=torch.bool)
    if loss_mask is not None:
        mask = loss_mask.detach().to(host).bool().reshape(-1)
    every = Gaps(current, sampled, sequence, token, sequences).where(mask)
    ours, theirs = every.logprobs, every.rollout
    unknown, infinite = ours.isnan() | theirs.isnan(), ours.isinf() | theirs.isinf()
    counts = Counts(
        len(every),
        int(unknown.sum()),
        int(ours.isnan().sum()),
        int((infinite & ~unknown).sum()),
        int((ours.isinf() & ~unknown).sum()),
        int((theirs.isnan() & (ours > CERTAIN)).sum()),
    )
    return every.where(~unknown & ~infinite), counts


def _are_right(logprobs: Tensor, rollout: Tensor, loss_mask: Tensor | None) -> None:
    checks.is_floating("logprobs", logprobs)
    checks.is_floating("rollout_logprobs", rollout)
    checks.require(
        logprobs.dim() in (1, 2),
        lambda: f"logprobs must be [N] or [B, T], got {list(logprobs.shape)}",
    )
    checks.same_shape("rollout_logprobs", rollout, "logprobs", logprobs)
    if loss_mask is not None:
        checks.is_mask("loss_mask", loss_mask)
        checks.same_shape("loss_mask", loss_mask, "logprobs", logprobs)
    for name, tensor in (("logprobs", logprobs), ("rollout_logprobs", rollout)):
        checks.require(
            checks.has_values(tensor),
            lambda name=name: f"{name} must have values, and a meta tensor has none",
        )


def effective_share(log_weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of n importance weights, by their logarithms; NaN of none."""
    if not len(log_weights):
        return math.nan
    once, twice = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    return (2 * once - twice - math.log(len(log_weights))).exp().item()
