"""What belongs to a sequence: its sums, extremes and backward recursions, over flat tokens.

Tokens are [N], those of a sequence next to each other; `sequence` [N] holds the index of each one's
sequence and never falls. No atomics: the same inputs give the same bits.
"""

from enum import Enum

import torch
from torch import Tensor

from fused_rl import checks


class Level(Enum):
    """Over which tokens a log-ratio is formed; ratios.py has a class of each name.

    TOKEN: each by itself. PRODUCT: the sum over its sequence, so that the ratio is the product of
    the tokens' ratios, that of the whole sequences' probabilities. GEOMETRIC: the mean over its
    sequence, so that the ratio is the tokens' geometric mean.
    """

    TOKEN = "token"
    PRODUCT = "product"
    GEOMETRIC = "geometric"


def sequence_ids(
    shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, int]:
    """The index of each token's sequence, [N] int64, and how many sequences there are.

    Args:
        shape: [B, T], or [N] with cu_seqlens.
        cu_seqlens: [B + 1] int, where packed sequences begin; None: padded.
    """
    if cu_seqlens is None:
        checks.require(len(shape) == 2, lambda: f"padded tokens must be [B, T], got {list(shape)}")
        B, T = shape
        return torch.arange(B, device=device).repeat_interleave(T), B
    checks.is_tensor("cu_seqlens", cu_seqlens)
    checks.require(len(shape) == 1, lambda: f"packed tokens must be [N], got {list(shape)}")
    checks.require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) > 0 and not cu_seqlens.is_floating_point(),
        lambda: (
            f"cu_seqlens must be [B + 1] integers, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        ),
    )
    checks.require(
        checks.has_values(cu_seqlens) and device.type != "meta",
        lambda: "packed sequences need the values of cu_seqlens, and a meta tensor has none: pad",
    )
    lengths = cu_seqlens.long().diff()
    bounds = [int(cu_seqlens[0]), int(cu_seqlens[-1])]
    checks.require(
        bounds == [0, shape[0]] and bool((lengths >= 0).all()),
        lambda: f"cu_seqlens must rise from 0 to N = {shape[0]}, got {cu_seqlens.tolist()}",
    )
    B = len(lengths)
    return torch.arange(B, device=device).repeat_interleave(lengths.to(device)), B


def segment_sum(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """[count]: the sum of values [N] over each sequence; 0 for one without tokens."""
    return _reduce(values, sequence, count, "sum", 0.0)


def segment_min(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """[count]: the least of values [N] in each sequence; inf for one without tokens."""
    return _reduce(values, sequence, count, "min", torch.inf)


def _reduce(values: Tensor, sequence: Tensor, count: int, how: str, empty: float) -> Tensor:
    starts = torch.searchsorted(sequence, torch.arange(count + 1, device=sequence.device))
    # segment_reduce adds up one number after another: in float32 that costs a long sequence digits.
    wide = values.double()
    reduced = torch.segment_reduce(wide, how, offsets=starts, initial=empty, unsafe=True)
    return reduced.to(values.dtype)


def has_next(sequence: Tensor) -> Tensor:
    """[N] bool: whether the token after this one belongs to the same sequence."""
    return torch.cat([sequence[1:] == sequence[:-1], sequence.new_zeros(1, dtype=torch.bool)])[
        : len(sequence)
    ]


def suffix_scan(values: Tensor, decay: Tensor) -> Tensor:
    """y[n] = values[n] + decay[n] * y[n + 1], with y[N] = 0.

    Reach doubles with each round, so that log2 N rounds do: after one of them y[n] covers `reach`
    terms and step[n] is the product of their decays. Nothing is ever divided, whatever the decay.
    Where decay is 0 nothing passes, not even a NaN.
    """
    y, step = values, decay
    reach = 1
    while reach < len(values):
        head, tail = y[:-reach], y[-reach:]
        passed = (step[:-reach] * y[reach:]).where(step[:-reach] != 0, 0.0)
        y = torch.cat([head + passed, tail])
        step = torch.cat([step[:-reach] * step[reach:], torch.zeros_like(tail)])
        reach *= 2
    return y
