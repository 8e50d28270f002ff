"""Exact divergences between a student's and a teacher's distributions, from hidden states.

    D[n] = sum_v c(s[n, v], t[n, v])        s, t: softmax of each head's logits, as in logprobs.py

divergences.py has the terms c. The cost in multiples of N * H * V multiply-adds, a product
counting 2 and the hidden sizes being equal: 4 without gradients; 6 where the student's head is not
trained, for any loss of the divergence; 12 for any loss on a trained head, whose backward pass
forms the logits again; 8 where the loss is known in the forward pass (`linear_policy_loss` with a
reference).
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.kl.divergences import Divergence
from fused_rl.linear.arguments import flat_arguments, flat_temperature, named
from fused_rl.linear.head import LMHead
from fused_rl.stats import IGNORE_INDEX, DivergenceStats


def linear_divergence(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor | nn.Linear,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = Divergence.REVERSE,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
    vocabulary: range | None = None,
) -> DivergenceStats:
    """The divergence between two distributions per token, over all entries of the vocabulary.

    All results are differentiable: the divergence with respect to both sides' hidden, weight and
    bias, the others with respect to their own side's. What requires no gradient costs none. Logits
    are float32 whatever the dtypes of the inputs, and neither side's are ever [N, V]. Distributions
    that hardly differ keep their digits: terms whose sum would cancel are not formed. torch.compile
    and torch.func work as for linear_logprobs, torch.autocast too.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the student's states.
        head: LMHead, a weight [V, H], or a torch.nn.Linear: the student's.
        teacher_hidden: [..., H'], as hidden; the dtype and H' may be others.
        teacher_head: as head, [V, H'], with its own bias, scale and softcap.
        labels: [...], int64 or int32, in [0, V) or ignore_index; None: every token counts, and
            there are no log-probabilities of labels.
        divergence: which; divergences.py has the formulas.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        teacher_temperature: the same for the teacher; None: that of the student.
        ignore_index: tokens with this label give 0 everywhere, no gradient, and cost nothing.
        chunk_bytes: bound on the buffer for both sides' logits; default 256 MiB, on CUDA a 56th of
            the card's memory and 1 GiB at least.
        vocabulary: range(start, stop): the entries that both distributions are over; those outside
            have no probability on either side. None: all of them, as many on both sides.

    Returns:
        DivergenceStats(divergence, logprobs, entropy, teacher_logprobs, teacher_entropy), each in
        the shape of labels, in nats. An entry that neither side can sample (logits of -inf) adds
        nothing. Where only one side cannot, a divergence that is infinite there is inf, with a
        finite gradient: that of a log-ratio of 100 nats. Exponents of log-ratios (CHI_SQUARE,
        HELLINGER, ALPHA) are held at 80 nats, in values and gradients.

    Raises:
        ValueError: as for linear_logprobs, of either side; vocabularies of different sizes without
            a `vocabulary`; one that is no range inside both.
        NotImplementedError: a forward-mode or second derivative.
    """
    checks.is_floating("hidden", hidden)
    given = labels
    if given is None:
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    checks.require(
        isinstance(divergence, Divergence),
        lambda: f"divergence must be a Divergence, got {divergence!r}",
    )
    checks.is_integer("ignore_index", ignore_index)
    checks.chunk_bytes_is_positive(chunk_bytes)
    student = Side(hidden, LMHead.of(head), temperature, "")
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    teacher = Side(teacher_hidden, _of_teacher(teacher_head), of_teacher, "teacher_")
    for side in (student, teacher):
        side.head.is_here("linear_divergence")
    if vocabulary is not None:
        student, teacher = student.over(vocabulary), teacher.over(vocabulary)
        if given is not None:
            labels, ignore_index = counted_from(vocabulary, labels, ignore_index), OUTSIDE
    heads = two_heads(student, teacher, labels)
    limits = ops.Limits(ignore_index, ops.scratch_bytes(hidden.device, chunk_bytes))
    stats = named(flat_divergence, heads, divergence, limits, shape=labels.shape)
    stats = DivergenceStats(*(x.reshape(labels.shape) for x in stats))
    return stats._replace(logprobs=None, teacher_logprobs=None) if given is None else stats


def _of_teacher(head: object) -> LMHead:
    """LMHead.of(head); what it says is wrong is the teacher's."""
    try:
        return LMHead.of(head)
    except ValueError as error:
        raise ValueError(re.sub(r"^(head|weight|bias)\b", r"teacher_\1", str(error))) from error


# Of labels that are ignored, where the entries are counted from another than the first: no label of
# any vocabulary, and no mistake of a caller's either.
OUTSIDE = -(2**63)


class Side(NamedTuple):
    """The student's arguments, or the teacher's."""

    hidden: Tensor  # [..., H]
    head: LMHead
    temperature: float | Tensor
    whose: str  # what the arguments' names begin with

    def over(self, vocabulary: range) -> "Side":
        """The same with some vocabulary entries alone."""
        head, V = self.head, len(self.head.weight)
        checks.require(
            isinstance(vocabulary, range)
            and vocabulary.step == 1
            and 0 <= vocabulary.start < vocabulary.stop <= V,
            lambda: (
                f"vocabulary must be range(start, stop) inside both vocabularies, got "
                f"{vocabulary!r}, and {self.whose}weight has {V} entries"
            ),
        )
        return self._replace(head=head.of_rows(slice(vocabulary.start, vocabulary.stop)))


def counted_from(vocabulary: range, labels: Tensor, ignore_index: int) -> Tensor:
    """labels counted from the first entry of a range, OUTSIDE where they are ignored."""
    checks.is_labels(labels)
    labels = labels.long()
    ignored = labels == ignore_index
    inside = (labels >= vocabulary.start) & (labels < vocabulary.stop)
    # Not on CUDA, where looking would wait for the device: such a token's log-prob is NaN there.
    if not labels.is_cuda and checks.has_values(labels) and not (inside | ignored).all():
        n = tuple((~(inside | ignored)).nonzero()[0].tolist())
        place = ", ".join(map(str, n))
        raise ValueError(
            f"labels[{place}] is {int(labels[n])}, outside vocabulary {vocabulary} and not "
            f"ignore_index ({ignore_index})"
        )
    return torch.where(ignored, OUTSIDE, labels - vocabulary.start)


def two_heads(student: Side, teacher: Side, labels: Tensor) -> ops.TwoHeads:
    """Both sides checked, and flattened to [N, ...]."""
    V, of_teacher = len(student.head.weight), len(teacher.head.weight)
    checks.require(
        of_teacher == V,
        lambda: (
            f"weight has {V} vocabulary entries and teacher_weight {of_teacher}: give "
            f"vocabulary=range({min(V, of_teacher)}) if the first of them are the same tokens"
        ),
    )
    sides = (student, teacher)
    flat = [flat_arguments(s.hidden, s.head, labels, s.temperature, s.whose) for s in sides]
    heads = ops.TwoHeads.of(*flat)
    # Both in the dtype of both sides' logits.
    temperatures = (flat_temperature(s.temperature, labels, heads.dtype, s.whose) for s in sides)
    return heads._replace(
        **dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    )


def flat_divergence(
    heads: ops.TwoHeads, divergence: Divergence, limits: ops.Limits
) -> DivergenceStats:
    """linear_divergence of what two_heads returns, [N] each."""
    measure = ops.Measure(divergence.kind, divergence.parameter, divergence.factor)
    op = ops.linear_divergence
    if torch.is_grad_enabled() and not transformed() and _only_hidden(heads):
        op = ops.linear_divergence_frozen
    stats = op(heads, measure, limits)
    return DivergenceStats(
        *(stats.divergence, stats.logprobs, stats.entropy),
        *(stats.teacher_logprobs, stats.teacher_entropy),
    )


def _only_hidden(heads: ops.TwoHeads) -> bool:
    """Whether the student's hidden states are all that requires a gradient."""
    others = [t for t in heads[1:6] if t is not None]
    return heads.hidden.requires_grad and not any(t.requires_grad for t in others)
