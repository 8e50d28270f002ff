"""The logits of a chunk of tokens, and their gradient in place of them: 2 NHV, and 4 NHV more.

For a loss that is known between the two. Labels are inside the vocabulary.

The vocabulary may be part of a larger one: then the gradient takes the lse and the entropy of the
whole, and a label that lies in another part is V, one past the end.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl.ops import native
from fused_rl.ops.chunks import (
    chunk_rows,
    chunk_tokens,
    padded,
    round_up,
    scratch_bytes,
    statistics_like,
    waiting_dtype,
)
from fused_rl.ops.formulas import add_gradients, statistics
from fused_rl.ops.record import Given, Head, Known, Limits, Operator, Upstream, Written
from fused_rl.ops.two_heads import TwoHeads


class ChunkStatistics(NamedTuple):
    """Statistics, and the logits for the backward pass that follows at once."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor
    # In plain torch [V * padded(N)]; a kernel has a layout, a size and a dtype of its own.
    z: Tensor


class ChunkLogits(NamedTuple):
    """z of ChunkStatistics, which is spent: a kernel may write the gradient in its place."""

    z: Tensor


class Sums(NamedTuple):
    """What is written, or added to; an empty one is skipped. And what dhidden is part of."""

    # [V, H], contiguous, in any floating dtype; of fewer columns: those of the last ones of weight.
    dweight: Written
    dbias: Written  # [V], in any floating dtype
    accumulate: bool
    # Whether dhidden is one of several summands: those are rounded once, after their sum.
    partial: bool = False


def dhidden_dtype(head: Head | TwoHeads, sums: Sums) -> torch.dtype:
    """That of the logits for a summand; else of hidden, or float32 where that is float16: its loss
    is still to be scaled.
    """
    return head.dtype if sums.partial else waiting_dtype(head.hidden)


def keeps_exponentials(head: Head, given: Given) -> bool:
    """Whether the C++ kernel has exponentials in 16 bits of a chunk in the place of fp32 logits."""
    plain = head.softcap == 0.0 and not given.has_dentropy
    return plain and native.multiplies_bfloat16(head.hidden, head.weight)


def room(head: Head, given: Given) -> Tensor:
    """What a chunk's z is in: in plain torch, or in the C++ kernel's layout of exponentials."""
    hidden, weight, *_ = head
    N, V = padded(hidden.shape[0]), weight.shape[0]
    if not keeps_exponentials(head, given):
        return hidden.new_empty(V * N, dtype=head.dtype)
    # With float32 of each block of 64 rows at least, and of the label.
    return hidden.new_empty(N * (V + 2 * (round_up(V, 64) // 64) + 2), dtype=torch.int16)


def exponentials_fit(head: Head, limits: Limits) -> bool:
    """Whether the C++ kernel keeps those of all tokens for the backward pass."""
    given = Given(False)
    most = tokens_of_chunk(head, given, limits.chunk_bytes)
    return keeps_exponentials(head, given) and len(head.labels) <= most


def tokens_of_chunk(head: Head, given: Given, chunk_bytes: int | None) -> int:
    """Tokens whose logits, or what stands for them, a chunk may hold."""
    hidden, weight, *_ = head
    if not keeps_exponentials(head, given):
        return chunk_tokens(hidden, weight, chunk_bytes)
    scratch = scratch_bytes(hidden.device, chunk_bytes)
    return chunk_rows(weight.shape[0], torch.int16, scratch)


@Operator
def linear_logprobs_chunk(head: Head, given: Given) -> ChunkStatistics:
    """In plain torch z is [N, V], flattened. The C++ kernel has exponentials in 16 bits where the
    gradient of the log-prob is all that is asked of z.
    """
    z, N = head.logits(), len(head.labels)
    beyond = head.weight.shape[0] * (padded(N) - N)
    return ChunkStatistics(*statistics(z, head.labels), F.pad(z.flatten(), (0, beyond)))


@linear_logprobs_chunk.fake
def _(head: Head, given: Given) -> ChunkStatistics:
    return ChunkStatistics(*statistics_like(head.hidden, head.weight), room(head, given))


@Operator
def linear_logprobs_chunk_backward(
    logits: ChunkLogits, upstream: Upstream, head: Head, known: Known, sums: Sums
) -> Tensor:
    """dhidden [N, H], in `dhidden_dtype`."""
    if not sums.accumulate:
        sums.dweight.zero_()
        sums.dbias.zero_()
    N, V = head.hidden.shape[0], head.weight.shape[0]
    z = logits.z[: N * V].view(N, V)
    dhidden = add_gradients(upstream, known, head, z, sums.dweight, sums.dbias)
    return dhidden.to(dhidden_dtype(head, sums))


@linear_logprobs_chunk_backward.fake
def _(logits: ChunkLogits, upstream: Upstream, head: Head, known: Known, sums: Sums) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape, dtype=dhidden_dtype(head, sums))


@Operator
def linear_logprobs_chunk_unit(logits: ChunkLogits, head: Head, known: Known) -> Tensor:
    """d logprobs[n] / d hidden[n], [N, H]: dhidden where every upstream gradient is 1 and 0."""
    ones, none = torch.ones_like(known.entropy), head.weight.new_empty(0)
    upstream, sums = Upstream(ones, torch.zeros_like(ones)), Sums(none, none.clone(), False)
    return linear_logprobs_chunk_backward(logits, upstream, head, known, sums)


@linear_logprobs_chunk_unit.fake
def _(logits: ChunkLogits, head: Head, known: Known) -> Tensor:
    return head.hidden.new_empty(head.hidden.shape, dtype=waiting_dtype(head.hidden))
