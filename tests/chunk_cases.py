"""The operators of a chunk, by each implementation, beside their formulas in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops import ChunkLogits, Given, Head, Known, Limits, Sums, Upstream
from fused_rl.ops.chunk import (
    ChunkStatistics,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
)
from fused_rl.ops.formulas import raw_gradient
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.record import Gradients, Needs


class Way(NamedTuple):
    """An implementation: functions of the records of both operators."""

    forward: Callable[..., ChunkStatistics]
    backward: Callable[..., Tensor]
    two_passes: Callable[..., Gradients]  # the backward half of linear_logprobs
    given: Given = Given(True)  # of the forward half


PLAIN = Way(
    linear_logprobs_chunk.plain,
    linear_logprobs_chunk_backward.plain,
    linear_logprobs_backward.plain,
)
# On a CPU with the library.
CPP = Way(linear_logprobs_chunk, linear_logprobs_chunk_backward, linear_logprobs_backward)
# With exponentials for logits in bfloat16, which are formed again where an entropy has a gradient.
CPP_EXPONENTIALS = CPP._replace(given=Given(False))


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
    columns: int | None = None,
) -> Formed:
    """The gradients of a chunk; known and labels: what the backward half is given in the place of
    what the forward half found and was given; columns: of dweight, the last ones.
    """
    stats = way.forward(head, way.given)
    known = known or Known(stats.lse, stats.entropy)
    of_labels = head if labels is None else head._replace(labels=labels)
    V, H = head.weight.shape
    H = H if columns is None else columns
    sums = torch.full((V, H), torch.nan, dtype=head.dtype), torch.full((V,), torch.nan).to(up[0])
    args = (ChunkLogits(stats.z), up, of_labels, known, Sums(*sums, False, partial))
    return Formed(way.backward(*args), *sums)


def draw_of(head: Head, up: Upstream, known: Known | None = None) -> Tensor:
    """The gradient of hidden . weight^T, [N, V] in float64; known: of a whole vocabulary."""
    head, up = exactly(head), exactly(up)
    z = head.logits()
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    if known is not None:
        logp, entropy = z - known.lse[:, None], known.entropy.double()
    return raw_gradient(up, entropy, head, z, logp)


def exact(head: Head, draw: Tensor) -> Formed:
    """In float64, from the gradient of hidden . weight^T."""
    return Formed(draw @ head.weight.double(), draw.T @ head.hidden.double(), draw.sum(0))


def known_of(head: Head) -> Known:
    """In float64, the entropy as the operators have it."""
    stats = PLAIN.forward(exactly(head), Given(True))
    return Known(stats.lse, stats.entropy.to(head.dtype))


def part_of(head: Head, entries: slice) -> tuple[Head, Tensor]:
    """The head of some entries, and its labels as the backward half takes them: one past the end
    where they lie in another part. The forward half takes 0 there.
    """
    weight = head.weight[entries]
    labels = head.labels - entries.start
    here = (labels >= 0) & (labels < len(weight))
    bias = None if head.bias is None else head.bias[entries]
    part = head._replace(weight=weight, bias=bias, labels=labels.where(here, 0))
    return part, labels.where(here, len(weight))


# What each implementation must do where a part of dweight is wanted


def check_last_columns(way: Way, head: Head, columns: int, budget: float) -> None:
    """dweight of few columns is the end of dweight, written and added to, with the same dhidden."""
    up = random_upstream(head)
    whole, found = (formed(way, head, up, columns=c) for c in (None, columns))
    right = exact(head, draw_of(head, up)).dweight[:, -columns:]
    assert found.dweight.shape == right.shape and relative(found.dweight, right) < budget
    assert torch.equal(found.dhidden, whole.dhidden) and torch.equal(found.dbias, whole.dbias)
    stats = way.forward(head, way.given)
    known = Known(stats.lse, stats.entropy)
    sums = Sums(found.dweight.clone(), found.dbias.clone(), True)
    way.backward(ChunkLogits(stats.z), up, head, known, sums)
    assert relative(sums.dweight, 2 * right) < budget


# What each implementation must do with part of a vocabulary


def check_parts(way: Way, head: Head, sizes: tuple[int, ...], budget: float) -> None:
    """Parts that are given the lse and the entropy of the whole have its gradients, each its own
    rows; their summands of dhidden add up to that of the whole. In one pass and in two.
    """
    up, known = random_upstream(head), known_of(head)
    draw = draw_of(head, up)
    right = exact(head, draw)
    totals = [torch.zeros_like(right.dhidden) for _ in range(2)]
    start = 0
    for size in sizes:
        entries = slice(start, start + size)
        start += size
        part, labels = part_of(head, entries)
        once = formed(way, part, up, known=known, labels=labels, partial=True)
        limits, needs = Limits(-100, 2**20), Needs(True, True, head.bias is not None)
        again = way.two_passes(up, part._replace(labels=labels), limits, known, needs)
        for total, found in zip(totals, (once, again), strict=True):
            total += found.dhidden.double()
            assert relative(found.dweight, right.dweight[entries]) < budget
            if found.dbias.numel():
                # Of one entry it is one number, whose terms may cancel.
                off = found.dbias.double() - right.dbias[entries]
                assert off.norm() < budget * draw[:, entries].abs().sum(0).norm()
    assert start == len(head.weight)
    for total in totals:
        assert relative(total, right.dhidden) < budget


def check_labels_elsewhere(way: Way, head: Head, budget: float) -> None:
    """They add nothing, and the token has its share of -p all the same."""
    up = random_upstream(head, entropy=False)
    labels = torch.full_like(head.labels, len(head.weight))
    labels[::3] = head.labels[::3]
    found = formed(way, head, up, labels=labels)
    elsewhere = head._replace(labels=labels)
    for ours, true in zip(found, exact(head, draw_of(elsewhere, up)), strict=True):
        assert relative(ours, true) < budget
    labels[:] = len(head.weight)
    plain = head._replace(bias=None, temperature=torch.ones_like(head.temperature), softcap=0.0)
    sums = formed(way, plain._replace(scale=1.0), up, labels=labels).dbias
    # All of the mass, of every token.
    right = -up.dlogprobs.double().sum()
    assert abs(sums.double().sum() - right) < budget * up.dlogprobs.double().norm()


def check_far_below(way: Way, head: Head, below: float, budget: float) -> None:
    """Where a part has next to none of the mass, all that is left is the label's own entry."""
    up, own = random_upstream(head), known_of(head)
    known = Known(own.lse + below, own.entropy)
    labels = torch.full_like(head.labels, len(head.weight))
    labels[::2] = head.labels[::2]
    found = formed(way, head, up, known=known, labels=labels, partial=True)
    right = exact(head, draw_of(head._replace(labels=labels), up, known))
    assert all(t.isfinite().all() for t in found)
    assert relative(found.dhidden[::2], right.dhidden[::2]) < budget
    assert relative(found.dweight, right.dweight) < budget
    assert found.dhidden[1::2].abs().max() < 1e-17 + 1e3 * math.exp(-below)


def check_nothing_but_minus_infinity(way: Way, dtype: torch.dtype) -> None:
    """A part with no mass: its lse is -inf, and among others it has no gradient."""
    head = random_head(9, 7, 70, dtype)
    head = head._replace(bias=torch.full((70,), -torch.inf, dtype=head.dtype))
    stats = way.forward(head, way.given)
    assert (stats.lse == -torch.inf).all()
    # These are of no distribution, and are to be left out of a sum, not weighed with 0.
    assert all(t.isnan().all() for t in (stats.logprobs, stats.entropy, stats.top))
    known = Known(torch.linspace(-3, 9, 9).double(), torch.ones(9, dtype=head.dtype))
    labels = torch.full_like(head.labels, 70)
    found = formed(way, head, random_upstream(head), known=known, labels=labels, partial=True)
    assert all((t == 0).all() for t in found)


def check_some_at_minus_infinity(way: Way, dtype: torch.dtype, budget: float) -> None:
    """The first part has one entry that can be, the second two."""
    head = random_head(9, 7, 70, dtype)
    bias = torch.full((70,), -torch.inf, dtype=head.dtype)
    bias[[3, 40, 69]] = 0.0
    labels = torch.tensor([3, 40, 69])[torch.arange(9) % 3]
    check_parts(way, head._replace(bias=bias, labels=labels), (30, 40), budget)


def relative(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).norm() / right.norm().clamp_min(1e-12))
