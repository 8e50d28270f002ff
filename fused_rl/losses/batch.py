"""TokenBatch: one flat view of what a policy loss knows about its tokens, padded or packed.

Every tensor is [N]. Counts of tokens and sequences describe the whole batch and stay with every
selection of its rows, so that a loss formed chunk by chunk has the same denominators as one formed
at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.log_ratios import log_ratio
from fused_rl.losses.context import least, summed
from fused_rl.losses.sequences import Level, segment_min, segment_sum, sequence_ids
from fused_rl.reference import acc_dtype, kept_at, wrong_offsets
from fused_rl.stats import IGNORE_INDEX

_OPTIONAL = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "weights")
_PER_TOKEN = ("labels", "loss_mask", "advantages", "sequence", "sequence_tokens", *_OPTIONAL)
# What a token outside loss_mask holds; 0 for everything else.
_NEUTRAL = {"labels": IGNORE_INDEX, "weights": 1.0}


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Built by `padded` or `packed`. Tokens outside loss_mask hold neutral values everywhere.

    Attributes:
        labels: [N] int64; IGNORE_INDEX where loss_mask is False.
        loss_mask: [N] bool; True counts.
        advantages: [N] float.
        sequence: [N] int64; the index of the token's sequence.
        sequence_tokens: [N]; how many tokens of that sequence count.
        num_tokens: []; how many tokens of the batch count.
        num_sequences: sequences of the batch, those without a counted token among them. This and
            num_tokens are what means divide by; of several ranks, counts.across makes them.
        local_sequences: how many sequences the tokens are of: what sequence_sum returns.
        shape: the shape of the labels it was built from.
        old_logprobs: [N] or None: of the policy that is compared with, for the ratio. None, or NaN
            at a token: the current one, so that the ratio is exactly 1.
        ref_logprobs: [N] or None: of the reference policy, for the KL. NaN: KL 0 at that token.
        rollout_logprobs: [N] or None: as the inference engine reported them, NaN where it did not.
        weights: [N] or None: what each token's surrogate is multiplied by; None, or NaN: 1.
        context: the ranks that hold other parts of the same sequences, or None (counts.across).
        kept, cu_kept: [M] and [N + 1] int64, or None: what a sampler left of the vocabulary at each
            token (with_kept).
    """

    labels: Tensor
    loss_mask: Tensor
    advantages: Tensor
    sequence: Tensor
    sequence_tokens: Tensor
    num_tokens: Tensor
    num_sequences: int | float | Tensor
    local_sequences: int
    shape: torch.Size
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    weights: Tensor | None = None
    context: Any | None = None
    kept: Tensor | None = None
    cu_kept: Tensor | None = None

    @classmethod
    def padded(
        cls,
        labels: Tensor,
        loss_mask: Tensor,
        advantages: Tensor,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> TokenBatch:
        """A batch of B sequences in T columns.

        Args:
            labels: [B, T] int64 or int32: the token that the hidden state at the same place
                predicts. Anything where loss_mask is False.
            loss_mask: [B, T] bool or 0/1: True counts.
            advantages: [B], or per token [B, T].
            old_logprobs, ref_logprobs, rollout_logprobs: [B, T] or None, in nats.
            weights: [B, T] or None: what each token's surrogate is multiplied by.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        checks.is_labels(labels)
        checks.require(
            labels.dim() == 2, lambda: f"labels must be [B, T], got {list(labels.shape)}"
        )
        checks.is_floating("advantages", advantages)
        sequence, B = sequence_ids(labels.shape, None, labels.device)
        per_token = advantages
        if advantages.shape == (B,):
            per_token = advantages[:, None].expand(labels.shape)
        given = (old_logprobs, ref_logprobs, rollout_logprobs, weights)
        return cls._build(labels, loss_mask, per_token, sequence, B, *given)

    @classmethod
    def packed(
        cls,
        labels: Tensor,
        cu_seqlens: Tensor,
        advantages: Tensor,
        *,
        loss_mask: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> TokenBatch:
        """Sequences one after another, without padding.

        cu_seqlens is read on the host: build the batch outside a function that torch.compile traces
        as one graph.

        Args:
            labels: [N] int64 or int32.
            cu_seqlens: [B + 1] int: where sequences begin; the first is 0, the last N.
            advantages: [B], or per token [N]. Where N equals B, per token.
            loss_mask: [N] bool or 0/1; None: every token counts.
            old_logprobs, ref_logprobs, rollout_logprobs: [N] or None, in nats.
            weights: [N] or None: what each token's surrogate is multiplied by.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; cu_seqlens that does not go from
                0 to N without falling.
        """
        checks.is_labels(labels)
        checks.require(labels.dim() == 1, lambda: f"labels must be [N], got {list(labels.shape)}")
        checks.is_floating("advantages", advantages)
        checks.is_tensor("cu_seqlens", cu_seqlens)
        sequence, B = sequence_ids(labels.shape, cu_seqlens, labels.device)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.bool)
        per_token = advantages
        if advantages.shape == (B,) and len(labels) != B:
            per_token = advantages[sequence]
        given = (old_logprobs, ref_logprobs, rollout_logprobs, weights)
        return cls._build(labels, loss_mask, per_token, sequence, B, *given)

    @classmethod
    def _build(cls, labels, loss_mask, advantages, sequence, num_sequences, *given) -> TokenBatch:
        checks.is_mask("loss_mask", loss_mask)
        checks.same_shape("loss_mask", loss_mask, "labels", labels)
        checks.require(
            advantages.shape == labels.shape,
            lambda: (
                f"advantages must be one per sequence ([{num_sequences}]) or one per token "
                f"({list(labels.shape)}), got {list(advantages.shape)}"
            ),
        )
        optional = dict(zip(_OPTIONAL, given, strict=True))
        for name, tensor in optional.items():
            if tensor is not None:
                checks.is_floating(name, tensor)
                checks.same_shape(name, tensor, "labels", labels)
        checks.same_device(labels=labels, loss_mask=loss_mask, advantages=advantages, **optional)
        # A copy: what becomes of the caller's mask is not the batch's business.
        mask = loss_mask.reshape(-1) != 0
        tokens = torch.zeros(num_sequences, dtype=torch.int64, device=labels.device)
        tokens = tokens.index_add(0, sequence, mask.long())
        # A counted label below 0 becomes -1, which no op ignores: a mistake stays an error.
        counted = labels.reshape(-1).long().clamp(min=-1)

        flat = {"labels": counted, "advantages": advantages, **optional}
        return cls(
            **{name: neutral(name, tensor, mask) for name, tensor in flat.items()},
            loss_mask=mask,
            sequence=sequence,
            sequence_tokens=tokens[sequence],
            num_tokens=mask.sum(),
            num_sequences=num_sequences,
            local_sequences=num_sequences,
            shape=labels.shape,
        )

    def select(self, rows: Tensor | slice) -> TokenBatch:
        """The tokens at `rows` ([n] int64, or a slice, which copies none); counts stay those of the
        whole batch.
        """
        chosen = {name: getattr(self, name) for name in _PER_TOKEN}
        parts = {name: None if t is None else t[rows] for name, t in chosen.items()}
        if self.kept is not None:
            parts["kept"], parts["cu_kept"] = kept_at(self.kept, self.cu_kept, rows)
        return replace(self, **parts, shape=parts["labels"].shape)

    def with_weights(self, weights: Tensor) -> TokenBatch:
        """The same tokens, each surrogate multiplied by its weight, [N] or in the batch's shape.

        Raises:
            ValueError: weights that are not one floating number per token.
        """
        checks.is_floating("weights", weights)
        self._one_per_token("weights", weights)
        return replace(self, weights=neutral("weights", weights, self.loss_mask))

    def with_kept(self, kept: Tensor, cu_kept: Tensor) -> TokenBatch:
        """The same tokens, with what top-k, top-p or min-p left of the vocabulary at each of them.

        linear_policy_loss then gives the loss log-probs renormalised over these sets: those of the
        distribution that was sampled. old_logprobs, rollout_logprobs and ref_logprobs have to be
        renormalised as well, over the same sets (linear_kept_logprobs; docs/kept-sets.md).

        The offsets are read on the host: build the batch outside a function that torch.compile
        traces as one graph.

        Args:
            kept, cu_kept: [M] and [N + 1], int64 or int32, N the number of tokens, flattened: as
                for linear_kept_logprobs. sampling_masks.kept_sets makes them of what engines give.

        Raises:
            ValueError: dtypes, shapes or devices that do not fit; offsets that do not rise from 0
                to M. What is wrong with an entry, the loss says.
        """
        checks.are_kept_sets(kept, cu_kept, self.labels)
        if checks.has_values(cu_kept) and not torch.compiler.is_compiling():
            said = wrong_offsets(cu_kept, len(kept))
            checks.require(said is None, lambda: str(said))
        return replace(self, kept=kept.long(), cu_kept=cu_kept.long())

    def with_mask(self, keep: Tensor) -> TokenBatch:
        """Without the tokens where keep is False; every count stays that of this batch, so that
        what is dropped is not made up for by what remains.

        Raises:
            ValueError: keep that is not one bool per token, [N] or in the batch's shape.
        """
        checks.is_tensor("keep", keep)
        checks.require(
            keep.dtype == torch.bool, lambda: f"keep must be torch.bool, got {keep.dtype}"
        )
        self._one_per_token("keep", keep)
        mask = self.loss_mask & keep.reshape(-1)
        parts = {name: getattr(self, name) for name in ("labels", "advantages", *_OPTIONAL)}
        left = {name: neutral(name, tensor, mask) for name, tensor in parts.items()}
        return replace(self, loss_mask=mask, **left)

    def log_ratio(self, logprobs: Tensor) -> Tensor:
        """[N]: logprobs [N] - old_logprobs; without them 0, with the gradient of logprobs.

        Finite where logprobs is no NaN; see log_ratios.py.
        """
        if self.old_logprobs is None:
            return log_ratio(logprobs, logprobs.detach())
        gap = log_ratio(logprobs, self.old_logprobs)
        # A token that the old policy could not sample has no gradient: it would be exp(20) A.
        return gap.detach().where(self.old_logprobs.isinf(), gap)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[local_sequences]: the sums of values [N] over each sequence's tokens in loss_mask.

        float32, or float64 for float64 values. Of a sequence that is split over ranks, the whole
        one's.
        """
        counted = values.to(acc_dtype(values)).where(self.loss_mask, 0.0)
        here = segment_sum(counted, self.sequence, self.local_sequences)
        return summed(here, self.context)

    def sequence_min(self, values: Tensor) -> Tensor:
        """[local_sequences]: the least of values [N] at each sequence's tokens in loss_mask; inf
        where there is none. Without gradient; as sequence_sum otherwise.
        """
        counted = values.to(acc_dtype(values)).where(self.loss_mask, torch.inf)
        here = segment_min(counted, self.sequence, self.local_sequences)
        return least(here, self.context)

    def at_level(self, log_ratio: Tensor, level: Level) -> Tensor:
        """[N]: the log-ratio of each token, of its sequence, or the mean over its sequence."""
        checks.is_floating("log_ratio", log_ratio)
        checks.is_one_of("level", level, Level)
        if level is Level.TOKEN:
            return log_ratio
        total = self.sequence_sum(log_ratio)
        if level is Level.GEOMETRIC:
            total = total / self.sequence_sum(torch.ones_like(log_ratio)).clamp(min=1)
        return total[self.sequence]

    def _one_per_token(self, name: str, tensor: Tensor) -> None:
        checks.require(
            tensor.shape in (self.loss_mask.shape, self.shape),
            lambda: (
                f"{name} must be one per token, {list(self.loss_mask.shape)} or "
                f"{list(self.shape)}, got {list(tensor.shape)}"
            ),
        )

    def parts(self) -> tuple[list[Tensor | None], list[object]]:
        """Its tensors and its other values, each [len(fields)], None where it is of the other."""
        values = [getattr(self, f.name) for f in fields(self)]
        tensors = [v if isinstance(v, Tensor) else None for v in values]
        return tensors, [None if isinstance(v, Tensor) else v for v in values]

    @classmethod
    def of_parts(cls, tensors: Sequence[Tensor | None], others: Sequence[object]) -> TokenBatch:
        """The batch whose parts these are."""
        return cls(*(b if a is None else a for a, b in zip(tensors, others, strict=True)))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def is_batch(batch: object) -> None:
    checks.require(
        isinstance(batch, TokenBatch),
        lambda: (
            "batch must be a TokenBatch (TokenBatch.padded, TokenBatch.packed), "
            f"got {checks.shown(batch)}"
        ),
    )


def divisor(count: Tensor) -> Tensor:
    """What a mean divides by: without counted tokens 1, so that it is 0, not 0 / 0."""
    return torch.where(count > 0, count, 1)


def outside_inference(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or where it was made under torch.inference_mode a copy that autograd may save."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def neutral(name: str, tensor: Tensor | None, mask: Tensor) -> Tensor | None:
    """Flat, detached, and outside the mask what no sum, exp or lookup notices.

    Half precision becomes float32: a loss in float16 would lose a count beyond 65504.
    """
    if tensor is None:
        return None
    if tensor.is_floating_point():
        tensor = tensor.to(acc_dtype(tensor))
    return tensor.detach().reshape(-1).where(mask, _NEUTRAL.get(name, 0))
