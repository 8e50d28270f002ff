"""Distillation: losses that a student learns from a teacher by, token by token.

    loss = sum_n weight[n] * w[n] * (soft * D[n] - hard * logprobs[n])

with weight from means.py, w = batch.weights where the batch has them, D the exact divergence of the
student's distribution from the teacher's over the whole vocabulary, and logprobs those of the
labels. linear_policy_loss(..., reference=(teacher_hidden, teacher_head)) forms it with its
gradients in one pass; loss(linear_divergence(..., divergence=loss.divergence), batch) in two.
batch.advantages are looked at by minillm alone.

In the formulas s is the student, t the teacher, l log-probs of the labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.divergences import Divergence
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses.batch import TokenBatch, divisor
from fused_rl.losses.means import Count, TokenMean
from fused_rl.losses.penalties import KLPenalty
from fused_rl.losses.policy import LossOutput, PolicyLoss
from fused_rl.losses.ratios import TokenRatio
from fused_rl.losses.sequences import has_next, sequence_ids, suffix_scan
from fused_rl.losses.statistics import flattened
from fused_rl.losses.surrogates import Clip
from fused_rl.losses.topk import Tail, topk_divergence
from fused_rl.stats import DivergenceStats

__all__ = [
    "DistillationLoss",
    "Tail",
    "forward_kl",
    "gkd",
    "kd",
    "minillm",
    "minillm_advantages",
    "opd",
    "opd_advantages",
    "topk_divergence",
]


@dataclass(frozen=True)
class DistillationLoss:
    """A divergence from the teacher and the likelihood of the labels, called as loss(stats, batch).

    Args:
        divergence: which; linear_policy_loss forms this one.
        soft: weight of the divergence.
        hard: weight of the negative log-likelihood of the labels.
        mean: batch -> [N]: the weight of each token.
    """

    divergence: Divergence = Divergence.REVERSE
    soft: float = 1.0
    hard: float = 0.0
    mean: Callable[[TokenBatch], Tensor] = field(default_factory=TokenMean)

    token_separable = True

    def __post_init__(self) -> None:
        checks.require(
            isinstance(self.divergence, Divergence),
            lambda: f"divergence must be a Divergence, got {checks.shown(self.divergence)}",
        )
        checks.is_not_negative("soft", self.soft)
        checks.is_not_negative("hard", self.hard)
        checks.is_callable("mean", self.mean, "TokenMean()")

    def __call__(self, stats: DivergenceStats, batch: TokenBatch) -> LossOutput:
        """The loss and its metrics: divergence, nll, entropy and teacher_entropy, means in nats.

        Args:
            stats: of the tokens of batch, [N] or in the shape the batch was built from.
            batch: the tokens.

        Raises:
            ValueError: stats that do not fit the batch, or without a teacher.
        """
        checks.require(
            isinstance(stats, DivergenceStats),
            lambda: (
                "this loss learns from a teacher, and there is none: give linear_policy_loss its "
                "reference=(teacher_hidden, teacher_head)"
            ),
        )
        flat = flattened(stats, batch)
        # An infinite divergence that does not count is no part of the sum: 0 * inf is NaN.
        losses = self.soft * flat.divergence if self.soft else torch.zeros_like(flat.divergence)
        if self.hard:
            losses = losses - self.hard * flat.logprobs
        if batch.weights is not None:
            losses = batch.weights.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf) * losses
        loss = (self.mean(batch) * losses).where(batch.loss_mask, 0.0).sum()
        return LossOutput(loss, _means(flat, batch))


@torch.no_grad()
def _means(flat: DivergenceStats, batch: TokenBatch) -> dict[str, Tensor]:
    names = ("divergence", "nll", "entropy", "teacher_entropy")
    per_token = (flat.divergence, -flat.logprobs, flat.entropy, flat.teacher_entropy)
    means = torch.stack(per_token).sum(-1) / divisor(batch.num_tokens)
    return dict(zip(names, means.unbind(), strict=True))


def forward_kl(*, num_tokens: Count | None = None) -> DistillationLoss:
    """mean_t KL(t||s): off-policy distillation (arXiv 1606.07947, section 3.1).

    Samples: anyone's; on the teacher's it is the forward KL of whole sequences, of which sequence
    KD, the likelihood of those samples, is the noisy form. Mean over all tokens of the step.
    Elsewhere: TRL DistillationTrainer, beta=0; verl "forward_kl_topk", of the top k alone.
    """
    return DistillationLoss(Divergence.FORWARD, mean=TokenMean(num_tokens))


def opd(*, num_tokens: Count | None = None) -> DistillationLoss:
    """mean_t KL(s||t): on-policy distillation (arXiv 2306.13649), its KL exact.

    Samples: the student's. Mean over all tokens of the step. From the teacher's log-probs of those
    samples alone: any policy loss, fused_rl.ppo() for one, of opd_advantages.
    Elsewhere: TRL DistillationTrainer, beta=1.
    """
    return DistillationLoss(Divergence.REVERSE, mean=TokenMean(num_tokens))


def gkd(beta: float = 0.5, *, num_tokens: Count | None = None) -> DistillationLoss:
    """mean_t beta KL(t||m) + (1 - beta) KL(s||m): GKD (arXiv 2306.13649), generalised JSD.

    m = (1 - beta) s + beta t; beta of 0 is forward_kl, of 1 opd. Samples: anyone's, by the paper
    the student's for a share lambda of them. Mean over all tokens of the step.
    Elsewhere: TRL GKDTrainer and DistillationTrainer, beta; Liger LigerFusedLinearJSDLoss, beta.
    """
    return DistillationLoss(Divergence.JSD(beta), mean=TokenMean(num_tokens))


def kd(
    alpha: float = 0.5,
    *,
    temperature: float = 1.0,
    divergence: Divergence = Divergence.FORWARD,
    num_tokens: Count | None = None,
) -> DistillationLoss:
    """mean_t -alpha l + (1 - alpha) T^2 KL(t||s): hard and soft targets (arXiv 1503.02531).

    alpha: the share of the hard targets, the labels. temperature: T, that of both distributions:
    linear_policy_loss is given the same, so that l is at T too; l at 1 takes a call of its own,
    with kd(1.0). Samples: the data's. Mean over all tokens of the step.
    Elsewhere: Liger LigerFusedLinearJSDLoss, weight_hard_loss and weight_soft_loss, without T^2.
    """
    checks.is_number("alpha", alpha)
    checks.require(0 <= alpha <= 1, lambda: f"alpha must be in [0, 1], got {alpha}")
    checks.is_positive("temperature", temperature)
    soft = (1 - alpha) * temperature**2
    return DistillationLoss(divergence, soft, alpha, TokenMean(num_tokens))


def minillm(
    *, num_tokens: Count | None = None, clip_low: float = 0.2, clip_high: float = 0.2
) -> PolicyLoss:
    """mean_t KL(s||t) + PPO's clip of r A, A of later tokens: MiniLLM (arXiv 2306.08543).

    The gradient of the reverse KL of sequences in two parts: a token's own is exact, what it does
    to later ones comes with batch.advantages, minillm_advantages. Samples: the student's, or of the
    mixture of student and teacher, whose log-probs are then old_logprobs,
    torch.logaddexp(old_logprobs + log(1 - alpha), teacher_logprobs + log(alpha)). Mean over all
    tokens of the step.
    """
    penalty = KLPenalty(1.0, exact=Divergence.REVERSE)
    clip = Clip(clip_low, clip_high)
    return PolicyLoss(clip, TokenRatio(), penalty, mean=TokenMean(num_tokens))


@torch.no_grad()
def opd_advantages(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A[t] = sum_u>=t gamma^(u - t) (teacher_logprobs[u] - logprobs[u]): OPD from samples.

    The reverse KL as a reward, k1 of the sampled tokens. With gamma 0 the policy gradient of it is,
    on-policy, that of opd(), with the noise of the samples; with gamma 1 that of the KL of whole
    sequences.

    Args:
        logprobs: [B, T], or packed [N]: the student's, of the tokens it sampled, in nats.
        teacher_logprobs: the same shape: the teacher's, of the same tokens.
        loss_mask: the same shape, bool: True counts.
        gamma: the discount of later tokens; 0: each token has its own alone.
        cu_seqlens: [B + 1] int, where packed sequences begin.

    Returns:
        The shape of logprobs; 0 outside loss_mask. What is not known adds nothing (log_ratios.py).

    Raises:
        ValueError: shapes that do not fit.
    """
    checks.is_not_negative("gamma", gamma)
    rows, follows, gain = _gains(logprobs, teacher_logprobs, loss_mask, cu_seqlens)
    return _in_place(suffix_scan(gain, gamma * follows), rows, logprobs)


@torch.no_grad()
def minillm_advantages(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A[t] = mean_u>t (teacher_logprobs[u] - logprobs[u]) over the sequence's later tokens.

    MiniLLM's R^Norm of the next token (arXiv 2306.08543, section 2.2), 0 at the last one. The mean
    keeps answers from growing short. The sum in its place, which makes minillm's expected gradient
    that of the KL of whole sequences, is opd_advantages with gamma 1 minus that with gamma 0.

    Args:
        logprobs, teacher_logprobs, loss_mask, cu_seqlens: as for opd_advantages.

    Returns:
        As opd_advantages.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, follows, gain = _gains(logprobs, teacher_logprobs, loss_mask, cu_seqlens)
    # What begins at the next token; nothing behind a sequence's last.
    later, left = (
        follows * suffix_scan(values, follows).roll(-1) for values in (gain, torch.ones_like(gain))
    )
    return _in_place(later / left.clamp(min=1), rows, logprobs)


def _gains(
    logprobs: Tensor, teacher_logprobs: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of counted tokens: their rows [M]; 1 where the next is of the same sequence; log(t / s)."""
    checks.is_floating("logprobs", logprobs)
    checks.is_floating("teacher_logprobs", teacher_logprobs)
    checks.is_tensor("loss_mask", loss_mask)
    checks.same_shape("teacher_logprobs", teacher_logprobs, "logprobs", logprobs)
    checks.same_shape("loss_mask", loss_mask, "logprobs", logprobs)
    sequence, _ = sequence_ids(logprobs.shape, cu_seqlens, logprobs.device)
    rows = loss_mask.reshape(-1).nonzero()[:, 0]
    gain = -log_ratio(logprobs, teacher_logprobs).reshape(-1)[rows]
    # Of both not known: logprobs may be an inference engine's.
    gain = gain.nan_to_num(nan=0.0)
    return rows, has_next(sequence[rows]).to(gain.dtype), gain


def _in_place(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """values [M] at their rows in the shape of like, 0 elsewhere."""
    return values.new_zeros(like.numel()).index_copy(0, rows, values).reshape(like.shape)
