"""Liger's Jensen-Shannon losses straight from two heads.

Liger has an autograd function of one name in two places, with different arguments: that of its ops
is here LigerFusedLinearJSDFunction, that of its chunked losses ChunkedJSDFunction.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_rl import (
    Divergence,
    DivergenceStats,
    LMHead,
    LossOutput,
    TokenBatch,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
)
from fused_rl.checks import require
from fused_rl.stats import IGNORE_INDEX


class LigerFusedLinearJSDFunction:
    """The function of Liger's ops, behind LigerFusedLinearJSD, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
        jsd_beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        jsd_impl: str | None = None,
        jsd_mode: str | None = None,
    ) -> Tensor:
        """The mean of JSD(jsd_beta) over the tokens that count, with the student's gradients.

        Args:
            student_input: [N, H]; student_weight: [V, H].
            teacher_input: [N, H']; teacher_weight: [V, H'].
            shift_labels: [N], ignore_index does not count; None: all count.
            jsd_beta: 0 is KL(teacher, student), 1 is KL(student, teacher).
            temperature: of both; positive.
            accum_dtype, jsd_impl, jsd_mode: accepted; they change nothing here.

        Returns:
            [], float32 (float64 for float64 inputs).

        Raises:
            ValueError: vocabularies of different sizes; as linear_divergence raises.
        """
        pair = _Pair.of(student_input, student_weight, None, teacher_input, teacher_weight, None)
        tokens = _Tokens.of(pair, shift_labels, ignore_index)
        return pair.loss(tokens, _Mean(Divergence.JSD(jsd_beta), tokens.count()), temperature)


class LigerFusedLinearJSD(torch.nn.Module):
    """The mean of JSD(jsd_beta) straight from two heads: Liger's module of its ops.

    Args:
        jsd_beta: 0 is KL(teacher, student), 1 is KL(student, teacher).
        ignore_index: tokens with this label do not count.
        temperature: of both.
        accum_dtype: accepted; sums over tokens are float32 here.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """[]; arguments as LigerFusedLinearJSDFunction.apply has them."""
        return LigerFusedLinearJSDFunction.apply(
            *(student_input, student_weight, teacher_input, teacher_weight, shift_labels),
            *(self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype),
        )


class ChunkedJSDFunction:
    """The function of Liger's chunked losses, behind LigerFusedLinearJSDLoss, as apply()."""

    @staticmethod
    def apply(
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """weight_hard_loss * cross-entropy + weight_soft_loss * JSD(beta), means over the tokens.

        The cross-entropy is at temperature 1, as Liger's is.

        Args:
            student_input: [N, H]; student_weight: [V, H]; student_bias: [V] or None.
            teacher_input: [N, H']; teacher_weight: [V, H']; teacher_bias: [V] or None.
            true_labels: [N] int64; ignore_index does not count.
            compiled, chunk_size: accepted; they change nothing here.
            return_soft_hard_loss: whether the two means are returned too.

        Returns:
            loss [], or (loss, soft loss, hard loss).

        Raises:
            ValueError: vocabularies of different sizes; as linear_divergence raises.
        """
        student = (student_input, student_weight, student_bias)
        pair = _Pair.of(*student, teacher_input, teacher_weight, teacher_bias)
        tokens = _Tokens.of(pair, true_labels, ignore_index)
        weights = (weight_hard_loss, weight_soft_loss)
        mean = _Mean(Divergence.JSD(beta), tokens.count(), *weights)
        if not return_soft_hard_loss and (temperature == 1 or not weight_hard_loss):
            return pair.loss(tokens, mean, temperature)
        soft = pair.divergences(tokens, mean.divergence, temperature).sum() / mean.count
        hard = -linear_logprobs(student_input, pair.head, tokens.ignored()).logprobs.sum()
        hard = hard / mean.count
        loss = weight_hard_loss * hard + weight_soft_loss * soft
        return (loss, soft, hard) if return_soft_hard_loss else loss


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Hard and soft loss of distillation straight from two heads: Liger's chunked module.

    Args:
        weight_hard_loss: of the cross-entropy of the labels, at temperature 1.
        weight_soft_loss: of JSD(beta) to the teacher.
        beta: 0 is KL(teacher, student), 1 is KL(student, teacher).
        ignore_index: tokens with this label do not count.
        temperature: of both distributions in the JSD.
        compiled, chunk_size: accepted; they change nothing here.
        return_soft_hard_loss: whether forward returns (loss, soft loss, hard loss).
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """loss [], or (loss, soft, hard); arguments as ChunkedJSDFunction.apply has them."""
        return ChunkedJSDFunction.apply(
            *(student_input, student_weight, teacher_input, teacher_weight, true_labels),
            *(student_bias, teacher_bias, self.weight_hard_loss, self.weight_soft_loss),
            *(self.beta, self.ignore_index, self.temperature, self.compiled, self.chunk_size),
            self.return_soft_hard_loss,
        )


class _Tokens(NamedTuple):
    labels: Tensor  # [N] int64
    counted: Tensor  # [N] bool

    @classmethod
    def of(cls, pair: "_Pair", labels: Tensor | None, ignore_index: int) -> "_Tokens":
        """Without labels every token counts."""
        if labels is None:
            labels = torch.zeros(len(pair.hidden), dtype=torch.int64, device=pair.hidden.device)
            return cls(labels, torch.ones_like(labels, dtype=torch.bool))
        return cls(labels, labels != ignore_index)

    def count(self) -> Tensor:
        """[]: at least 1."""
        return self.counted.sum().clamp(min=1)

    def ignored(self) -> Tensor:
        """labels, IGNORE_INDEX where they do not count."""
        return self.labels.where(self.counted, IGNORE_INDEX)


@dataclass(frozen=True)
class _Mean:
    """hard * cross-entropy + soft * divergence, the mean over `count` tokens."""

    divergence: Divergence
    count: Tensor
    hard: float = 0.0
    soft: float = 1.0
    token_separable: ClassVar = True

    def __call__(self, stats: DivergenceStats, batch: TokenBatch) -> LossOutput:
        losses = self.soft * stats.divergence - self.hard * stats.logprobs
        return LossOutput(losses.sum() / self.count, {})


class _Pair(NamedTuple):
    """The student's states and head, and the teacher's, which get no gradient."""

    hidden: Tensor
    head: LMHead
    teacher_hidden: Tensor
    teacher_head: LMHead

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
    ) -> "_Pair":
        V, of_teacher = len(weight), len(teacher_weight)
        least = min(V, of_teacher)
        require(
            of_teacher == V,
            lambda: (
                f"student_weight has {V} vocabulary entries and teacher_weight {of_teacher}: where "
                f"the first {least} are the same tokens, give weight[:{least}]"
            ),
        )
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
        teacher = LMHead(teacher_weight.detach(), teacher_bias)
        return cls(hidden, LMHead(weight, bias), teacher_hidden.detach(), teacher)

    def loss(self, tokens: _Tokens, mean: _Mean, temperature: float) -> Tensor:
        """[]: in one pass, where that pays."""
        batch = TokenBatch.padded(
            tokens.labels[None],
            tokens.counted[None],
            torch.zeros_like(tokens.counted).float()[None],
        )
        reference = (self.teacher_hidden[None], self.teacher_head)
        given = (self.hidden[None], self.head, batch, mean)
        return linear_policy_loss(*given, temperature=temperature, reference=reference).loss

    def divergences(self, tokens: _Tokens, divergence: Divergence, temperature: float) -> Tensor:
        """[N], for any loss."""
        options = {"divergence": divergence, "temperature": temperature}
        return linear_divergence(*self, tokens.ignored(), **options).divergence
