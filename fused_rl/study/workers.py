"""Cases that do not depend on each other, in as many processes as there are cores.

Each runs on one thread and draws from its own seed, so that numbers do not depend on how many
processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

Case = TypeVar("Case")
Found = TypeVar("Found")


def each(
    function: Callable[[Case], Found], cases: Sequence[Case], tick: Callable[[], None]
) -> list[Found]:
    """function of every case, in their order; both can be pickled. tick is called once a case.

    An exception of a case, and Ctrl-C, ends all of them.
    """
    count = min(len(cases), cores())
    if count <= 1:
        return [_ticked(function(case), tick) for case in cases]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_alone)
    try:
        futures = {pool.submit(function, case): i for i, case in enumerate(cases)}
        found = dict.fromkeys(range(len(cases)))
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            tick()
    except BaseException:
        # What runs is not waited for.
        for process in [*(pool._processes or {}).values()]:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [found[i] for i in range(len(cases))]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone() -> None:
    """One thread. What a terminal sends to all processes stops the first, which ends the others."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _ticked(found: Found, tick: Callable[[], None]) -> Found:
    tick()
    return found
