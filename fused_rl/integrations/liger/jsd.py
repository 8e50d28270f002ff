"""Liger's Jensen-Shannon losses straight from two heads.

Liger has an autograd function of one name in two places, with different arguments: that of its ops
is here LigerFusedLinearJSDFunction, that of its chunked losses ChunkedJSDFunction.
"""

import torch
from torch import Tensor

from fused_rl import Divergence, DivergenceStats, LMHead, linear_divergence, linear_logprobs
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
        heads = LMHead(student_weight), LMHead(teacher_weight)
        given = (student_input, heads[0], teacher_input, heads[1], shift_labels)
        stats = _divergences(*given, jsd_beta, ignore_index, temperature)
        return _mean(stats.divergence, shift_labels, ignore_index)


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
        student = LMHead(student_weight, student_bias)
        heads = (student_input, student, teacher_input, LMHead(teacher_weight, teacher_bias))
        stats = _divergences(*heads, true_labels, beta, ignore_index, temperature)
        soft = _mean(stats.divergence, true_labels, ignore_index)
        if not (weight_hard_loss or return_soft_hard_loss):
            return weight_soft_loss * soft
        logprobs = stats.logprobs
        if temperature != 1:
            given = (student_input, student, true_labels)
            logprobs = linear_logprobs(*given, ignore_index=ignore_index).logprobs
        hard = _mean(-logprobs, true_labels, ignore_index)
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


def _divergences(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    labels: Tensor | None,
    beta: float,
    ignore_index: int,
    temperature: float,
) -> DivergenceStats:
    """JSD(beta) per token; no gradient reaches the teacher."""
    V, of_teacher = len(head.weight), len(teacher_head.weight)
    require(
        of_teacher == V,
        lambda: (
            f"student_weight has {V} vocabulary entries and teacher_weight {of_teacher}: where the "
            f"first {min(V, of_teacher)} are the same tokens, give weight[:{min(V, of_teacher)}]"
        ),
    )
    bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    teacher = (teacher_hidden.detach(), LMHead(teacher_head.weight.detach(), bias))
    options = {"temperature": temperature, "ignore_index": ignore_index}
    return linear_divergence(
        hidden, head, *teacher, labels, divergence=Divergence.JSD(beta), **options
    )


def _mean(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Over the tokens that count, which alone are not 0; 0 where there are none."""
    if labels is None:
        return values.sum() / max(len(values), 1)
    return values.sum() / (labels != ignore_index).sum().clamp(min=1)
