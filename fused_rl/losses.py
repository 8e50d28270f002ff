"""PolicyLoss: a policy-gradient loss is a composition, and a named loss is one that has a name.

    loss = sum_n weight[n] * (surrogate[n] + beta * kl[n] - entropy_coef * entropy[n])

with weight from means.py, surrogate from surrogates.py, kl from kl.py. linear_policy_loss forms it,
and its gradients, straight from hidden states and the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import checks, ops
from fused_rl.batch import TokenBatch
from fused_rl.head import LMHead
from fused_rl.kl import KL
from fused_rl.logprobs import (
    IGNORE_INDEX,
    TokenStats,
    chunked_gradients,
    chunks,
    flat_arguments,
    linear_logprobs,
)
from fused_rl.means import FixedLengthMean, SequenceMean, TokenMean
from fused_rl.penalties import KLPenalty
from fused_rl.surrogates import Clip

# With fewer tokens in a chunk, reading and writing the dweight accumulator for every chunk costs
# more than computing the logits a second time.
ONE_PASS_ROWS = 256


class LossOutput(NamedTuple):
    """A scalar to call backward() on, and detached scalars to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


class TokenRatio:
    """The log-ratio of each token by itself."""

    token_separable = True

    def __call__(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        return log_ratio


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss, called as loss(stats, batch).

    Args:
        surrogate: (log_ratio, logprobs, advantages) -> [N], with a method `clipped`.
        ratio: (log_ratio, batch) -> [N]: at which level ratios are formed.
        kl: (logprobs, batch) -> [N], the penalty towards batch.ref_logprobs, or None.
        entropy_coef: weight of the entropy bonus.
        mean: batch -> [N]: the weight of each token.
    """

    surrogate: Callable[[Tensor, Tensor, Tensor], Tensor] = field(default_factory=Clip)
    ratio: Callable[[Tensor, TokenBatch], Tensor] = field(default_factory=TokenRatio)
    kl: KLPenalty | None = None
    entropy_coef: float = 0.0
    mean: Callable[[TokenBatch], Tensor] = field(default_factory=TokenMean)

    @property
    def token_separable(self) -> bool:
        """Whether a token's loss depends on no other token, so that one pass can form it."""
        parts = (self.ratio, self.kl) if self.kl is not None else (self.ratio,)
        return all(getattr(part, "token_separable", False) for part in parts)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> LossOutput:
        """The loss and its metrics.

        Args:
            stats: of the tokens of batch, [N] or in the shape the batch was built from.
            batch: the tokens.

        Raises:
            ValueError: stats that do not fit the batch; a KL penalty without ref_logprobs.
        """
        flat = self._flat(stats, batch)
        return LossOutput(self.objective(flat, batch), self._metrics(flat, batch))

    def objective(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """The loss alone."""
        logprobs, entropy = self._flat(stats, batch)
        losses = self.surrogate(self._log_ratio(logprobs, batch), logprobs, batch.advantages)
        if self.kl is not None:
            losses = losses + self.kl(logprobs, batch)
        if self.entropy_coef:
            losses = losses - self.entropy_coef * entropy
        weighted = self.mean(batch) * losses
        return weighted.where(batch.loss_mask, 0.0).sum()

    def _flat(self, stats: TokenStats, batch: TokenBatch) -> TokenStats:
        """Flattened, with zeros outside loss_mask: whatever is there cannot reach an exp."""
        if any(t.numel() != batch.labels.numel() for t in stats):
            raise ValueError(
                "stats must have one entry per token of the batch, got "
                f"{[list(t.shape) for t in stats]} for {list(batch.shape)}"
            )
        return TokenStats(*(t.reshape(-1).where(batch.loss_mask, 0.0) for t in stats))

    def _log_ratio(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        return self.ratio(logprobs - old, batch)

    @torch.no_grad()
    def _metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        logprobs, entropy = stats
        count = batch.num_tokens.clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return x.where(batch.loss_mask, 0).sum() / count

        log_ratio = self._log_ratio(logprobs, batch)
        ratio = torch.exp(log_ratio)
        low, high = self.surrogate.clipped(log_ratio, batch.advantages)
        metrics = {
            "entropy": mean(entropy),
            "ratio_mean": mean(ratio),
            # Padded, so that an empty batch has a maximum too.
            "ratio_max": pad(ratio.where(batch.loss_mask, 0.0), (0, 1)).max(),
            "clip_fraction_low": mean(low.to(ratio.dtype)),
            "clip_fraction_high": mean(high.to(ratio.dtype)),
        }
        if batch.ref_logprobs is not None:
            metrics["kl"] = mean((self.kl or KLPenalty(1.0)).estimate(logprobs, batch))
        if not torch.compiler.is_compiling():
            dlogprobs, dentropy = token_gradients(self, stats, batch)
            idle = (dlogprobs == 0) & (dentropy == 0)
            metrics["zero_gradient_fraction"] = mean(idle.to(ratio.dtype))
        return metrics


Loss = Callable[[TokenStats, TokenBatch], LossOutput]


def token_gradients(loss: Loss, stats: TokenStats, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """dlogprobs and dentropy [N] of a loss."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in stats]
        objective = getattr(loss, "objective", None)
        of = TokenStats(*leaves)
        value = objective(of, batch) if objective else loss(of, batch).loss
        if not value.requires_grad:
            return tuple(torch.zeros_like(t) for t in leaves)
        return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def linear_policy_loss(
    hidden: Tensor,
    head: LMHead | Tensor,
    batch: TokenBatch,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """A policy loss straight from hidden states, with the gradients of hidden, weight and bias.

    Where the loss is token-separable, one pass forms it with its gradients, chunk by chunk: 6 NHV,
    or 4 NHV if the head is not trained; tokens outside loss_mask cost nothing, those whose gradient
    is 0 (clipped, zero advantage) only their logits. Otherwise it takes two passes through
    linear_logprobs, 8 NHV, with the same values and gradients: for a loss that is not separable,
    inside torch.compile, and where the vocabulary is so large that chunks of chunk_bytes would be
    too small to pay.

    Args:
        hidden: [*batch.shape, H]: the states that predict the batch's labels.
        head: LMHead, or a weight [V, H].
        batch: the tokens.
        loss: a PolicyLoss, or any function (TokenStats, TokenBatch) -> LossOutput of flat tensors;
            with an attribute `token_separable = True` it takes the one pass, and must then be a sum
            over tokens whose normalisers come from the batch's counts.
        temperature: a number, or a tensor that broadcasts to batch.shape: what the tokens were
            sampled at.
        chunk_bytes: bound on the buffer for logits; default 256 MiB.

    Returns:
        LossOutput(loss, metrics). A batch without counted tokens has loss 0 and gradients of zeros.

    Raises:
        ValueError: as for linear_logprobs, and as the loss raises.
    """
    head = LMHead.of(head)
    labels = batch.labels.reshape(batch.shape)
    checks.chunk_bytes_is_positive(chunk_bytes)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    separable = getattr(loss, "token_separable", False) and not torch.compiler.is_compiling()
    if not (trained and separable and _one_pass_pays(hidden, head, batch, chunk_bytes)):
        stats = linear_logprobs(
            hidden, head, labels, temperature=temperature, chunk_bytes=chunk_bytes
        )
        return loss(TokenStats(*(t.reshape(-1) for t in stats)), batch)
    args = flat_arguments(hidden, head, labels, temperature)
    metrics: dict[str, Tensor] = {}
    value = _OnePass.apply(*args[:3], args, batch, loss, metrics, chunk_bytes)
    return LossOutput(value, metrics)


def _one_pass_pays(
    hidden: Tensor, head: LMHead, batch: TokenBatch, chunk_bytes: int | None
) -> bool:
    """Few chunks, or chunks that are large enough, or no dweight to accumulate over them."""
    dtype = ops.acc_dtype(hidden, head.weight)
    sizes = chunks(batch.labels.numel(), head.weight.shape[0], dtype, chunk_bytes)
    return len(sizes) <= 1 or sizes[0] >= ONE_PASS_ROWS or not head.requires_grad


class _OnePass(torch.autograd.Function):
    """The loss, with its gradients already formed; backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, args, batch, loss, metrics, chunk_bytes):
        ops.check_tokens(args[3], args[4], weight.shape[0], IGNORE_INDEX)
        args = (
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            *args[3:],
        )

        def upstream(stats: TokenStats, rows: Tensor) -> tuple[Tensor, Tensor]:
            return token_gradients(loss, stats, batch.select(rows))

        needs = tuple(ctx.needs_input_grad[:3])
        grads = chunked_gradients(args, batch.loss_mask, upstream, needs, chunk_bytes)
        ctx.save_for_backward(grads.dhidden, grads.dweight, grads.dbias)
        ctx.dtypes = [None if t is None else t.dtype for t in args[:3]]
        output = loss(grads.stats, batch)
        metrics.update(output.metrics)
        return output.loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_policy_loss has no second derivative: call backward without create_graph"
            )
        grads = [
            None if g is None else _scaled(g, dloss).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *(None,) * 5)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    return gradient if dloss == 1 else gradient * dloss


def policy_loss(
    mean: Callable[[TokenBatch], Tensor],
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: KL,
    kl_grad: KL | None,
    entropy_coef: float,
) -> PolicyLoss:
    """What the named losses share: a clipped surrogate, KL in the loss, an entropy bonus."""
    penalty = KLPenalty(beta, kl, kl_grad) if beta else None
    return PolicyLoss(Clip(clip_low, clip_high), TokenRatio(), penalty, entropy_coef, mean)


def grpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: KL = KL.K3,
    kl_grad: KL | None = None,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """GRPO (arXiv 2402.03300, eq. 3): the mean over sequences of their token means."""
    return policy_loss(SequenceMean(), clip_low, clip_high, beta, kl, kl_grad, entropy_coef)


def bnpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: KL = KL.K3,
    kl_grad: KL | None = None,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """The mean over the counted tokens of the (micro-)batch: TRL's loss_type "bnpo"."""
    return policy_loss(TokenMean(), clip_low, clip_high, beta, kl, kl_grad, entropy_coef)


def dapo(
    num_tokens: int | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
    kl: KL = KL.K3,
    kl_grad: KL | None = None,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """DAPO (arXiv 2503.14476, eq. 8): clip higher, and the mean over all tokens of the step.

    num_tokens: counted tokens of the whole step, over its micro-batches; None: of the batch.
    """
    mean = TokenMean(num_tokens)
    return policy_loss(mean, clip_low, clip_high, beta, kl, kl_grad, entropy_coef)


def dr_grpo(
    length: int,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl: KL = KL.K3,
    kl_grad: KL | None = None,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """Dr. GRPO (arXiv 2503.20783): sums of tokens over a constant length, the mean over sequences.

    length: the longest completion that can be sampled. Its advantages: group_mean_advantages.
    """
    mean = FixedLengthMean(length)
    return policy_loss(mean, clip_low, clip_high, beta, kl, kl_grad, entropy_coef)
