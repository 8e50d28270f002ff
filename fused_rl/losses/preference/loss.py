"""PreferenceLoss: a preference loss is a composition.

    loss = coef * sum_p weight[p] * link(score(chosen[p]), score(rejected[p])) / num_pairs
           + likelihood * mean_t of -logprobs[t] over the chosen ones' tokens

with scores from scores.py, links from links.py. Unpaired, with a link that judges both apart:

    loss = coef * (sum_c link.chosen(score[c] - point) + sum_r link.rejected(score[r] - point))
           / num_sequences + the same likelihood

named.py has the compositions that have a name. A sequence without scored tokens has score 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.batch import TokenBatch, divisor
from fused_rl.losses.means import Count, is_count
from fused_rl.losses.policy import LossOutput
from fused_rl.losses.preference.batch import PreferenceBatch, is_preference_batch
from fused_rl.losses.preference.links import Sides
from fused_rl.losses.preference.monitors import filled, monitors
from fused_rl.losses.preference.scores import scores_of
from fused_rl.losses.preference.sequences import SequenceStats, sequence_stats
from fused_rl.losses.statistics import flattened
from fused_rl.reference import acc_dtype
from fused_rl.stats import TokenStats

Point = float | Tensor | Callable[[Tensor, PreferenceBatch], Tensor]


class Judged(NamedTuple):
    """A batch as a loss sees it."""

    stats: TokenStats  # [N], flat
    sequences: SequenceStats  # [S]
    scores: Tensor  # [S]
    point: Tensor | float


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss, called as loss(stats, batch).

    Args:
        score: SequenceStats -> [S]: the implicit reward of each sequence, as in scores.py.
        link: (chosen [P], rejected [P]) -> [P], as in links.py. One for unpaired batches has
            `chosen` and `rejected`, of links.Sides.
        coef: weight of the preference term.
        likelihood: weight of the mean negative log-likelihood of the chosen ones' tokens.
        tail: what tokens beyond the length of the shorter of a pair weigh in the score: LD-DPO.
        weight: (chosen, rejected) -> [P] of SequenceStats: what each pair's loss is multiplied by,
            without gradient; None: 1.
        point: subtracted from scores: a number, a tensor [] that may be changed between steps, or
            (scores [S], batch) -> []; links of margins do not notice.
        num_pairs: pairs of the whole step, over all its micro-batches (of an unpaired batch, and
            so in the losses for it, num_sequences: those that are judged); None: of the batch.
        num_tokens: tokens of the likelihood term of the whole step; None: of the batch.
    """

    score: Callable[[SequenceStats], Tensor]
    link: Callable[[Tensor, Tensor], Tensor]
    coef: float = 1.0
    likelihood: float = 0.0
    tail: float = 1.0
    weight: Callable[[SequenceStats, SequenceStats], Tensor] | None = None
    point: Point = 0.0
    num_pairs: Count | None = None
    num_tokens: Count | None = None

    def __post_init__(self) -> None:
        checks.is_callable("score", self.score, "LogRatio(0.1)")
        checks.is_callable("link", self.link, "Logistic()")
        checks.is_not_negative("coef (beta)", self.coef)
        checks.is_not_negative("likelihood", self.likelihood)
        checks.is_not_negative("tail (alpha)", self.tail)
        if self.weight is not None:
            checks.is_callable("weight", self.weight, "fused_rl.preference.WPOWeight()")
        if isinstance(self.point, Tensor):
            checks.is_floating("point (shift)", self.point)
            checks.require(
                self.point.dim() == 0,
                lambda: f"point (shift) must be a number or [], got {list(self.point.shape)}",
            )
        elif not callable(self.point):
            checks.is_number("point (shift)", self.point)
        is_count("num_pairs (num_sequences)", self.num_pairs)
        is_count("num_tokens", self.num_tokens)

    @property
    def is_aligned(self) -> bool:
        """Whether it asks for SequenceStats.alignment, which takes a pass of its own."""
        return getattr(self.weight, "is_aligned", False)

    def __call__(self, stats: TokenStats, batch: PreferenceBatch) -> LossOutput:
        """The loss and its metrics.

        Args:
            stats: of the tokens of batch, [N] or in the shape that the batch was built from.
            batch: the sequences.

        Returns:
            LossOutput(loss, metrics), the metrics being means over the pairs (unpaired: over the
            sequences of each side):

            reward_chosen, reward_rejected: the scores, which a loss of the DPO family takes for
                rewards; margin, their difference; accuracy, the share of pairs whose chosen one
                scores higher (unpaired: of sequences on their side of the reference point).
            log_ratio: of the policy to the reference, over both sides, in nats per sequence. On
                samples of the policy its mean would be a KL; on preference data it is none.
            logprobs_chosen, logprobs_rejected: of whole sequences, in nats.
            length_chosen, length_rejected: in tokens; length_bias, the correlation over pairs of
                margin and difference in length (0 where either does not vary; paired alone).
            nll: mean of the likelihood term's tokens; entropy: of the scored tokens.
            reference_point: what was subtracted from scores (unpaired alone).
            empty_fraction: of sequences without scored tokens. unknown_fraction: of scored tokens,
                or of sequences whose sums were given, whose reference log-prob is NaN.

        Raises:
            ValueError: stats that do not fit the batch; no reference for a loss that compares with
                one; an unpaired batch for a loss of pairs.
        """
        is_preference_batch(batch)
        judged = self.judged(stats, batch)
        loss = self._loss(judged, batch).to(acc_dtype(judged.stats.logprobs))
        with torch.no_grad():
            return LossOutput(loss, monitors(*judged, batch))

    def judged(self, stats: TokenStats, batch: PreferenceBatch) -> Judged:
        """Statistics, scores and reference point of a batch."""
        flat = flattened(TokenStats(stats.logprobs, stats.entropy), batch.tokens)
        sequences = sequence_stats(flat.logprobs, batch, self.tail)
        scores = scores_of(self.score, sequences)
        point = self.point
        if callable(point) and not isinstance(point, Tensor):
            point = point(scores.detach(), batch)
        return Judged(flat, sequences, scores, point)

    def pair_losses(
        self, chosen: SequenceStats, rejected: SequenceStats, point: Tensor | float = 0.0
    ) -> Tensor:
        """[P]: what the mean over pairs is of, without coef.

        Args:
            chosen, rejected: of the pairs, [P] each.
            point: subtracted from the scores of both.

        Raises:
            ValueError: no reference for a loss that compares with one.
        """
        scores = _sides(self.score, chosen, rejected)
        losses = self.link(*(score - point for score in scores))
        return losses if self.weight is None else self.weight(chosen, rejected).detach() * losses

    def of(self, batch: PreferenceBatch) -> Callable[[TokenStats, TokenBatch], LossOutput]:
        """The loss of this batch as linear_policy_loss and model_policy_loss take one, beside
        batch.tokens.
        """
        is_preference_batch(batch)
        return of_batch(self, batch)

    def _loss(self, judged: Judged, batch: PreferenceBatch) -> Tensor:
        losses, count = self._losses(judged, batch)
        value = self.coef * losses.sum() / divisor(_count(self.num_pairs, count, losses))
        if self.likelihood:
            value = value + self.likelihood * self._nll(judged, batch)
        return value

    def _losses(self, judged: Judged, batch: PreferenceBatch) -> tuple[Tensor, Count]:
        """Of each pair or sequence, and how many the batch counts."""
        sequences, scores, point = judged.sequences, judged.scores, judged.point
        if batch.paired:
            sides = (sequences.at(rows) for rows in (batch.chosen, batch.rejected))
            return self.pair_losses(*sides, point), batch.num_chosen
        checks.require(
            isinstance(self.link, Sides) and self.weight is None,
            lambda: (
                f"{checks.shown(self)} compares pairs, and the batch is unpaired: give "
                "PreferenceBatch pairs, or take a loss of single answers, kto() or bco()"
            ),
        )
        w, l = (scores[rows] - point for rows in (batch.chosen, batch.rejected))  # noqa: E741
        losses = torch.cat([self.link.chosen(w), self.link.rejected(l)])
        return losses, batch.num_chosen + batch.num_rejected

    def _nll(self, judged: Judged, batch: PreferenceBatch) -> Tensor:
        total = -judged.stats.logprobs.double().where(batch.likely, 0.0).sum()
        return total / divisor(_count(self.num_tokens, batch.num_likely, total))


def _sides(score: Callable, chosen: SequenceStats, rejected: SequenceStats) -> tuple[Tensor, ...]:
    """What the link is given of both: each one's own scores, unless the score says otherwise."""
    if hasattr(score, "sides"):
        return score.sides(chosen, rejected)
    return scores_of(score, chosen), scores_of(score, rejected)


def _count(given: Count | None, of_batch: Count, like: Tensor) -> Tensor:
    return filled(of_batch if given is None else given, like)


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of losses of one batch: TRL's loss_weights, MPO (arXiv 2411.10442).

    Metrics are those of the first, and the loss of each as loss_0, loss_1, ...

    Args:
        parts: (weight, loss) each.
    """

    parts: tuple[tuple[float, PreferenceLoss], ...]

    def __post_init__(self) -> None:
        checks.require(
            isinstance(self.parts, tuple),
            lambda: f"parts must be a tuple of (weight, loss), got {checks.shown(self.parts)}",
        )
        checks.require(
            len(self.parts) > 0, lambda: "parts of a mixture must be one or more, got none"
        )
        for part in self.parts:
            checks.require(
                isinstance(part, tuple) and len(part) == 2,
                lambda part=part: f"parts must be (weight, loss), got {checks.shown(part)}",
            )
            checks.is_not_negative("weight of parts", part[0])
            checks.is_callable("loss of parts", part[1], "fused_rl.preference.dpo()")

    @property
    def is_aligned(self) -> bool:
        """Whether one of them is."""
        return any(getattr(loss, "is_aligned", False) for _, loss in self.parts)

    def __call__(self, stats: TokenStats, batch: PreferenceBatch) -> LossOutput:
        """The loss and its metrics; as for PreferenceLoss."""
        outputs = [loss(stats, batch) for _, loss in self.parts]
        loss = sum(weight * out.loss for (weight, _), out in zip(self.parts, outputs, strict=True))
        own = {f"loss_{i}": out.loss.detach() for i, out in enumerate(outputs)}
        return LossOutput(loss, {**outputs[0].metrics, **own})

    of = PreferenceLoss.of


Loss = Callable[[TokenStats, PreferenceBatch], LossOutput]


def of_batch(loss: Loss, batch: PreferenceBatch) -> Callable[[TokenStats, TokenBatch], LossOutput]:
    """loss(stats, batch) as a function of the batch's tokens."""
    return lambda stats, tokens: loss(stats, replace(batch, tokens=tokens))
