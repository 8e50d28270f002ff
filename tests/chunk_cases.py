"""The operators of a chunk, by each implementation, beside their formulas in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops import ChunkLogits, Head, Known, Sums, Upstream
from fused_rl.ops.chunk import (
    ChunkStatistics,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
)
from fused_rl.ops.formulas import raw_gradient


class Way(NamedTuple):
    """An implementation: functions of the records of both operators."""

    forward: Callable[..., ChunkStatistics]
    backward: Callable[..., Tensor]


PLAIN = Way(linear_logprobs_chunk.plain, linear_logprobs_chunk_backward.plain)
# On a CPU with the library.
CPP = Way(linear_logprobs_chunk, linear_logprobs_chunk_backward)


class Formed(NamedTuple):
    """Of a chunk's tokens; the sums in float32, or float64 where the logits are."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


def random_head(
    N: int, H: int, V: int, dtype: torch.dtype = torch.bfloat16, transform: bool = False
) -> Head:
    """All options but ignored tokens, which a chunk has none of."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight = torch.randn(N, H).to(dtype), (2 * torch.randn(V, H) / H**0.5).to(dtype)
    labels, ones = torch.randint(0, V, (N,)), torch.ones(N, dtype=wide)
    if not transform:
        return Head(hidden, weight, None, labels, ones, 1.0, 0.0)
    temperature = torch.rand(N, dtype=wide) + 0.5
    return Head(hidden, weight, torch.randn(V, dtype=wide), labels, temperature, 0.7, 5.0)


def random_upstream(head: Head, entropy: bool = True) -> Upstream:
    up = torch.randn(2, len(head.labels), dtype=head.dtype)
    up[1] *= entropy
    return Upstream(*up)


def exactly(record: tuple) -> tuple:
    """Its tensors in float64."""
    return record._make(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in record
    )


def formed(
    way: Way,
    head: Head,
    up: Upstream,
    *,
    known: Known | None = None,
    labels: Tensor | None = None,
    partial: bool = False,
) -> Formed:
    """The gradients of a chunk; known and labels: what the backward half is given in the place of
    what the forward half found and was given.
    """
    stats = way.forward(head)
    known = known or Known(stats.lse, stats.entropy)
    of_labels = head if labels is None else head._replace(labels=labels)
    V, H = head.weight.shape
    sums = torch.full((V, H), torch.nan, dtype=head.dtype), torch.full((V,), torch.nan).to(up[0])
    args = (ChunkLogits(stats.z), up, of_labels, known, Sums(*sums, False, partial))
    return Formed(way.backward(*args), *sums)


def exact(head: Head, up: Upstream, known: Known | None = None, drawn=lambda draw: draw) -> Formed:
    """In float64, by the formulas; drawn: what becomes of the gradient of hidden . weight^T."""
    head, up = exactly(head), exactly(up)
    z = head.logits()
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    if known is not None:
        logp, entropy = z - known.lse[:, None], known.entropy.double()
    draw = drawn(raw_gradient(up, entropy, head, z, logp))
    return Formed(draw @ head.weight, draw.T @ head.hidden, draw.sum(0))


def relative(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).norm() / right.norm().clamp_min(1e-12))
