"""Kept sets that an inference engine reports, on their way through TRL.

A rollout_func returns them beside prompt_ids, completion_ids and logprobs, as

    "sampling_mask"    one per completion, as fused_rl.sampling_masks.kept_sets takes them: vLLM's
                       sampling_mask, SGLang's output_token_sampling_mask, or None; of the tokens
                       that the engine generated, which are those with an env_mask of 1

TRL 1.16 has no such field. So the trainer takes it out of what its _generate returns, forms the
log-probs of the old policy and of the reference over the same sets, and puts the masks into the
batch, where TRL shuffles and splits them with the completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.integrations.trl.forming import counted, rows_of, scored
from fused_rl.linear.head import LMHead
from fused_rl.linear.kept import linear_kept_logprobs
from fused_rl.losses.batch import TokenBatch
from fused_rl.rollouts.sampling_masks import kept_sets
from fused_rl.stats import IGNORE_INDEX

KEY = "sampling_mask"


@dataclass(frozen=True)
class Replay:
    """What a rollout_func has said of one generation.

    masks: [B]: of each completion.
    own: [B] lists, 1 at the tokens of a completion that the engine generated; None: all of them.
    """

    masks: Sequence[Any]
    own: Sequence[Sequence[int]] | None

    @classmethod
    def taken_from(cls, generated: tuple) -> "Replay | None":
        """Out of what TRL's _generate returns: reward functions need not hear of it."""
        extra = next((part for part in generated if isinstance(part, dict) and KEY in part), None)
        if extra is None:
            return None
        _, completions, own, *_ = generated
        masks = extra.pop(KEY)
        if not isinstance(masks, Sequence) or len(masks) != len(completions):
            raise ValueError(
                f"{KEY!r} of rollout_func must be one mask per completion, {len(completions)}, got "
                f"{len(masks) if isinstance(masks, Sequence) else type(masks).__name__}"
            )
        return cls(masks, own)

    def scoring(self, ids: Tensor, attention: Tensor, keep: int, size: int | None) -> "Scoring":
        """Of prompts with completions, [B, P + T] each: T is keep, `size` of them at a time."""
        mask = attention[:, -keep:]
        generated = mask.bool()
        if self.own is not None:
            own = [F.pad(torch.tensor(row), (0, keep - len(row)), value=1) for row in self.own]
            generated = generated & torch.stack(own).to(generated)
        return Scoring(self.masks, ids[:, -keep:], mask, generated, size or len(ids))


@dataclass
class Scoring:
    """Log-probs over kept sets, in the place of those over the vocabulary: without gradient, a few
    completions of [B, T] at each call of the model.
    """

    masks: Sequence[Any]
    ids: Tensor
    completion: Tensor
    generated: Tensor
    size: int
    done: int = 0

    def in_head(self, hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
        """[n] of hidden [n, H]; 0 at what the engine did not generate."""
        part = slice(self.done, self.done + self.size)
        self.done += self.size
        completion, generated = self.completion[part], self.generated[part]
        at, rows = scored(len(hidden), completion), rows_of(completion)
        kept, cu_kept = kept_sets(self.masks[part], generated)
        # Where there is no completion there are no sets.
        cu_kept = F.pad(cu_kept.diff()[rows].cumsum(0), (1, 0))
        labels = self.ids[part].where(generated, IGNORE_INDEX).flatten()[rows]
        found = linear_kept_logprobs(
            hidden[at], head, labels, kept, cu_kept, temperature=temperature
        ).kept_logprobs
        return found.new_zeros(len(hidden)).index_put((at,), found)


def with_kept_sets(batch: TokenBatch, inputs: dict[str, Any]) -> TokenBatch:
    """A micro-batch of TRL's, with the kept sets that it carries."""
    masks = inputs.get(KEY)
    if masks is None:
        return batch
    return batch.with_kept(*kept_sets(masks, counted(inputs).bool()))
