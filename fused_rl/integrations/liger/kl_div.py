"""Liger's KL to a distribution that is given as a tensor of probabilities [N, V]."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_rl.checks import require
from fused_rl.ops import in_full
from fused_rl.reference import acc_dtype
from fused_rl.stats import IGNORE_INDEX

_REDUCTIONS = ("batchmean", "mean", "sum")
# Logits that are held at once: 64 MiB of float32.
_LOGITS = 2**24


class LigerFusedLinearKLDivFunction:
    """The function behind LigerFusedLinearKLDivLoss, as apply() of positional arguments.

    It is no torch.autograd.Function itself; what apply returns is differentiable.
    """

    @staticmethod
    def apply(
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
        reduction: str = "batchmean",
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """sum_v q (log q - log p) over the tokens that count, p = softmax(student / temperature).

        Logits are formed in float32, chunk by chunk, and once more in the backward pass.

        Args:
            student_input: [N, H]; student_weight: [V, H].
            target: [N, V]: q, no gradient; its sum need not be 1, as in torch.nn.KLDivLoss.
            shift_labels: [N], ignore_index does not count; None: all count.
            reduction: "batchmean", "mean" (also over V) or "sum".
            temperature: of the student alone; positive.
            eps: q is held above it in log q.
            accum_dtype: accepted; sums over tokens are float32 here.

        Returns:
            [], float32 (float64 for float64 inputs).

        Raises:
            ValueError: shapes, a reduction or a temperature that are not as above.
        """
        (N, _), V = student_input.shape, len(student_weight)
        require(
            target.shape == (N, V),
            lambda: f"target must be [N, V] = {[N, V]}, got {list(target.shape)}",
        )
        require(
            shift_labels is None or shift_labels.shape == (N,),
            lambda: f"shift_labels must be [N] = {[N]}, got {list(shift_labels.shape)}",
        )
        require(
            reduction in _REDUCTIONS,
            lambda: f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}",
        )
        require(temperature > 0, lambda: f"temperature must be positive, got {temperature}")
        counted = torch.arange(N, device=student_input.device)
        if shift_labels is not None:
            counted = counted[shift_labels != ignore_index]
        # Once, so that the gradients of all chunks are added up in float32.
        weight = student_weight.to(acc_dtype(student_input, student_weight))
        of_rows = in_full(_divergences)
        # Of no tokens, so that no token at all is a loss of 0 with gradients of 0.
        total = student_input[:0].to(weight.dtype).sum() + weight[:0].sum()
        for rows in counted.split(max(_LOGITS // V, 1)):
            given = (student_input[rows], weight, target[rows].detach(), temperature, eps)
            total = total + checkpoint(of_rows, *given, use_reentrant=False)
        count = {"batchmean": len(counted), "mean": len(counted) * V, "sum": 1}[reduction]
        return total / max(count, 1)


def _divergences(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, eps: float
) -> Tensor:
    """The sum over tokens of q (log q - log p), as that of q d + p - q, and of q - p: what rounding
    does to d cancels between q d and p.
    """
    logp = torch.log_softmax(hidden.to(weight.dtype) @ weight.T / temperature, -1)
    q = target.to(weight.dtype)
    d = q.clamp(min=eps).log() - logp
    delta = torch.where(q > eps, q * torch.expm1(-d), logp.exp() - q)
    excess = q.sum(dtype=torch.float64) - len(q)
    return (q * d + delta).sum() + excess.to(q.dtype)


liger_fused_linear_kl_div = LigerFusedLinearKLDivFunction.apply
"""Liger's name for it among its functions."""


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """KL(target, student) of given probabilities, straight from hidden states.

    Args:
        reduction: "batchmean", "mean" or "sum".
        ignore_index: tokens with this label do not count.
        temperature: of the student alone.
        eps: probabilities of the target are held above it in their logarithm.
        accum_dtype: accepted; sums over tokens are float32 here.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """[]; arguments as LigerFusedLinearKLDivFunction.apply has them."""
        return LigerFusedLinearKLDivFunction.apply(
            *(student_input, student_weight, target, shift_labels),
            *(self.reduction, self.ignore_index, self.temperature, self.eps, self.accum_dtype),
        )
