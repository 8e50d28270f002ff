"""The three collectives that a spread head needs, as torch.compile traces them.

In eager code their results are on their way, until something reads them or `arrived` waits.
"""

from typing import Any

from torch import Tensor


def is_group(thing: object) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(thing, dist.ProcessGroup)


def ranks_of(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_world_size(group)


def rank_in(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def all_gathered(x: Tensor, group: Any) -> Tensor:
    """[n, ...] of each rank -> [R n, ...], in the order of ranks."""
    import torch.distributed._functional_collectives as collectives

    # Its name before torch 2.13.
    old = "all_gather_tensor"
    gather = getattr(collectives, "all_gather_single", None) or getattr(collectives, old)
    return gather(x.contiguous(), 0, group)


def exchanged(x: Tensor, group: Any) -> Tensor:
    """[R, ...] by the rank it goes to -> [R, ...] by the rank it came from."""
    import torch.distributed._functional_collectives as collectives

    return collectives.all_to_all_single(x.contiguous(), None, None, group)


def arrived(x: Tensor) -> Tensor:
    """x, a plain tensor, when it is there."""
    return x.wait() if hasattr(x, "wait") else x
