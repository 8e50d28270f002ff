"""torch.autocast stays outside of the operators: who calls one has cast what is to be cast."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def autocasts(kind: str) -> bool:
    """Whether torch.autocast is on for that type of device, which need not have one."""
    # To ask what a device has ends a graph of torch 2.11.
    has = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return has and torch.is_autocast_enabled(kind)


def in_full(body: Callable) -> Callable:
    """body, whose products keep the dtypes that they are given."""

    @functools.wraps(body)
    def run(*args, **options):
        kind = next(a.device.type for a in args if isinstance(a, Tensor))
        if not autocasts(kind):
            return body(*args, **options)
        with torch.autocast(kind, enabled=False):
            return body(*args, **options)

    return run
