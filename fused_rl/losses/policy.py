"""PolicyLoss: a policy-gradient loss is a composition.

    loss = sum_n weight[n] * (w[n] * surrogate[n] + kl[n] - entropy_coef * entropy[n])

with weight from means.py, surrogate from surrogates.py or trust_regions.py, of the log-ratio that
ratios.py forms, kl from penalties.py, and w = batch.weights, the importance weights of the rollout,
where the batch has them. named.py has the compositions that have a name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_rl import checks
from fused_rl.derivatives import transformed
from fused_rl.kl.divergences import Divergence
from fused_rl.losses.batch import TokenBatch, divisor
from fused_rl.losses.means import TokenMean
from fused_rl.losses.penalties import KLPenalty
from fused_rl.losses.ratios import TokenRatio
from fused_rl.losses.statistics import (
    Stats,
    chosen,
    differentiated,
    flattened,
    gradients_at,
    placed,
    with_reference,
)
from fused_rl.losses.surrogates import Clip, bounded
from fused_rl.reference import promoted


class LossOutput(NamedTuple):
    """A scalar to call backward() on, and detached scalars to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Terms(NamedTuple):
    """A PolicyLoss evaluated once, token by token: what the loss and its metrics are formed of."""

    logprobs: Tensor  # [N], as all of these; 0 outside loss_mask
    entropy: Tensor  # 0 outside loss_mask
    log_ratio: Tensor  # at the level of `ratio`
    kl: Tensor | None  # without beta; None where the loss does not form it
    losses: Tensor  # weighed by the mean, 0 outside loss_mask: the loss is their sum
    divergence: Tensor | None  # exact, from the reference; None without one


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss, called as loss(stats, batch).

    Args:
        surrogate: (log_ratio, logprobs, advantages) -> [N]; `clipped` as in surrogates.Surrogate.
            Unless it has token_separable = True it is called with the counted tokens alone.
        ratio: (log_ratio, batch) -> [N]: at which level ratios are formed; `clipped` as in
            ratios.ClippedGeometricRatio, if it has bounds of its own.
        kl: a KLPenalty, or (logprobs, batch) -> [N]: the penalty towards the reference; or None.
        entropy_coef: weight of the entropy bonus.
        mean: batch -> [N]: the weight of each token.
    """

    surrogate: Callable[[Tensor, Tensor, Tensor], Tensor] = field(default_factory=Clip)
    ratio: Callable[[Tensor, TokenBatch], Tensor] = field(default_factory=TokenRatio)
    kl: KLPenalty | None = None
    entropy_coef: float = 0.0
    mean: Callable[[TokenBatch], Tensor] = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        checks.is_callable("surrogate", self.surrogate, "Clip()")
        checks.is_callable("ratio", self.ratio, "TokenRatio()")
        checks.is_callable("mean", self.mean, "TokenMean()")
        if self.kl is not None:
            checks.is_callable("kl", self.kl, "KLPenalty(0.1)")
        checks.is_number("entropy_coef", self.entropy_coef)

    @property
    def token_separable(self) -> bool:
        """Whether a token's loss depends on no other token, so that one pass can form it."""
        parts = (self.surrogate, self.ratio, self.kl if self._pulls else None)
        return all(_separable(part) for part in parts if part is not None)

    @property
    def divergence(self) -> Divergence:
        """Which divergence from a reference the loss is to be given."""
        return getattr(self.kl, "exact", None) or Divergence.REVERSE

    def __call__(self, stats: Stats, batch: TokenBatch) -> LossOutput:
        """The loss and its metrics.

        Args:
            stats: of the tokens of batch, [N] or in the shape the batch was built from. Those of
                DivergenceStats are the reference's too, for a batch without ref_logprobs.
            batch: the tokens.

        Returns:
            LossOutput(loss, metrics), the metrics over the counted tokens:

            entropy, kl, divergence: means, in nats; kl, estimated from the labels, where the batch
                has ref_logprobs; divergence, exact, where stats have it.
            ratio_mean, ratio_max: of the ratio at the level of `ratio`.
            clip_fraction_low, clip_fraction_high: of tokens below a lower bound, above an upper
                one, where the bound is at work: the surrogate's, and the ratio's own (GMPO).
            clip_fraction_dual: of those of clip_fraction_high, the losing tokens (A < 0), which
                dual or delta holds. verl's pg_clipfrac is low + high - dual, its pg_clipfrac_lower
                dual.
            unknown_fraction: of tokens with a NaN among old_logprobs, ref_logprobs,
                rollout_logprobs and weights: ratio 1, KL 0, weight 1 (log_ratios.py).
            zero_gradient_fraction: of tokens without a gradient; not under torch.compile.

        Raises:
            ValueError: stats that do not fit the batch; a KL penalty without ref_logprobs, an exact
                one without a divergence.
        """
        flat = flattened(stats, batch)
        batch = with_reference(batch, flat)
        if torch.compiler.is_compiling() or transformed():
            (loss, terms), gradients = self.evaluate(flat, batch), None
        elif torch.is_grad_enabled():
            loss, terms = self.evaluate(flat, batch)
            gradients = gradients_at(flat, loss) or differentiated(self.evaluate, flat, batch)[2]
        else:
            loss, terms, gradients = differentiated(self.evaluate, flat, batch)
        return LossOutput(loss, self.metrics(terms, batch, gradients))

    def clipped(self, stats: Stats, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens the metrics clip_fraction_low, _high and _dual count, [N] bool each; of
        tokens outside loss_mask they say nothing.

        Args and errors: as __call__.
        """
        logprobs = flattened(stats, batch).logprobs.detach()
        log_ratio = self.ratio(batch.log_ratio(logprobs), batch)
        return self._clipped(log_ratio, logprobs, batch)

    def evaluate(self, flat: Stats, batch: TokenBatch) -> tuple[Tensor, Terms]:
        """The loss, and the terms that its metrics are formed of too.

        flat: [N], float32 or float64, 0 outside loss_mask.
        """
        terms = self._terms(flat, batch)
        terms = terms._replace(losses=self._weighed(terms.losses, batch))
        if type(self) is PolicyLoss:
            return terms.losses.sum(), terms
        # A subclass may form its loss in another way.
        return self.objective(flat, batch), terms

    def objective(self, stats: Stats, batch: TokenBatch) -> Tensor:
        """The loss alone."""
        return self._weighed(self.token_losses(stats, batch), batch).sum()

    def token_losses(self, stats: Stats, batch: TokenBatch) -> Tensor:
        """What the mean weighs, [N]; 0 outside loss_mask."""
        flat = flattened(stats, batch)
        losses = self._terms(flat, with_reference(batch, flat)).losses
        return losses.where(batch.loss_mask, 0.0)

    def _weighed(self, losses: Tensor, batch: TokenBatch) -> Tensor:
        return (self.mean(batch) * losses).where(batch.loss_mask, 0.0)

    def _terms(self, flat: Stats, batch: TokenBatch) -> Terms:
        """With the losses as the mean finds them; anything outside loss_mask."""
        logprobs, entropy = flat.logprobs, flat.entropy
        divergence = getattr(flat, "divergence", None)
        log_ratio = self.ratio(batch.log_ratio(logprobs), batch)
        rows = self._rows(batch)
        args = chosen(rows, log_ratio, logprobs, batch.advantages)
        losses = placed(self.surrogate(*args), rows, len(logprobs))
        if batch.weights is not None:
            known = batch.weights.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
            losses = known * losses
        kl = None
        if self._pulls:
            penalty, kl = self._penalty(logprobs, batch, divergence)
            losses = losses + penalty
        if self.entropy_coef:
            losses = losses - self.entropy_coef * entropy
        return Terms(logprobs, entropy, log_ratio, kl, losses, divergence)

    def _penalty(
        self, logprobs: Tensor, batch: TokenBatch, divergence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The term of the loss, and its estimate where it comes with it."""
        if getattr(self.kl, "exact", None) is not None:
            return self.kl(logprobs, batch, divergence), None
        if type(self.kl) is KLPenalty:
            return self.kl.with_estimate(logprobs, batch)
        return self.kl(logprobs, batch), None

    @property
    def _pulls(self) -> bool:
        """Whether kl is a term of the loss. With a beta of 0 it only says what metrics report; a
        tensor may be changed between steps, and is no 0 for good.
        """
        beta = getattr(self.kl, "beta", 1.0)
        return self.kl is not None and (isinstance(beta, Tensor) or beta != 0)

    def _rows(self, batch: TokenBatch) -> Tensor | None:
        """The counted tokens, for a surrogate that couples tokens; None: it takes all of them."""
        return None if _separable(self.surrogate) else batch.loss_mask.nonzero()[:, 0]

    def _clipped(
        self, log_ratio: Tensor, logprobs: Tensor, batch: TokenBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N] bool each: below a lower bound, above an upper one, and the losing of the latter."""
        rows = self._rows(batch)
        args = chosen(rows, log_ratio, logprobs, batch.advantages)
        low = high = dual = torch.zeros_like(args[0], dtype=torch.bool)
        if hasattr(self.surrogate, "clipped"):
            low, high = self.surrogate.clipped(*args)
        if hasattr(self.surrogate, "dual_clipped"):
            dual = self.surrogate.dual_clipped(*args)
        low, high, dual = (placed(t, rows, len(logprobs)) for t in (low, high, dual))
        if not hasattr(self.ratio, "clipped"):
            return low, high, dual
        below, above = self.ratio.clipped(batch.log_ratio(logprobs), batch)
        return low | below, high | above, dual

    # No decorator: torch.compile could not follow it in a loss that is made where it is traced.
    def metrics(
        self, terms: Terms, batch: TokenBatch, gradients: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor]:
        """What __call__ reports, without gradient.

        gradients: [N] each, of the loss with respect to the policy's statistics, which may be
            anything outside loss_mask; None where they are not known.
        """
        with torch.no_grad():
            ratio = torch.exp(bounded(terms.log_ratio))
            clipped = self._clipped(terms.log_ratio, terms.logprobs, batch)
            means = {
                "entropy": terms.entropy,
                "ratio_mean": ratio,
                **dict(zip(_CLIP_FRACTIONS, clipped, strict=True)),
                "unknown_fraction": _unknown(batch),
            }
            if terms.kl is not None:
                means["kl"] = terms.kl
            elif batch.ref_logprobs is not None:
                means["kl"] = (self.kl or KLPenalty(1.0)).estimate(terms.logprobs, batch)
            if terms.divergence is not None:
                means["divergence"] = terms.divergence
            if gradients is not None:
                means["zero_gradient_fraction"] = reduce(and_, [g == 0 for g in gradients])
            counted = torch.stack(promoted(*means.values())).where(batch.loss_mask, 0.0)
            metrics = counted.sum(-1) / divisor(batch.num_tokens)
            # Padded, so that an empty batch has a maximum too.
            largest = pad(ratio.where(batch.loss_mask, 0.0), (0, 1)).max()
            return {**dict(zip(means, metrics.unbind(), strict=True)), "ratio_max": largest}


_CLIP_FRACTIONS = ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")


def _separable(part: object) -> bool:
    return getattr(part, "token_separable", False)


def _unknown(batch: TokenBatch) -> Tensor:
    """[N] bool: tokens of which something that was given is NaN."""
    given = (batch.old_logprobs, batch.ref_logprobs, batch.rollout_logprobs, batch.weights)
    given = [t for t in given if t is not None]
    return torch.stack(given).isnan().any(0) if given else torch.zeros_like(batch.loss_mask)


Loss = Callable[[Stats, TokenBatch], LossOutput]
