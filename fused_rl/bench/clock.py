"""Time and memory of a call, in turns with others, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fused_rl import ops

try:
    import resource
except ImportError:  # Windows has none.
    resource = None

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of a call, and those until it returned. On a GPU the first are the device's, and what
    takes the host as long as the device is bound by its launches, or waits for the device within.

    user: on a CPU, what all threads of the process spent outside the kernel until the call
    returned, seconds; None elsewhere. A thread that spins on after the call is charged to the next.
    """

    seconds: float
    host: float
    user: float | None = None


class Clock:
    """Seconds of a call: events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device | str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self, run: Callable[[], object]) -> float:
        return self.timing(run).seconds

    def timing(self, run: Callable[[], object]) -> Timing:
        """The device's seconds and the host's."""
        if not self.cuda:
            before = user_seconds()
            host = wall(run)
            return Timing(host, host, None if before is None else user_seconds() - before)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        host = wall(run)
        end.record()
        torch.cuda.synchronize()
        return Timing(begin.elapsed_time(end) / 1e3, host)


def wall(run: Callable[[], object]) -> float:
    """Seconds until it returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def user_seconds() -> float | None:
    """Of this process, in all of its threads, without the kernel's; None where nobody can say."""
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_utime


def interleaved(
    cases: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], T],
    tick: Callable[[], None] = lambda: None,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[T]]:
    """What the clock (a Clock, or its `timing`) says of each case in each round. A round runs every
    case once, after one warm-up. From the second on there is none once `enough` says so.

    The order changes from round to round, and is the same in every run: what a case leaves behind,
    pages given back or a warm cache, is not always the next one's to bear.
    """
    for run in cases.values():
        run()
    found: dict[str, list[T]] = {name: [] for name in cases}
    order, shuffle = list(cases), random.Random(0).shuffle
    for done in range(rounds):
        if done and enough():
            break
        for name in order:
            found[name].append(clock(cases[name]))
        tick()
        shuffle(order)
    return found


def spread(values: list[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % points."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def peak_extra_bytes(run: Callable[[], object], device: torch.device | str) -> int | None:
    """How far memory rises above where it stood while `run` runs; None where nobody can say.

    `run` is called once, in any case.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        run()
        return None
    ops.release_memory()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    run()
    return max(0, process_bytes("VmHWM") - before)


def process_bytes(field: str) -> int:
    """Bytes, by the kernel's account of this process: VmRSS, VmHWM. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
