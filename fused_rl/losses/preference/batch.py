"""PreferenceBatch: sequences that were compared, in pairs or one by one, and their tokens.

Sequences are [S], in the order in which they were given. A paired batch says which of them were
chosen over which; an unpaired one which are desirable. Counts describe the whole batch, or, of
`across`, a rank's share of the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_rl import checks
from fused_rl.losses import counts
from fused_rl.losses.batch import TokenBatch, neutral
from fused_rl.losses.preference.compared import Compared, mask_of
from fused_rl.losses.sequences import sequence_ids

_COUNTS = ("num_chosen", "num_rejected", "num_scored", "num_likely")
_TO_GIVE = "PreferenceBatch.padded, PreferenceBatch.packed"


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Built by `padded` or `packed`, which read indices and masks on the host.

    Attributes:
        tokens: the tokens, flat; those in its loss_mask are all whose log-probs are needed, and
            its ref_logprobs the reference's, where they were given token by token.
        scored: [N] bool; the tokens that sequences are scored by.
        likely: [N] bool; the tokens of chosen sequences that the likelihood term counts.
        chosen, rejected: [P] int64 each, the sequences of pair p; of an unpaired batch the
            desirable and the undesirable ones, [C] and [R].
        mismatched: [M] int64; sequences that belong to other prompts, for KTO's reference point.
        paired: whether chosen[p] and rejected[p] were compared with each other.
        num_chosen, num_rejected: how many there are; what means divide by.
        num_scored, num_likely: []; how many tokens are `scored`, are `likely`.
        ref_sums: [S] or None; the reference's log-probs of whole sequences.
        sharp_logprobs: [N] or None; the policy's log-probs at half the temperature, without
            gradient, which WPO weighs by.
        group: the ranks that the reference point is a mean over, or None.
    """

    tokens: TokenBatch
    scored: Tensor
    likely: Tensor
    chosen: Tensor
    rejected: Tensor
    mismatched: Tensor
    paired: bool
    num_chosen: int | Tensor
    num_rejected: int | Tensor
    num_scored: Tensor
    num_likely: Tensor
    ref_sums: Tensor | None = None
    sharp_logprobs: Tensor | None = None
    group: Any | None = None

    @classmethod
    def padded(
        cls,
        labels: Tensor,
        loss_mask: Tensor,
        *,
        pairs: tuple[Tensor, Tensor] | None = None,
        desirable: Tensor | None = None,
        mismatched: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        likelihood_mask: Tensor | None = None,
    ) -> PreferenceBatch:
        """A batch of S sequences in T columns.

        Args:
            labels: [S, T] int64 or int32: the token that the hidden state at the same place
                predicts. Anything where no mask is True.
            loss_mask: [S, T] bool or 0/1: True where the token is part of what was compared, the
                completion. A sequence without any has score 0.
            pairs: (chosen, rejected), [P] integers each: the sequences of each pair. A sequence may
                be in several. None, and no `desirable`: the first half was chosen, each sequence
                over the one S / 2 further on.
            desirable: [S] bool, or 0/1: sequences judged one by one, for KTO and BCO; no `pairs`.
            mismatched: [S] bool, or 0/1, with `desirable`: True where a sequence is the completion
                of another prompt, that serves KTO's reference point alone; it has no gradient.
            ref_logprobs: [S, T], the reference's log-probs in nats, or [S], their sums over the
                tokens of loss_mask. Token by token they are the better ones: sums of 4096 float32
                log-probs are rounded to 2e-4.
            likelihood_mask: [S, T] bool or 0/1: the tokens of chosen sequences that the likelihood
                term counts, the prompt's too for TRL's ORPO; None: those of loss_mask.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; indices outside [0, S); an odd
                number of sequences without `pairs`.
        """
        checks.is_labels(labels)
        checks.require(
            labels.dim() == 2, lambda: f"labels must be [S, T], got {list(labels.shape)}"
        )
        sequence, S = sequence_ids(labels.shape, None, labels.device)
        sides = Compared.of(S, labels.device, pairs, desirable, mismatched)
        return cls._build(
            labels, loss_mask, (sequence, S, None), sides, ref_logprobs, likelihood_mask
        )

    @classmethod
    def packed(
        cls,
        labels: Tensor,
        cu_seqlens: Tensor,
        *,
        loss_mask: Tensor | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
        desirable: Tensor | None = None,
        mismatched: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        likelihood_mask: Tensor | None = None,
    ) -> PreferenceBatch:
        """Sequences one after another, without padding.

        Args:
            labels: [N] int64 or int32.
            cu_seqlens: [S + 1] int: where sequences begin; the first is 0, the last N.
            loss_mask: [N] bool or 0/1; None: every token is part of what was compared.
            pairs, desirable, mismatched: as for `padded`.
            ref_logprobs: [N] or sums [S], as for `padded`. Where N equals S, token by token.
            likelihood_mask: [N], as for `padded`.

        Raises:
            ValueError: as for `padded`; cu_seqlens that does not go from 0 to N without falling.
        """
        checks.is_labels(labels)
        checks.require(labels.dim() == 1, lambda: f"labels must be [N], got {list(labels.shape)}")
        checks.is_tensor("cu_seqlens", cu_seqlens)
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.bool)
        sequence, S = sequence_ids(labels.shape, cu_seqlens, labels.device)
        sides = Compared.of(S, labels.device, pairs, desirable, mismatched)
        return cls._build(
            labels, loss_mask, (sequence, S, cu_seqlens), sides, ref_logprobs, likelihood_mask
        )

    @classmethod
    def _build(cls, labels, loss_mask, sequences, sides, ref_logprobs, likelihood_mask):
        sequence, S, cu_seqlens = sequences
        scored = mask_of("loss_mask", loss_mask, labels)
        likely = scored
        if likelihood_mask is not None:
            likely = mask_of("likelihood_mask", likelihood_mask, labels)
        is_chosen = torch.zeros(S, dtype=torch.bool, device=labels.device)
        is_chosen = is_chosen.index_fill(0, sides.chosen, True)
        likely = likely & is_chosen[sequence].reshape(labels.shape)
        per_token, ref_sums = _reference(ref_logprobs, labels, S)
        none = torch.zeros(labels.shape, device=labels.device)  # of no policy gradient
        if cu_seqlens is None:
            tokens = TokenBatch.padded(labels, scored | likely, none, ref_logprobs=per_token)
        else:
            masks = {"loss_mask": scored | likely, "ref_logprobs": per_token}
            tokens = TokenBatch.packed(labels, cu_seqlens, none, **masks)
        flat = scored.reshape(-1), likely.reshape(-1)
        counted = len(sides.chosen), len(sides.rejected), flat[0].sum(), flat[1].sum()
        return cls(tokens, *flat, *sides, *counted, ref_sums)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[S] float64: the sums of values [N] over each sequence's scored tokens.

        In float32 alone a sum of 4096 log-probs would be rounded to 2e-4.
        """
        return self.tokens.sequence_sum(values.double().where(self.scored, 0.0))

    def across(self, group: Any | None = None, *, context: Any | None = None) -> PreferenceBatch:
        """The batch with the counts of the whole step, as a rank of several is to divide by them.

        As fused_rl.across does it, which takes this batch too: averaged over the ranks, gradients,
        losses and metrics are those of one process that has all sequences. KTO's reference point
        is then formed over all ranks, with a collective. Losses that rank the whole batch (AOT)
        rank each rank's alone.

        Args:
            group: the torch.distributed.ProcessGroup over which gradients are averaged; None: all
                ranks.
            context: the ranks that hold parts of the same sequences, as for fused_rl.across.

        Raises:
            ValueError: as fused_rl.across.
        """
        tokens = counts.across(self.tokens, group, context=context)
        like = {"dtype": torch.float64, "device": self.scored.device}
        shared = torch.stack([torch.as_tensor(getattr(self, name), **like) for name in _COUNTS])
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None:
            dist.all_reduce(shared, group=group)
            shared /= dist.get_world_size(group)
        counted = dict(zip(_COUNTS, shared.unbind(), strict=True))
        return replace(self, tokens=tokens, **counted, group=group)

    def with_reference(self, ref_logprobs: Tensor) -> PreferenceBatch:
        """The same sequences beside a reference: its log-probs per token, [N] or in the batch's
        shape, or their sums [S].

        Raises:
            ValueError: of another shape.
        """
        checks.is_floating("ref_logprobs", ref_logprobs)
        labels = self.tokens.labels.reshape(self.tokens.shape)
        flat = ref_logprobs.shape == self.tokens.labels.shape
        per_token, sums = _reference(
            ref_logprobs, self.tokens.labels if flat else labels, self.tokens.local_sequences
        )
        if per_token is not None:
            per_token = neutral("ref_logprobs", per_token, self.tokens.loss_mask)
        return replace(self, tokens=replace(self.tokens, ref_logprobs=per_token), ref_sums=sums)

    @property
    def has_reference(self) -> bool:
        return self.ref_sums is not None or self.tokens.ref_logprobs is not None

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kinds = (Tensor, TokenBatch)
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, kinds)})


def is_preference_batch(batch: object) -> None:
    checks.require(
        isinstance(batch, PreferenceBatch),
        lambda: f"batch must be a PreferenceBatch ({_TO_GIVE}), got {checks.shown(batch)}",
    )


def _reference(given: Tensor | None, labels: Tensor, S: int) -> tuple[Tensor | None, Tensor | None]:
    """ref_logprobs as they may be given: per token, or their sums [S]."""
    if given is None:
        return None, None
    checks.is_floating("ref_logprobs", given)
    checks.same_device(labels=labels, ref_logprobs=given)
    checks.require(
        given.shape in (labels.shape, (S,)),
        lambda: (
            f"ref_logprobs must be one per token ({list(labels.shape)}) or their sums per sequence "
            f"([{S}]), got {list(given.shape)}"
        ),
    )
    if given.shape == labels.shape:
        return given, None
    return None, given.detach().double()
