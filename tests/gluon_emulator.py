"""Runs a warp-specialised Gluon kernel on the CPU, its partitions as threads that take turns.

Triton's interpreter knows no Gluon. Here the functions of a kernel run as they stand, with torch in
the place of the language, and with memory and barriers that are as unkind as a device may be:

- A tile that is being loaded holds `POISON` until its bytes arrive, at a random later turn.
- A product reads its operands when it is issued and once more when it is waited for, and fails if
  they differ: so it fails on what has not arrived and on what is overwritten too early.
- A tile that is being stored is read at a random later turn, or when it is waited for.
- Barriers count as mbarriers do; where no thread and no transfer can go on, that is a deadlock. In
  the end all have completed equally many phases: each buffer was filled and handed back as often.

Who goes next is drawn from a seed. What is not looked at: layouts, registers, and the barriers
among the warps of a partition, which the compiler puts.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from emulated_hardware import (
    POISON,
    Barrier,
    Barriers,
    Box,
    Copies,
    Device,
    MBarrier,
    Pointer,
    Products,
    Shared,
)
from torch import Tensor
from triton.language.core import constexpr
from triton.runtime import JITFunction


class Language:
    """What gl and tl have that the kernels use, by torch."""

    float16, float32, bfloat16 = torch.float16, torch.float32, torch.bfloat16
    int32, int64 = torch.int32, torch.int64
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    where, exp, exp2 = torch.where, torch.exp, torch.exp2
    expand_dims = torch.unsqueeze
    static_range = range
    NVMMADistributedLayout = SliceLayout = BlockedLayout = staticmethod(lambda *_, **__: None)

    def __init__(self, device: Device, program: int):
        self.device, self.program = device, program
        self.barriers: list[Barriers] = []

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program)

    def static_assert(self, condition, message):
        assert condition, message

    def full(self, shape, value, dtype, layout=None):
        return torch.full(shape, value, dtype=dtype)

    def arange(self, start, end, layout=None):
        return torch.arange(start, end, dtype=torch.int32)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def convert_layout(self, value, layout, assert_trivial=False):
        return value

    def split(self, pairs):
        return pairs.unbind(-1)

    def sum(self, x, axis):
        return x.sum(axis)

    def max(self, x, axis):
        """As on a device: of the numbers, -inf if there is none."""
        if x.is_floating_point():
            x = x.where(~x.isnan(), float("-inf"))
        return x.amax(axis)

    def maximum(self, a, b, propagate_nan=None):
        a, b = (torch.as_tensor(x, dtype=torch.float32) for x in (a, b))
        return torch.maximum(a, b) if propagate_nan is not None else torch.fmax(a, b)

    def minimum(self, a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def load(self, pointer, mask=None, other=0):
        rows = pointer.offset.long()
        mask = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
        out = torch.full(rows.shape, other, dtype=pointer.memory.dtype)
        out[mask] = pointer.memory[rows[mask]]
        return out

    def store(self, pointer, value, mask):
        pointer.memory[pointer.offset[mask].long()] = value[mask]

    def allocate_shared_memory(self, dtype, shape, layout):
        if layout is Barrier:
            self.barriers.append(Barriers(Barrier() for _ in range(shape[0])))
            return self.barriers[-1]
        data = torch.empty(shape, dtype=dtype)
        data.view(torch.int16).fill_(POISON)
        return Shared(data, self.device)

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs):
        self.device.run([lambda f=f, args=args: f(*args) for f, args in functions_and_args])
        uses = [[barrier.phases for barrier in ring] for ring in self.barriers]
        assert all(phases == uses[0] for phases in uses), "filled and handed back unequally often"


def argument(value: Any) -> Any:
    """As a kernel sees it."""
    if isinstance(value, Tensor):
        span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        return Pointer(value.as_strided((span,), (1,)))
    return Box(value) if hasattr(value, "block_shape") else value


class Kernel:
    """In the place of a Gluon kernel: kernel[(programs,)](...) runs them one after another.

    wrong: what is done to numbers of the kernel, by name, to see whether mistakes are noticed:
    the count of a barrier, the parity that is waited for, the products that may stay in flight.
    """

    def __init__(self, kernel: JITFunction, seed: int, wrong: dict[str, Callable[[int], int]]):
        self.kernel, self.seed = kernel, seed
        self.wrong = lambda name, value: wrong.get(name, int)(value)

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def launch(*args, num_warps, enable_fp_fusion, **constants):
            given = [argument(a) for a in args]
            for program in range(grid[0]):
                self.emulated(program)(*given, **constants)

        return launch

    def emulated(self, program: int) -> Callable[..., None]:
        device = Device(self.seed + program)
        language, copies, products = Language(device, program), Copies(device), Products(self.wrong)
        names = {
            "gl": language,
            "tl": language,
            "fence_async_shared": device.fence,
            "mbarrier": MBarrier(device, self.wrong),
            "tma": copies,
            "load_tile": copies.load_tile,
            "store_tile": copies.store_tile,
            "warpgroup_mma": products.warpgroup_mma,
            "warpgroup_mma_wait": products.warpgroup_mma_wait,
        }
        return plain(self.kernel.fn, names)


def plain(function: Callable, names: dict[str, Any]) -> Callable:
    """The function as Python, its language replaced, and so with the functions that it calls."""

    def replaced(value: Any) -> Any:
        if isinstance(value, constexpr):
            return value.value
        if isinstance(value, JITFunction):
            return plain(value.fn, names)
        if isinstance(value, types.ModuleType):
            return Module(value, replaced)
        return value

    used = set(function.__code__.co_names)
    known = {n: replaced(v) for n, v in function.__globals__.items() if n in used - set(names)}
    scope = {**known, **{n: v for n, v in names.items() if n in used}}
    scope["__builtins__"] = __builtins__
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)


class Module:
    """A module whose functions are plain."""

    def __init__(self, module: types.ModuleType, replaced: Callable[[Any], Any]):
        self.module, self.replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self.replaced(getattr(self.module, name))
