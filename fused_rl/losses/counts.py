"""The counts of a step whose tokens are spread over ranks.

Engines average gradients: with R ranks, each of which forms its loss of its own tokens, the step's
gradient is the sum over ranks of d loss[r] / R. With the counts of the whole step divided by R,

    num_tokens = sum_r num_tokens[r] / R          num_sequences = sum_r num_sequences[r] / R

every mean of means.py gives the gradient of one process that has all tokens, whatever the share of
each rank. The mean over ranks of their losses and metrics (of ratio_max: the largest) is then the
loss and the metrics of the step.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fused_rl import checks
from fused_rl.losses.batch import TokenBatch, is_batch

_NO_GROUP = "must be a torch.distributed.ProcessGroup or None (of a DeviceMesh: get_group())"


def across(
    batch: TokenBatch, group: Any | None = None, *, context: Any | None = None
) -> TokenBatch:
    """The batch with the counts of the whole step, as a rank of several is to divide by them.

    Every rank of the group calls it, those without counted tokens too. Again, it changes nothing.

    Where sequences are split over the ranks of `context` (context parallel), the batch holds this
    rank's part of each: the same sequences in the same order on all of them, a sequence of which a
    rank holds nothing being empty there, labels shifted before they are split. Sums over sequences
    (the ratios of gspo, kimi, rloo; masks of sequences) then are those of whole sequences: the loss
    and its backward pass run collectives over `context`. What runs along a sequence, as advantages
    and rewards to go do, is formed before it is split.

    Args:
        batch: of this rank; or a PreferenceBatch, by its own across.
        group: the torch.distributed.ProcessGroup over which gradients are averaged, the ranks of
            `context` among its own; None: all ranks. Ranks that hold the same tokens, as
            tensor-parallel ones do, must not be counted twice: give the group of the ranks that
            hold different ones.
        context: the ProcessGroup of the ranks that hold parts of the same sequences; None:
            sequences are whole.

    Returns:
        A TokenBatch whose num_tokens and num_sequences are float64 tensors []. In a process without
        torch.distributed they are its own counts.

    Raises:
        ValueError: on every rank of `context`, parts of different numbers of sequences.
    """
    if not isinstance(batch, TokenBatch) and hasattr(batch, "across"):
        return batch.across(group, context=context)
    is_batch(batch)
    for name, given in (("group", group), ("context", context)):
        checks.require(
            given is None or _is_group(given),
            lambda name=name, given=given: f"{name} {_NO_GROUP}, got {checks.shown(given)}",
        )
    if context is not None and batch.context is None:
        batch = _of_whole_sequences(batch, context)
    like = {"dtype": torch.float64, "device": batch.labels.device}
    counts = torch.stack(
        [torch.as_tensor(count, **like) for count in (batch.num_tokens, batch.num_sequences)]
    )
    if group is not None or (dist.is_available() and dist.is_initialized()):
        dist.all_reduce(counts, group=group)
        counts /= dist.get_world_size(group)
    num_tokens, num_sequences = counts.unbind()
    return replace(batch, num_tokens=num_tokens, num_sequences=num_sequences)


def _is_group(thing: object) -> bool:
    return dist.is_available() and isinstance(thing, dist.ProcessGroup)


def _of_whole_sequences(batch: TokenBatch, context: Any) -> TokenBatch:
    """With the tokens of whole sequences, each of which is counted by one rank's share alone."""
    here = torch.tensor(batch.local_sequences, device=batch.labels.device)
    extremes = torch.stack([here, -here])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=context)
    most, fewest = extremes[0].item(), -extremes[1].item()
    checks.require(
        most == fewest,
        lambda: (
            "ranks of context must hold parts of the same sequences, got batches of "
            f"{fewest} to {most} sequences: give every rank all of them, empty ones too"
        ),
    )
    tokens = batch.sequence_tokens.new_zeros(batch.local_sequences)
    tokens = tokens.index_copy(0, batch.sequence, batch.sequence_tokens)
    dist.all_reduce(tokens, group=context)
    return replace(
        batch,
        sequence_tokens=tokens[batch.sequence],
        num_sequences=batch.num_sequences / dist.get_world_size(context),
        context=context,
    )
