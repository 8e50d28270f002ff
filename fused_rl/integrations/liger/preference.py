"""What Liger's preference losses have in common: log-probs of sequences, and what is reported.

Of hidden states [2 P, T, H] the first P sequences were chosen, each over the one P further on.
Functions and modules return (loss [], aux): aux is (log-probs of the chosen [P], of the rejected
[P], the mean of their logits [] each, NLL [], rewards of the chosen [P], of the rejected [P]),
without gradient. Means of logits are over the vocabulary and the tokens that count; the NLL is 0
where the loss has none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import LMHead, TokenStats, linear_logprobs, scores
from fused_rl.checks import is_not_negative, is_number, require, shown
from fused_rl.linear.mean_logits import mean_logits
from fused_rl.preference import PreferenceBatch, PreferenceLoss, SequenceStats
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
        scored: [S, T] bool: the tokens that sequences are scored by.
        likely: [S, T] bool: those that the NLL counts; None: as scored.
    """

    hidden: Tensor
    head: LMHead
    labels: Tensor
    scored: Tensor
    likely: Tensor | None = None

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
    ) -> "Tokens":
        labels, scored = _labels("target", target, ignore_index)
        return cls(hidden, LMHead(weight, bias), labels, scored)

    def with_nll(self, target: Tensor, ignore_index: int) -> "Tokens":
        """With labels [S, T] of the NLL's own, of which the chosen ones count."""
        labels, likely = _labels("nll_target", target, ignore_index)
        require(
            labels.shape == self.labels.shape,
            lambda: (
                f"nll_target must be as target, {list(self.labels.shape)}, got {list(labels.shape)}"
            ),
        )
        likely = (
            likely & (torch.arange(len(likely), device=likely.device) < len(likely) // 2)[:, None]
        )
        both = (likely & self.scored & (labels != self.labels)).nonzero().tolist()
        require(
            not both,
            lambda: f"target and nll_target have two labels for the token at {both[0]}",
        )
        return replace(self, labels=labels.where(likely, self.labels), likely=likely)

    def stats(self) -> TokenStats:
        """[S, T] each, of the policy."""
        return linear_logprobs(self.hidden, self.head, self.labels)

    @torch.no_grad()
    def ref_logprobs(self, reference: Reference | None) -> Tensor | None:
        """[S, T], where they are scored, of the reference; None without one."""
        if reference is None:
            return None
        return linear_logprobs(*reference, self.labels.where(self.scored, IGNORE_INDEX)).logprobs

    def logits(self) -> Tensor:
        """[S]: the sums over the scored tokens of each one's mean logit."""
        means = mean_logits(self.hidden.detach(), self.head)
        return means.where(self.scored, 0.0).sum(-1)


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
        return scores.MeanLogRatio(beta) if averaged else scores.LogRatio(beta)
    return scores.MeanLogProb(beta) if averaged else scores.LogProb(beta)


def likelihood_of(alpha: float, wanted: bool) -> float:
    """The weight of the NLL."""
    is_not_negative("alpha", alpha)
    return alpha if wanted else 0.0


def smoothing_of(label_smoothing: float, below: float = 1.0) -> float:
    """label_smoothing, in [0, below)."""
    is_number("label_smoothing", label_smoothing)
    require(
        0 <= label_smoothing < below,
        lambda: f"label_smoothing must be in [0, {below}), got {label_smoothing}",
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
    reference: Reference | None = None,
) -> Pairs:
    """The loss; averaged: the log-probs that are reported are means over a sequence's tokens."""
    masks = {"likelihood_mask": tokens.likely, "ref_logprobs": tokens.ref_logprobs(reference)}
    batch = PreferenceBatch.padded(tokens.labels, tokens.scored, **masks)
    stats = tokens.stats()
    value, metrics = loss(stats, batch)
    with torch.no_grad():
        _, sequences, rewards, _ = loss.judged(stats, batch)
        logps = sequences.mean if averaged else sequences.sum
        logits, count = tokens.logits(), sequences.length
        sides = (batch.chosen, batch.rejected)
        means = (logits[rows].sum() / count[rows].sum().clamp(min=1) for rows in sides)
        nll = metrics["nll"] if loss.likelihood else torch.zeros_like(metrics["nll"])
        reported = (*(logps[rows] for rows in sides), *means, nll)
    reported = tuple(t.to(value.dtype) for t in reported)
    return Pairs(value, reported, tuple(rewards[rows] for rows in sides))
