"""The bare matrix products that times are compared with, in two ways.

A product that writes into an output which is there takes what its arithmetic takes. One that
allocates its output, as `hidden @ weight.T` does, takes new memory as well: on a CPU a large buffer
goes back to the system after each call, and the next one's pages are cleared one by one as they are
touched, 16384 of them for N = 1024, V = 32768 in bfloat16. Times are judged by the first; the
second flatters whoever needs no such buffer. A GPU's caching allocator hands out the same block
again, so that there is one way there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_rl.bench.records import ALLOCATING, PRODUCTS

Pair = tuple[Tensor, Tensor]


def factors(hidden: Tensor, weight: Tensor, nhv: int) -> list[Pair]:
    """Both sides of each product: 2 NHV for the logits, 2 for dhidden, 2 for dweight.

    Args:
        hidden: [N, H].
        weight: [V, H].
        nhv: 2, 4 or 6.
    """
    pairs = [(hidden, weight.T)]
    if nhv > 2:
        shape = len(hidden), len(weight)
        dlogits = torch.randn(shape, dtype=hidden.dtype, device=hidden.device)
        pairs += [(dlogits, weight), (dlogits.T, hidden)][: nhv // 2 - 1]
    return pairs


def bare(pairs: list[Pair]) -> dict[str, Callable[[], object]]:
    """title -> a call that forms every product once, with the one that judges first."""
    found = {PRODUCTS: into_outputs(pairs)}
    if pairs[0][0].device.type == "cpu":
        found[ALLOCATING] = lambda: allocated(pairs)
    return found


def into_outputs(pairs: list[Pair]) -> Callable[[], list[Tensor]]:
    """A call that returns the products, always in the same memory, whose pages are there."""
    outputs = [a.new_ones(len(a), b.shape[1]) for a, b in pairs]

    def run() -> list[Tensor]:
        for (a, b), output in zip(pairs, outputs, strict=True):
            torch.mm(a, b, out=output)
        return outputs

    return run


def allocated(pairs: list[Pair]) -> None:
    """Each product in memory of its own, which is given back before the next."""
    for a, b in pairs:
        _ = a @ b
        del _
