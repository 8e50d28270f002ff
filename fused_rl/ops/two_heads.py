"""What the operators of two heads are functions of, and their formulas in plain torch.

dz[n, v] = ddivergence[n] (g[n, v] - s[n, v] sum_u g[n, u])    and the gradient of formulas.py,
with g the slopes of reference.py; of the teacher with its own slopes and its own probabilities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.formulas import of_product, softmax_gradient, statistics
from fused_rl.ops.record import Head, Upstream


class TwoHeads(NamedTuple):
    """A student's head and a teacher's, for the same N tokens and V vocabulary entries."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    teacher_hidden: Tensor  # [N, H']
    teacher_weight: Tensor  # [V, H']
    teacher_bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N]
    teacher_temperature: Tensor  # [N]
    scale: float
    softcap: float
    rounding: int
    teacher_scale: float
    teacher_softcap: float
    teacher_rounding: int

    @classmethod
    def of(cls, student: Head, teacher: Head) -> "TwoHeads":
        """labels are the student's."""
        tensors = (*student[:3], *teacher[:3], student.labels)
        temperatures = (student.temperature, teacher.temperature)
        return cls(*tensors, *temperatures, *student[5:], *teacher[5:])

    def student(self) -> Head:
        tensors = (self.hidden, self.weight, self.bias, self.labels, self.temperature)
        return Head(*tensors, self.scale, self.softcap, self.rounding)

    def teacher(self) -> Head:
        tensors = (self.teacher_hidden, self.teacher_weight, self.teacher_bias, self.labels)
        return Head(*tensors, self.teacher_temperature, *self[12:])

    def swapped(self) -> "TwoHeads":
        """The teacher in the student's place, and the other way round."""
        return TwoHeads.of(self.teacher(), self.student())

    @property
    def dtype(self) -> torch.dtype:
        """What the logits of both are formed in."""
        return reference.acc_dtype(*self[:2], *self[3:5])

    def at(self, rows: Tensor | slice) -> "TwoHeads":
        """The same for some of the tokens."""
        return TwoHeads.of(self.student().at(rows), self.teacher().at(rows))


class Measure(NamedTuple):
    """The divergence: fields of divergences.Divergence."""

    kind: int
    parameter: float
    factor: float

    def swapped(self) -> "Measure":
        """The one whose value is the same when the two distributions change places."""
        ends = {reference.REVERSE: reference.FORWARD, reference.FORWARD: reference.REVERSE}
        rest = self.parameter if self.kind in ends else 1.0 - self.parameter
        return Measure(ends.get(self.kind, self.kind), rest, self.factor)


class TwoStatistics(NamedTuple):
    """[N] each; lse and teacher_lse in float64. divergence = slope + teacher_slope, or infinite."""

    divergence: Tensor
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    teacher_logprobs: Tensor
    teacher_entropy: Tensor
    teacher_lse: Tensor
    slope: Tensor  # sum_v g
    teacher_slope: Tensor  # sum_v g'


class TwoUpstream(NamedTuple):
    """The gradients of a loss with respect to the statistics, [N] each."""

    ddivergence: Tensor
    dlogprobs: Tensor
    dentropy: Tensor
    dteacher_logprobs: Tensor
    dteacher_entropy: Tensor

    def swapped(self) -> "TwoUpstream":
        return TwoUpstream(self.ddivergence, *self[3:], *self[1:3])

    def of_student(self) -> Upstream:
        return Upstream(self.dlogprobs, self.dentropy)

    def live(self, labels: Tensor, ignore_index: int) -> Tensor:  # [N] bool
        """The tokens that count and have a gradient with respect to the student; NaN is one."""
        found = (self.ddivergence != 0) | (self.dlogprobs != 0) | (self.dentropy != 0)
        return (labels != ignore_index) & found


class TwoKnown(NamedTuple):
    """What the backward pass takes from the forward pass, [N] each."""

    lse: Tensor
    entropy: Tensor
    teacher_lse: Tensor
    teacher_entropy: Tensor
    slope: Tensor
    teacher_slope: Tensor

    def swapped(self) -> "TwoKnown":
        lse, entropy, teacher_lse, teacher_entropy, slope, teacher_slope = self
        return TwoKnown(teacher_lse, teacher_entropy, lse, entropy, teacher_slope, slope)


def two_statistics_like(heads: TwoHeads) -> TwoStatistics:
    """Room for the statistics of N tokens."""
    N = heads.hidden.shape[:1]
    wide = ("lse", "teacher_lse")
    dtypes = (torch.float64 if n in wide else heads.dtype for n in TwoStatistics._fields)
    return TwoStatistics(*(heads.hidden.new_empty(N, dtype=dtype) for dtype in dtypes))


def pair_of(z: Tensor, teacher_z: Tensor) -> reference.Pair:
    """Of logits [N, V] in one dtype: their difference first, for they may be near each other."""
    logs, logt = torch.log_softmax(z, -1), torch.log_softmax(teacher_z, -1)
    lse, teacher_lse = (torch.logsumexp(x.double(), -1) for x in (z, teacher_z))
    gap = lse - teacher_lse
    high = gap.to(z.dtype)
    d = ((z - teacher_z) - high[:, None]) - (gap - high).to(z.dtype)[:, None]
    # Of an infinite logit, or of those that have no room for their sum, only log p is known.
    d = d.where(d.isfinite(), logs - logt)
    return reference.Pair.of(logs, logt, d)


def two_statistics(z: Tensor, teacher_z: Tensor, labels: Tensor, measure: Measure) -> TwoStatistics:
    """Of logits [N, V] in one dtype."""
    kind, parameter, factor = measure
    pair = pair_of(z, teacher_z)
    g, of_teacher = reference.slopes(pair, kind, parameter)
    infinite = reference.is_infinite(pair.d, kind, parameter).any(-1)
    # Each term first: an error of normalisation is in both of its slopes, and cancels there.
    total = factor * (g + of_teacher).sum(-1, dtype=torch.float64)
    sums = (factor * x.sum(-1, dtype=torch.float64) for x in (g, of_teacher))
    divergence = total.masked_fill(infinite, torch.inf).to(z.dtype)
    student, teacher = statistics(z, labels), statistics(teacher_z, labels)
    return TwoStatistics(divergence, *student[:3], *teacher[:3], *(x.to(z.dtype) for x in sums))


def student_gradient(
    upstream: TwoUpstream,
    heads: TwoHeads,
    measure: Measure,
    known: TwoKnown,
    z: Tensor,  # [N, V]
    teacher_z: Tensor,  # [N, V]
) -> Tensor:
    """draw, the gradient of hidden . weight^T of the student, [N, V]."""
    kind, parameter, factor = measure
    pair, head = pair_of(z, teacher_z), heads.student()
    g, _ = reference.slopes(pair, kind, parameter)
    of_divergence = factor * g - pair.s * known.slope[:, None]
    dz = upstream.ddivergence[:, None] * of_divergence.masked_fill(z == -torch.inf, 0.0)
    of_log = (upstream.of_student(), known.entropy, torch.log_softmax(z, -1), heads.labels)
    return of_product(dz + softmax_gradient(*of_log), head, z)
