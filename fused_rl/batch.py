"""TokenBatch: one flat view of what a policy loss knows about its tokens, padded or packed.

Every tensor is [N]. Counts of tokens and sequences describe the whole batch and stay with every
selection of its rows, so that a loss formed chunk by chunk has the same denominators as one formed
at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.logprobs import IGNORE_INDEX

_PER_TOKEN = (
    "labels",
    "loss_mask",
    "advantages",
    "sequence",
    "sequence_tokens",
    "old_logprobs",
    "ref_logprobs",
    "rollout_logprobs",
)


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
        num_sequences: sequences of the batch, those without a counted token among them.
        shape: the shape of the labels it was built from.
        old_logprobs: [N] or None: of the policy that is compared with, for the ratio. None: the
            current one, so that every ratio is exactly 1.
        ref_logprobs: [N] or None: of the reference policy, for the KL.
        rollout_logprobs: [N] or None: as the inference engine reported them.
    """

    labels: Tensor
    loss_mask: Tensor
    advantages: Tensor
    sequence: Tensor
    sequence_tokens: Tensor
    num_tokens: Tensor
    num_sequences: int
    shape: torch.Size
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

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
    ) -> TokenBatch:
        """A batch of B sequences in T columns.

        Args:
            labels: [B, T] int64 or int32: the token that the hidden state at the same place
                predicts. Anything where loss_mask is False.
            loss_mask: [B, T] bool or 0/1: True counts.
            advantages: [B], or per token [B, T].
            old_logprobs, ref_logprobs, rollout_logprobs: [B, T] or None, in nats.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        checks.is_labels(labels)
        checks.require(
            labels.dim() == 2, lambda: f"labels must be [B, T], got {list(labels.shape)}"
        )
        B, T = labels.shape
        sequence = torch.arange(B, device=labels.device).repeat_interleave(T)
        per_token = advantages
        if advantages.shape == (B,):
            per_token = advantages[:, None].expand(B, T)
        return cls._build(
            labels, loss_mask, per_token, sequence, B, old_logprobs, ref_logprobs, rollout_logprobs
        )

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
    ) -> TokenBatch:
        """Sequences one after another, without padding.

        Args:
            labels: [N] int64 or int32.
            cu_seqlens: [B + 1] int: where sequences begin; the first is 0, the last N.
            advantages: [B], or per token [N]. Where N equals B, per token.
            loss_mask: [N] bool or 0/1; None: every token counts.
            old_logprobs, ref_logprobs, rollout_logprobs: [N] or None, in nats.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; cu_seqlens that does not go from
                0 to N without falling.
        """
        checks.is_labels(labels)
        checks.require(labels.dim() == 1, lambda: f"labels must be [N], got {list(labels.shape)}")
        checks.require(
            cu_seqlens.dim() == 1 and len(cu_seqlens) > 0 and not cu_seqlens.is_floating_point(),
            lambda: (
                "cu_seqlens must be [B + 1] integers, "
                f"got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            ),
        )
        lengths = cu_seqlens.long().diff()
        bounds = [int(cu_seqlens[0]), int(cu_seqlens[-1])]
        checks.require(
            bounds == [0, len(labels)] and bool((lengths >= 0).all()),
            lambda: f"cu_seqlens must rise from 0 to N = {len(labels)}, got {cu_seqlens.tolist()}",
        )
        B = len(lengths)
        sequence = torch.arange(B, device=labels.device).repeat_interleave(lengths)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.bool)
        per_token = advantages
        if advantages.shape == (B,) and len(labels) != B:
            per_token = advantages[sequence]
        return cls._build(
            labels, loss_mask, per_token, sequence, B, old_logprobs, ref_logprobs, rollout_logprobs
        )

    @classmethod
    def _build(
        cls, labels, loss_mask, advantages, sequence, num_sequences, *logprobs
    ) -> TokenBatch:
        checks.same_shape("loss_mask", loss_mask, "labels", labels)
        checks.require(
            loss_mask.dtype in (torch.bool, torch.int32, torch.int64, torch.uint8),
            lambda: f"loss_mask must be bool or 0/1 integers, got {loss_mask.dtype}",
        )
        checks.is_floating("advantages", advantages)
        checks.require(
            advantages.shape == labels.shape,
            lambda: (
                f"advantages must be one per sequence ([{num_sequences}]) or one per token "
                f"({list(labels.shape)}), got {list(advantages.shape)}"
            ),
        )
        names = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
        given = dict(zip(names, logprobs, strict=True))
        for name, tensor in given.items():
            if tensor is not None:
                checks.is_floating(name, tensor)
                checks.same_shape(name, tensor, "labels", labels)
        checks.same_device(labels=labels, loss_mask=loss_mask, advantages=advantages, **given)
        mask = loss_mask.reshape(-1).bool()
        tokens = torch.zeros(num_sequences, dtype=torch.int64, device=labels.device)
        tokens = tokens.index_add(0, sequence, mask.long())
        # A counted label below 0 becomes -1, which no op ignores: a mistake stays an error.
        counted = labels.reshape(-1).long().clamp(min=-1)

        def neutral(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().reshape(-1).where(mask, 0.0)

        return cls(
            labels=counted.where(mask, IGNORE_INDEX),
            loss_mask=mask,
            advantages=neutral(advantages),
            sequence=sequence,
            sequence_tokens=tokens[sequence],
            num_tokens=mask.sum(),
            num_sequences=num_sequences,
            shape=labels.shape,
            **{name: neutral(tensor) for name, tensor in given.items()},
        )

    def select(self, rows: Tensor) -> TokenBatch:
        """The tokens at `rows` ([n] int64); counts stay those of the whole batch."""
        chosen = {name: getattr(self, name) for name in _PER_TOKEN}
        parts = {name: None if t is None else t[rows] for name, t in chosen.items()}
        return replace(self, **parts, shape=rows.shape)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
