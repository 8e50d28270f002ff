"""Sampling masks, as inference engines report them: what top-k, top-p or min-p left at each token.

    vLLM      CompletionOutput.sampling_mask, of one sequence: token_ids and offsets
    SGLang    meta_info["output_token_sampling_mask"], of one sequence: a list of ids per token

`kept_sets` puts them where the tokens lie in a batch, for TokenBatch.with_kept and
linear_kept_logprobs.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.sequences import segment_sum, sequence_ids
from fused_rl.reference import WHOLE_VOCABULARY, wrong_offsets

__all__ = ["KeptSets", "SamplingMask", "kept_sets"]


class SamplingMask(NamedTuple):
    """The kept sets of a sequence's T tokens: token_ids[offsets[t] : offsets[t + 1]]."""

    token_ids: Any  # [M] integers
    offsets: Any  # [T + 1] integers, from 0 to M


class KeptSets(NamedTuple):
    """Those of the n-th of the flattened tokens: kept[cu_kept[n] : cu_kept[n + 1]]."""

    kept: Tensor  # [M] int64
    cu_kept: Tensor  # [N + 1] int64


def kept_sets(
    masks: Sequence[SamplingMask | Sequence[Any] | None],
    generated: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> KeptSets:
    """The kept sets of a batch, from the sampling masks of its sequences.

    Of a token without a set nothing is known to be left out: its set is [-1], which stands for the
    whole vocabulary. Not so an empty one, which is a mistake: a sampler keeps what it samples.

    Args:
        masks: of each sequence, its generated tokens in order, be they of several turns:
            - token_ids and offsets: vLLM's, or a SamplingMask;
            - one entry per token: ids as a list, an array or a tensor, or None where there are
              none;
            - None: no token of this sequence has a set.
        generated: [B, T] or, packed, [N]; bool or 0/1: the labels that the engine generated, which
            are given the sets in order. Others are given empty ones. A sequence that has none of
            them, as one that was truncated and is left out, may bring sets all the same.
        cu_seqlens: [B + 1] int, where packed sequences begin; None: padded.

    Returns:
        KeptSets(kept, cu_kept), on the device of generated.

    Raises:
        ValueError: masks that are not one per sequence; a mask that is not one set per generated
            token; an empty set; ids that are not integers; offsets that do not rise from 0 to the
            number of ids.
    """
    checks.is_mask("generated", generated)
    sequence, B = sequence_ids(generated.shape, cu_seqlens, generated.device)
    checks.require(
        isinstance(masks, Sequence) and len(masks) == B,
        lambda: (
            f"masks must be one per sequence, {B}, got "
            + (str(len(masks)) if isinstance(masks, Sequence) else checks.shown(masks))
        ),
    )
    here = generated.reshape(-1) != 0
    counts = segment_sum(here.double(), sequence, B).long().tolist()
    parts = [_of_sequence(b, mask, counts[b]) for b, mask in enumerate(masks)]
    kept = torch.cat([torch.empty(0, dtype=torch.int64), *(ids for ids, _ in parts)])
    given = torch.cat([torch.empty(0, dtype=torch.int64), *(lengths for _, lengths in parts)])
    lengths = torch.zeros_like(sequence).masked_scatter(here, given.to(here.device))
    return KeptSets(kept.to(here.device), F.pad(lengths.cumsum(0), (1, 0)))


def _of_sequence(b: int, mask: object, count: int) -> tuple[Tensor, Tensor]:
    """The kept ids [m] of its generated tokens, and how many of each [count]."""
    none = torch.empty(0, dtype=torch.int64)
    if count == 0:
        return none, none
    if mask is None:
        return torch.full((count,), WHOLE_VOCABULARY), torch.ones(count, dtype=torch.int64)
    if hasattr(mask, "token_ids") and hasattr(mask, "offsets"):
        ids = _integers(f"token_ids of masks[{b}]", mask.token_ids)
        offsets = _integers(f"offsets of masks[{b}]", mask.offsets)
        checks.require(len(offsets) > 0, lambda: f"offsets of masks[{b}] must be [T + 1], got [0]")
        said = wrong_offsets(offsets, len(ids), "offsets", "token_ids")
        checks.require(said is None, lambda: f"of masks[{b}]: {said}")
        lengths = offsets.diff()
    else:
        checks.require(
            isinstance(mask, Sequence) and not isinstance(mask, str),
            lambda: (
                f"masks[{b}] must have token_ids and offsets, or be a list with one entry per "
                f"token, or None, got {checks.shown(mask)}"
            ),
        )
        ids, lengths = _of_list(b, mask)
    checks.require(
        len(lengths) == count,
        lambda: f"masks[{b}] has {len(lengths)} sets, for {count} generated tokens",
    )
    checks.require(
        bool((lengths > 0).all()),
        lambda: (
            f"the set of token {int((lengths == 0).nonzero()[0])} in masks[{b}] is empty: give "
            "None in a list, or the id -1, where the engine reported none"
        ),
    )
    return ids, lengths


def _of_list(b: int, mask: Sequence[Any]) -> tuple[Tensor, Tensor]:
    whole = [WHOLE_VOCABULARY]
    sets = [whole if ids is None else ids for ids in mask]
    if all(isinstance(ids, list) for ids in sets):
        # Of plain lists one tensor is made in one go.
        ids = _integers(f"masks[{b}]", list(chain.from_iterable(sets)))
    else:
        sets = [_integers(f"masks[{b}][{t}]", ids) for t, ids in enumerate(sets)]
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *sets])
    return ids, torch.tensor([len(s) for s in sets], dtype=torch.int64)


def _integers(name: str, values: object) -> Tensor:
    """[n] int64, on the CPU."""
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, got {checks.shown(values)}") from error
    checks.require(
        tensor.dim() == 1
        and (len(tensor) == 0 or tensor.dtype in (torch.int32, torch.int64, torch.uint32)),
        lambda: f"{name} must be [n] of int64 or int32, got {checks.shown(values)}",
    )
    return tensor.long()
