"""Sampling masks of the rollout, replayed by verl's heads: log-probs of what was sampled from.

verl's engines hand the head hidden states and labels alone. `kept_sets` holds the sets for the
calls in its block, and `replay` has an engine open one around each forward that has masks:

```python
with verl.kept_sets(kept, cu_kept):
    output = model(input_ids=ids, temperature=0.7, return_dict=True)
```

log_probs are then renormalised over the sets, as linear_kept_logprobs has them; entropies stay
those of the whole vocabulary. Labels are input_ids rolled by one: the set at a position is that of
the token after it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.checks import is_indices, require
from fused_rl.linear.head import LMHead
from fused_rl.linear.kept import linear_kept_logprobs
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.reference import WHOLE_VOCABULARY
from fused_rl.rollouts import sampling_masks
from fused_rl.rollouts.sampling_masks import KeptSets
from fused_rl.stats import TokenStats

MASKS = "sampling_mask"


@dataclass(eq=False)
class _Held:
    """The sets of a block, and whether a head has looked at them."""

    sets: KeptSets
    used: bool = False


_held: list[_Held] = []
_steps: set[Callable] = set()


@contextmanager
def kept_sets(kept: Tensor, cu_kept: Tensor) -> Iterator[None]:
    """In this block linear_cross_entropy and FusedLinearForPPO renormalise their log-probs.

    Each call in it takes all of the sets, one for each of its labels.

    Args:
        kept, cu_kept: [M] and [N + 1] int64 or int32: the set of the n-th of the flattened labels
            is kept[cu_kept[n] : cu_kept[n + 1]]. A set of -1 alone is the whole vocabulary, as of a
            label that was not generated: `filled` puts it there.

    Raises:
        ValueError: kept or cu_kept that are no integers; by the head: another number of labels, as
            under sequence parallelism; as linear_kept_logprobs raises, for an empty set too.
        RuntimeError: at the end of a block in which none of the heads was called, since nothing
            has been renormalised.
    """
    is_indices("kept", kept)
    is_indices("cu_kept", cu_kept)
    held = _Held(KeptSets(kept, cu_kept))
    _held.append(held)
    try:
        yield
    finally:
        _held.remove(held)
    if not held.used:
        raise RuntimeError(
            "no head of fused_rl was called where kept sets were to be replayed: call "
            "fused_rl.integrations.verl.patch(), and set use_fused_kernels=True"
        )


def statistics(hidden: Tensor, head: LMHead | Tensor, labels: Tensor, **options: Any) -> TokenStats:
    """linear_logprobs, renormalised over the kept sets in whose block it is called."""
    if not _held:
        return linear_logprobs(hidden, head, labels, **options)
    kept, cu_kept = (t.to(labels.device) for t in _held[-1].sets)
    require(
        labels.numel() == len(cu_kept) - 1,
        lambda: (
            f"the head has labels {list(labels.shape)}, and {len(cu_kept) - 1} kept sets are "
            "replayed: sequences that are split over ranks or padded to a length have no replay"
        ),
    )
    _held[-1].used = True
    stats = linear_kept_logprobs(hidden, head, labels, kept, cu_kept, **options)
    return TokenStats(stats.kept_logprobs, stats.entropy)


def filled(sets: KeptSets) -> KeptSets:
    """With the whole vocabulary, -1, at the labels that sampling_masks.kept_sets gave none: those
    that were not generated, which verl's heads have log-probs of all the same.
    """
    kept, cu_kept = sets
    lengths = cu_kept.diff()
    empty = lengths == 0
    before = (empty.cumsum(0) - empty.long()).repeat_interleave(lengths)
    every = kept.new_full((len(kept) + int(empty.sum()),), WHOLE_VOCABULARY)
    every[torch.arange(len(kept), device=kept.device) + before] = kept
    return KeptSets(every, F.pad(lengths.clamp(min=1).cumsum(0), (1, 0)))


def sets_of(micro_batch: Any) -> KeptSets:
    """The kept sets, filled, of the labels that verl's engines form of a micro-batch.

    Args:
        micro_batch: with input_ids [B, j] nested, prompts and responses, padded (attention_mask) or
            nested; and sampling_mask: of each sequence one set per token of the response, None at
            those that the engine did not generate, or another mask of sampling_masks.kept_sets.

    Raises:
        ValueError: as sampling_masks.kept_sets raises.
    """
    offsets = micro_batch["input_ids"].offsets()
    lengths, responses = offsets.diff()[:, None], _lengths_of_responses(micro_batch)[:, None]
    at = torch.arange(int(lengths.max()), device=lengths.device)
    # The labels of a sequence are its tokens but the first, and then the next sequence's first.
    generated = (at >= lengths - responses - 1) & (at < lengths - 1)
    masks = list(micro_batch[MASKS])
    if _has(micro_batch, "use_remove_padding") and not micro_batch["use_remove_padding"]:
        return filled(sampling_masks.kept_sets(masks, generated))
    packed = generated[at < lengths]
    return filled(sampling_masks.kept_sets(masks, packed, cu_seqlens=offsets))


def _has(micro_batch: Any, key: str) -> bool:
    return key in micro_batch.keys()  # noqa: SIM118 - of a TensorDict itself `in` is an error


def _lengths_of_responses(micro_batch: Any) -> Tensor:
    """[B]: tokens of each response, of several turns and their tools'."""
    responses = micro_batch["responses"]
    if responses.is_nested:
        return responses.offsets().diff()
    return micro_batch["attention_mask"][:, micro_batch["prompts"].shape[1] :].sum(-1)


def replay(engine: type) -> None:
    """engine.forward_step replays the masks of the micro-batches that have any, from now on.

    A second call does nothing.

    Args:
        engine: one of verl's that packs sequences as its FSDPEngineWithLMHead does.
    """
    theirs = engine.forward_step
    if theirs in _steps:
        return

    @wraps(theirs)
    def forward_step(self: Any, micro_batch: Any, *args: Any, **options: Any) -> Any:
        if not _has(micro_batch, MASKS):
            return theirs(self, micro_batch, *args, **options)
        with kept_sets(*sets_of(micro_batch)):
            return theirs(self, micro_batch, *args, **options)

    _steps.add(forward_step)
    engine.forward_step = forward_step
