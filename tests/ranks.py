"""Processes of one gloo group that stay up for the session, so that a case costs its own time.

A case is a function (rank, world, **options) of a module of tests; what it returns comes back, by
rank. A rank that raises, dies or does not answer in time ends all of them: the others may wait for
it for ever. The next case gets a fresh group. Ranks meet at a file: no ports.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).parent)
START_SECONDS = 90.0
# What a case gets, and the others once one of them has failed.
CASE_SECONDS, GRACE_SECONDS = 30.0, 2.0
PRELOADED = ["torch", "torch.distributed", "torch.distributed.tensor", "fused_rl"]
PRELOADED += ["torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2"]


def serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Runs the cases that it is sent. Without a collective at the end, which could wait."""
    import sys

    sys.path.insert(0, TESTS)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=CASE_SECONDS),
    )
    pipe.send(("up", None))
    while (case := pipe.recv()) is not None:
        module, name, options = case
        torch.manual_seed(20240501)
        try:
            answer = getattr(importlib.import_module(module), name)(rank, world, **options)
            pipe.send(("ok", answer))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
    os._exit(0)


class RanksError(AssertionError):
    """What the ranks that failed said, and which did not answer."""


class Ranks:
    """`world` processes, started at their first case."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, module: str, name: str, seconds: float = CASE_SECONDS, **options: Any) -> list:
        """What the case returns on each rank.

        Raises:
            RanksError: one raised, died, or did not answer within `seconds`.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((module, name, options))
        return self.answers(seconds)

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # A file of that name must not be there yet.
        store = os.path.join(tempfile.mkdtemp(prefix="ranks"), "store")
        ends = [context.Pipe() for _ in range(self.world)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = [
            context.Process(target=serve, args=(rank, self.world, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in ends:
            theirs.close()
        self.answers(START_SECONDS)

    def answers(self, seconds: float) -> list:
        deadline, got = time.monotonic() + seconds, {}
        while len(got) < self.world and time.monotonic() < deadline:
            for rank, pipe in enumerate(self.pipes):
                if rank in got or not pipe.poll(0.002):
                    continue
                try:
                    got[rank] = pipe.recv()
                except EOFError:
                    got[rank] = ("error", "the process ended")
                if got[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        wrong = [f"rank {rank}: {said}" for rank, (state, said) in got.items() if state == "error"]
        if missing := [rank for rank in range(self.world) if rank not in got]:
            wrong.append(f"no answer from ranks {missing}")
        if wrong:
            self.stop()
            raise RanksError("\n".join(wrong))
        return [got[rank][1] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []


class Pools:
    """Ranks by their number: `ranks(4).run(...)`."""

    def __init__(self) -> None:
        self.pools: dict[int, Ranks] = {}

    def __call__(self, world: int) -> Ranks:
        return self.pools.setdefault(world, Ranks(world))

    def stop(self) -> None:
        for pool in self.pools.values():
            pool.stop()
