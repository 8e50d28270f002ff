"""The hardware of gluon_emulator.py: threads that take turns, memory, barriers and transfers."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Wrong = Callable[[str, int], int]
POISON = 0x7FEE  # the bits of a NaN in fp16 and bf16 that no computation makes


class Device:
    """Threads that take turns, and transfers that happen some time."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.conditions: dict[int, Callable[[], bool]] = {}
        self.turns: dict[int, threading.Semaphore] = {}
        self.transfers: list[Callable[[], None]] = []
        self.unfenced: set[int] = set()  # threads that wrote shared memory which TMA may not see
        self.error: BaseException | None = None

    def fence(self) -> None:
        self.unfenced.discard(threading.get_ident())

    def go_on(self) -> None:
        """Let transfers happen, and give the turn to a thread that can use it."""
        while self.conditions:
            ready = [t for t, condition in self.conditions.items() if self.error or condition()]
            if not ready and not self.transfers:
                self.error = RuntimeError("deadlock")
                continue
            chosen = self.random.randrange(len(ready) + len(self.transfers))
            if chosen < len(ready):
                self.turns[ready[chosen]].release()
                return
            self.transfers.pop(chosen - len(ready))()

    def wait(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Until it is this thread's turn again, and the condition holds."""
        me = threading.get_ident()
        self.conditions[me] = condition
        self.go_on()
        self.turns[me].acquire()
        if self.error:
            raise self.error

    def run(self, partitions: list[Callable[[], None]]) -> None:
        started = threading.Barrier(len(partitions) + 1)

        def body(partition: Callable[[], None]) -> None:
            me = threading.get_ident()
            self.turns[me] = threading.Semaphore(0)
            self.conditions[me] = lambda: True
            started.wait()
            self.turns[me].acquire()
            try:
                partition()
            except BaseException as error:
                self.error = self.error or error
            finally:
                del self.conditions[me]
                self.go_on()

        threads = [threading.Thread(target=body, args=(p,)) for p in partitions]
        for thread in threads:
            thread.start()
        started.wait()
        self.go_on()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        assert not self.transfers, "the kernel ended before its transfers"


class Barrier:
    """An mbarrier: a phase is complete when all have arrived, and all bytes."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phases = 0

    def update(self, arrivals: int = 0, bytes_: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += bytes_
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.phases += 1
            self.missing = self.count


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor, device: Device):
        self.data, self.shape, self.device = data, data.shape, device

    def index(self, i: int) -> Shared:
        return Shared(self.data[i], self.device)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.device)

    def permute(self, order: tuple) -> Shared:
        return Shared(self.data.permute(order), self.device)

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.device.unfenced.add(threading.get_ident())


class Barriers(list):
    index = list.__getitem__


class Box:
    """A tensor descriptor."""

    def __init__(self, descriptor: Any):
        self.base, self.layout = descriptor.base, descriptor.layout
        self.dtype, shape = descriptor.base.dtype, descriptor.block_shape
        nbytes = shape[0] * shape[1] * self.base.element_size()
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=nbytes)

    def inside(self, at: list) -> tuple[Tensor, int, int]:
        """The part of the box at these coordinates that the tensor has, and its sides."""
        row, column = (int(x) for x in at)
        rows, columns = self.block_type.shape
        here = self.base[row : row + rows, column : column + columns]
        return here, here.shape[0], here.shape[1]


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


class MBarrier:
    MBarrierLayout = staticmethod(lambda: Barrier)

    def __init__(self, device: Device, wrong: Wrong):
        self.device, self.wrong = device, wrong

    def init(self, barrier, count):
        barrier.count = barrier.missing = self.wrong("count", count)

    def wait(self, barrier, parity):
        parity = self.wrong("parity", parity)
        self.device.wait(lambda: (barrier.phases & 1) != parity)

    def arrive(self, barrier, count):
        barrier.update(arrivals=count)
        self.device.wait()

    def expect(self, barrier, nbytes):
        barrier.bytes += nbytes
        barrier.update(arrivals=1)


class Copies:
    """TMA: loads and stores that a thread begins and that end some time."""

    def __init__(self, device: Device):
        self.device = device
        self.stores: dict[int, list[Callable[[], None]]] = {}

    def load_tile(self, box: Box, at: list, barrier: Barrier, to: Shared) -> None:
        to.data.view(torch.int16).fill_(POISON)

        def arrive():
            here, rows, columns = box.inside(at)
            to.data.zero_()
            to.data[:rows, :columns] = here
            barrier.update(bytes_=-box.block_type.nbytes)

        self.device.transfers.append(arrive)
        self.device.wait()

    def store_tile(self, box: Box, at: list, source: Shared) -> None:
        assert threading.get_ident() not in self.device.unfenced, "a store that no fence follows"

        def leave():
            if leave in mine:
                mine.remove(leave)
                here, rows, columns = box.inside(at)
                here.copy_(source.data[:rows, :columns])

        mine = self.stores.setdefault(threading.get_ident(), [])
        mine.append(leave)
        self.device.transfers.append(leave)
        self.device.wait()

    def store_wait(self, pendings: int) -> None:
        mine = self.stores.setdefault(threading.get_ident(), [])
        while len(mine) > pendings:
            leave = mine[0]
            leave()
            self.device.transfers.remove(leave)


class Products:
    """wgmma: a product is read again when it is waited for, as late as that allows."""

    def __init__(self, wrong: Wrong):
        self.wrong = wrong
        self.in_flight: dict[int, list[tuple]] = {}

    def bits(self, *operands: Shared) -> list[Tensor]:
        return [o.data.contiguous().view(torch.int16).clone() for o in operands]

    def warpgroup_mma(self, a, b, acc, *, use_acc=True, is_async=False):
        assert is_async
        seen = self.bits(a, b)
        assert not any((x == POISON).any() for x in seen), "a product of what has not arrived"
        self.in_flight.setdefault(threading.get_ident(), []).append((a, b, seen))
        product = a.data.float() @ b.data.float()
        return acc + product if use_acc else product

    def warpgroup_mma_wait(self, num_outstanding, deps):
        mine = self.in_flight[threading.get_ident()]
        while len(mine) > self.wrong("outstanding", num_outstanding):
            a, b, seen = mine.pop(0)
            same = all(map(torch.equal, self.bits(a, b), seen))
            assert same, "a buffer was overwritten before it was read"
        return deps[0]
