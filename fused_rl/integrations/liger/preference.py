"""What Liger's preference losses have in common: log-probs of sequences, and what is reported.

Of hidden states [2 P, T, H] the first P sequences were chosen, each over the one P further on.
Functions and modules return (loss [], aux): aux is (log-probs of the chosen [P], of the rejected
[P], the mean of their logits [] each, NLL [], rewards of the chosen [P], of the rejected [P]),
without gradient. Means of logits are over the vocabulary and all places, padding too, as Liger's;
the NLL is 0 where the loss has none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import LMHead, TokenStats, linear_logprobs
from fused_rl import scores as of_sequences
from fused_rl.checks import is_not_negative, is_number, require, shown
from fused_rl.linear.mean_logits import mean_logits
from fused_rl.preference import PreferenceBatch, PreferenceLoss, SequenceStats
from fused_rl.reference import acc_dtype
from fused_rl.stats import IGNORE_INDEX

Output = tuple[Tensor, tuple[Tensor, ...]]
Reference = tuple[Tensor, LMHead]
Score = Callable[[SequenceStats], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Hidden states, their head, and the tokens that they predict.

    Attributes:
        hidden: [S, T, H]; head: the policy's.
        labels: [S, T] int64, IGNORE_INDEX where a token counts nowhere.
        scored, likely: [S, T] bool: the tokens that sequences are scored by, that the NLL counts
            of the chosen.
        second: [S, T]: labels that the NLL counts besides, where `labels` has others; or None.
    """

    hidden: Tensor
    head: LMHead
    labels: Tensor
    scored: Tensor
    likely: Tensor
    second: Tensor | None = None

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
    ) -> "Tokens":
        labels, scored = _labels("target", target, ignore_index)
        return cls(hidden, LMHead(weight, bias), labels, scored, scored)

    def with_nll(self, target: Tensor, ignore_index: int) -> "Tokens":
        """With labels [S, T] of the NLL's own. Where they are those of what is scored, or it has
        none, one log-prob serves both.
        """
        labels, likely = _labels("nll_target", target, ignore_index)
        require(
            labels.shape == self.labels.shape,
            lambda: (
                f"nll_target must be as target, {list(self.labels.shape)}, got {list(labels.shape)}"
            ),
        )
        is_chosen = torch.arange(len(likely), device=likely.device) < len(likely) // 2
        likely = likely & is_chosen[:, None]
        second = labels.where(likely & self.scored & (labels != self.labels), IGNORE_INDEX)
        likely = likely & (second == IGNORE_INDEX)
        merged = labels.where(likely, self.labels)
        return replace(self, labels=merged, likely=likely, second=second)

    def stats(self) -> TokenStats:
        """[S, T] each, of the policy."""
        return linear_logprobs(self.hidden, self.head, self.labels)

    def nll(self, stats: TokenStats) -> Tensor:
        """[]: the mean over the tokens of the chosen that it counts; 0 without any."""
        P = len(self.labels) // 2
        total = -stats.logprobs[:P].double().where(self.likely[:P], 0.0).sum()
        count = self.likely[:P].sum()
        if self.second is not None:
            more = linear_logprobs(self.hidden[:P], self.head, self.second[:P]).logprobs
            total = total - more.double().sum()
            count = count + (self.second != IGNORE_INDEX).sum()
        return total / count.clamp(min=1)

    @torch.no_grad()
    def ref_logprobs(self, reference: Reference | None) -> Tensor | None:
        """[S, T], where they are scored, of the reference; None without one."""
        if reference is None:
            return None
        return linear_logprobs(*reference, self.labels.where(self.scored, IGNORE_INDEX)).logprobs

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[S]: the means of each sequence's logits, over the vocabulary and all T places."""
        return mean_logits(self.hidden.mean(1, dtype=acc_dtype(self.hidden)), self.head)


def _labels(name: str, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """[S, T]: the labels, IGNORE_INDEX where they do not count, and whether they do."""
    require(
        isinstance(target, Tensor) and target.dim() == 2,
        lambda: f"{name} must be a tensor [B, T], got {shown(target)}",
    )
    counted = target != ignore_index
    return target.where(counted, IGNORE_INDEX), counted


def reference_of(
    use_ref_model: bool,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> Reference | None:
    """The reference's hidden states and head; None where it is not to be used."""
    if not use_ref_model:
        return None
    require(
        ref_input is not None and ref_weight is not None,
        lambda: (
            "use_ref_model is True, and ref_input or ref_weight is None: give both, or "
            "use_ref_model=False"
        ),
    )
    return ref_input, LMHead(ref_weight, ref_bias)


def score_of(beta: float, averaged: bool, reference: Reference | None) -> Score:
    """beta times the log-prob of a sequence, or its log-ratio; averaged: their mean per token."""
    if reference is not None:
        return of_sequences.MeanLogRatio(beta) if averaged else of_sequences.LogRatio(beta)
    return of_sequences.MeanLogProb(beta) if averaged else of_sequences.LogProb(beta)


def likelihood_of(alpha: float, wanted: bool) -> float | None:
    """The weight of the NLL; None: it is not formed."""
    is_not_negative("alpha", alpha)
    return alpha if wanted else None


def smoothing_of(label_smoothing: float) -> float:
    """label_smoothing, in [0, 1)."""
    is_number("label_smoothing", label_smoothing)
    require(
        0 <= label_smoothing < 1,
        lambda: f"label_smoothing must be in [0, 1), got {label_smoothing}",
    )
    return label_smoothing


class Pairs(NamedTuple):
    """A loss of pairs, and what is reported beside it."""

    loss: Tensor  # []
    reported: tuple[Tensor, ...]  # log-probs [P] and means of logits [] of both sides, NLL []
    scores: tuple[Tensor, Tensor]  # [P] float64, of both sides

    @property
    def output(self) -> Output:
        """The scores being the rewards."""
        return self.loss, (*self.reported, *(t.to(self.loss.dtype) for t in self.scores))


def of_pairs(
    tokens: Tokens,
    loss: PreferenceLoss,
    *,
    averaged: bool,
    likelihood: float | None = None,
    reference: Reference | None = None,
) -> Pairs:
    """The loss and `likelihood` times the NLL, or no NLL where that is None.

    averaged: whether the log-probs that are reported are means over a sequence's tokens.
    """
    ref_logprobs = tokens.ref_logprobs(reference)
    batch = PreferenceBatch.padded(tokens.labels, tokens.scored, ref_logprobs=ref_logprobs)
    stats = tokens.stats()
    value = loss(stats, batch).loss
    nll = torch.zeros_like(value)
    if likelihood is not None:
        nll = tokens.nll(stats).to(value.dtype)
        value = value + likelihood * nll
        nll = nll.detach()
    with torch.no_grad():
        _, sequences, scores, _ = loss.judged(stats, batch)
        logps = sequences.mean if averaged else sequences.sum
        sides = (batch.chosen, batch.rejected)
        logits = (tokens.logits()[rows].sum() / max(len(rows), 1) for rows in sides)
        reported = (*(logps[rows] for rows in sides), *logits, nll)
    reported = tuple(t.to(value.dtype) for t in reported)
    return Pairs(value, reported, tuple(scores[rows] for rows in sides))
