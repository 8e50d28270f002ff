"""The loss of one of TRL's micro-batches, formed where the model's head is.

With p the policy loss, the terms that a config adds to any of them:

    loss = p / divisor - bonus * mean(entropy)         p's surrogates where the masks let them count

Where masks are asked for, all log-probs and entropies come before the loss: two passes over the
vocabulary, 2 NHV and, of the tokens that have a gradient, 6.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl.integrations.trl.options import Masks
from fused_rl.kl.log_ratios import BOUND, difference
from fused_rl.linear.head import LMHead
from fused_rl.losses.batch import TokenBatch, divisor
from fused_rl.losses.policy import Loss, LossOutput, PolicyLoss
from fused_rl.losses.statistics import Stats
from fused_rl.one_pass.policy_loss import linear_policy_loss

# TRL's of other policies, [B, T].
_LOGPROBS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")


class Seen(NamedTuple):
    """What a StepLoss was given, detached, and what it made of it."""

    stats: Stats
    batch: TokenBatch  # its weights are 0 where no surrogate counts
    counted: Tensor  # bool: the entropies in the bonus
    tokens: Tensor  # []: how many of them the micro-batch has
    value: Tensor  # []: the policy loss
    metrics: dict[str, Tensor]


@dataclass(eq=False)
class StepLoss:
    """A policy loss, with what TRL's config adds to it, of a part of a micro-batch.

    policy: the loss.
    divisor: what it is divided by.
    bonus: the weight of the mean entropy.
    masks: which surrogates and entropies count; they cannot be formed of a part of the tokens.
    rows: [n] int64: where the tokens are in the micro-batch, [B * T].
    shape: (B, T).
    seen: of the last call; where a micro-batch is formed in parts, the last one is of all of it.
    """

    policy: Loss
    divisor: float
    bonus: float
    masks: Masks
    rows: Tensor
    shape: tuple[int, int]
    seen: Seen | None = None

    @property
    def token_separable(self) -> bool:
        return not self.masks and getattr(self.policy, "token_separable", False)

    @property
    def entropy_coef(self) -> float:
        """Not 0 where the entropy has a gradient."""
        return self.bonus or getattr(self.policy, "entropy_coef", 0.0)

    def __call__(self, stats: Stats, batch: TokenBatch) -> LossOutput:
        counted, tokens = batch.loss_mask, batch.num_tokens
        if self.masks:
            masks = self.masks(*self.grid(stats))
            keep, counted = (mask.flatten()[self.rows] & batch.loss_mask for mask in masks)
            tokens = counted.sum()
            weights = torch.ones_like(stats.logprobs) if batch.weights is None else batch.weights
            batch = batch.with_weights(weights.where(keep, 0.0))
        value, metrics = self._of_policy(stats, batch)
        given = type(stats)(*(t.detach() for t in stats))
        self.seen = Seen(given, batch, counted, tokens, value.detach(), metrics)
        return LossOutput(self._whole(value, stats), metrics)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the last call's log-probs and entropies, [B, T] each. No rank waits for another."""
        with torch.enable_grad():
            leaves = type(self.seen.stats)(*(t.clone().requires_grad_() for t in self.seen.stats))
            loss = self._whole(self._of_policy(leaves, self.seen.batch)[0], leaves)
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return self.grid(type(leaves)(*found))

    def _of_policy(self, stats: Stats, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(self.policy, PolicyLoss):
            # Its metrics are formed once, when all tokens are there.
            return self.policy.objective(stats, batch), {}
        return tuple(self.policy(stats, batch))

    def _whole(self, value: Tensor, stats: Stats) -> Tensor:
        """The loss, of the policy loss of the same call."""
        loss = value / self.divisor
        if not self.bonus:
            return loss
        entropy = stats.entropy.where(self.seen.counted, 0.0).sum() / divisor(self.seen.tokens)
        return loss - self.bonus * entropy

    def grid(self, stats: Stats) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] of those at rows, 0 elsewhere; without gradient."""
        B, T = self.shape
        flat = (t.detach().reshape(-1) for t in (stats.logprobs, stats.entropy))
        return tuple(t.new_zeros(B * T).index_put((self.rows,), t).view(B, T) for t in flat)

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """What the policy loss reports of the micro-batch."""
        if isinstance(self.policy, PolicyLoss):
            return self.policy(self.seen.stats, self.seen.batch).metrics
        return self.seen.metrics


class Forming:
    """A micro-batch on its way through the model: TRL is given the numbers that it logs, the loss
    leaves the head as the log-prob of one token.
    """

    def __init__(self, inputs: dict[str, Any], batch: TokenBatch, loss: StepLoss) -> None:
        self.completion, self.loss = inputs["completion_mask"], loss
        self.batch = batch.select(loss.rows)
        # How often the head was called, what the model gave in the place of log-probs, and beside
        # entropies: the load-balancing loss.
        self.calls, self.carried, self.rest = 0, None, ()
        # What TRL was given in their place.
        self.given: tuple[Tensor, ...] = ()

    def in_head(self, hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
        """[n] of hidden [n, H]: the loss at the first token that is scored, else 0."""
        at = scored(len(hidden), self.completion)
        output = linear_policy_loss(
            hidden[at], head, self.batch, self.loss, temperature=temperature
        )
        self.calls += 1
        one = at[:1]
        value = output.loss.expand(len(one))
        return output.loss.new_zeros(len(hidden)).index_put((one,), value)

    def values(self) -> tuple[Tensor, Tensor]:
        """The log-probs and entropies, [B, T], without gradient; 0 where no token counts."""
        return self.loss.grid(self.loss.seen.stats)

    @property
    def is_held(self) -> bool:
        """Whether a log-ratio is so large that ours is held where TRL's is not."""
        stats, batch, *_ = self.loss.seen
        others = (batch.old_logprobs, batch.ref_logprobs)
        gaps = [difference(stats.logprobs.flatten(), t) for t in others if t is not None]
        return any(bool((gap.where(batch.loss_mask, 0.0).abs() > BOUND).any()) for gap in gaps)


def batch_of(inputs: dict[str, Any], with_old: bool) -> TokenBatch:
    """TRL's batch of completions, [B, T], as ours."""
    labels, mask = inputs["completion_ids"], counted(inputs)
    weights = inputs.get("importance_sampling_ratio")
    old = inputs.get("old_per_token_logps")
    if with_old and inputs.get("old_logps") is not None:
        # The old policy's of whole completions: any that add up to them are as good.
        old = inputs["old_logps"][:, None] / mask.sum(-1, keepdim=True).clamp(min=1)
        old = old.expand(labels.shape)
    return TokenBatch.padded(
        labels,
        mask.bool(),
        inputs["advantages"],
        old_logprobs=old,
        ref_logprobs=inputs.get("ref_per_token_logps"),
        weights=None if weights is None else weights.expand(labels.shape),
    )


def for_theirs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch, with log-probs of 0 where no token counts, as Forming.values has them there: TRL
    multiplies what it makes of them by 0, and an exp of their difference must be finite.
    """
    mask = counted(inputs).bool()
    names = [name for name in _LOGPROBS if inputs.get(name) is not None]
    return {**inputs, **{name: inputs[name].where(mask, 0.0) for name in names}}


def counted(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: 1 at the tokens that the policy generated."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def rows_of(completion: Tensor) -> Tensor:
    """[n] int64: where the tokens of completions [B, T] are, in [B * T]."""
    return completion.flatten().nonzero()[:, 0]


def scored(length: int, completion: Tensor) -> Tensor:
    """[n] int64: where the completions' tokens are among `length` rows of the head.

    TRL gives the head either these tokens alone, or, where their number must not vary, all columns
    but the last of prompt and completion. A prompt may have become longer on the way.
    """
    B, T = completion.shape
    rows = rows_of(completion)
    if length == len(rows):
        return torch.arange(length, device=rows.device)
    columns, rest = divmod(length, B)
    if rest or columns < T:
        raise RuntimeError(f"TRL gave its head {length} tokens for {B} completions of {T}")
    return rows // T * columns + columns - T + rows % T
