"""`fused-rl bench`: the tasks of a run, at the shape asked for and along the axes of a sweep."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_rl.bench import report
from fused_rl.bench.peers import PEERS, SEQUENCES, Case, Peer
from fused_rl.bench.preference import (
    PREFERENCE_KINDS,
    PREFERENCE_PEERS,
    Pairs,
    preference_task,
)
from fused_rl.bench.records import OURS, Content, Record
from fused_rl.bench.rounds import measure
from fused_rl.bench.tasks import (
    KINDS,
    NO_GRAD,
    STEP,
    Kind,
    Task,
    environment,
    head_task,
    usable,
)
from fused_rl.bench.two_heads import TWO_HEAD_KINDS, TWO_HEAD_PEERS, TwoHeads, two_head_task
from fused_rl.system import outputs
from fused_rl.system.signals import status_of, stop_behind, stoppable, stops

if TYPE_CHECKING:
    from rich.console import Console

PADDED_STEP = "GRPO step, more and more padding"
# A point of a curve needs no more.
CURVE_ROUNDS = 5
# Competing processes.
MOST_LOAD = 256


@dataclass(frozen=True)
class Work:
    """What is measured: kinds, of inputs that are made once for a shape, beside which peers."""

    kinds: tuple[Kind, ...]
    peers: dict[str, Peer]
    make: Callable[..., Any]
    task: Callable[[Any, Any], Task]


WORKS = {
    "logprobs": Work(KINDS, PEERS, Case.make, head_task),
    "divergence": Work(TWO_HEAD_KINDS, TWO_HEAD_PEERS, TwoHeads.make, two_head_task),
    "preference": Work(PREFERENCE_KINDS, PREFERENCE_PEERS, Pairs.make, preference_task),
}


@dataclass(frozen=True)
class BenchConfig:
    """What to run: names in WORKS and PEERS, sizes, dtype and device, timed rounds, directory.

    load: beside how many competing processes, once for each number.
    """

    work: str = "logprobs"
    tokens: int = 1024
    hidden: int = 1024
    vocabulary: int = 32768
    dtype: str = "bfloat16"
    device: str = "cpu"
    peers: tuple[str, ...] = ("eager",)
    rounds: int = 7
    sweep: bool = False
    load: tuple[int, ...] = (0,)
    out: str = "out/bench"

    def __post_init__(self) -> None:
        if self.tokens % SEQUENCES:
            raise ValueError(f"tokens must be a multiple of {SEQUENCES}, got {self.tokens}")
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise ValueError(f"peers must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
        if bad := [k for k in self.load if not 0 <= k <= MOST_LOAD]:
            raise ValueError(f"load must be from 0 to {MOST_LOAD} processes, got {bad[0]}")
        if len(set(self.load)) < len(self.load):
            given = ", ".join(map(str, self.load))
            raise ValueError(f"load must have each number of processes once, got {given}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no device of the kind")


@dataclass(frozen=True)
class Point:
    """A shape and what is measured there; axis as in records.py."""

    axis: str | None
    tokens: int
    hidden: int
    vocabulary: int
    kinds: tuple[Kind, ...]


def points(config: BenchConfig) -> list[Point]:
    """The shape asked for; in a sweep also an eighth, a quarter and a half of N, V and H, and a
    quarter of the tokens within once, twice and four times as many. Only log-probs are swept.
    """
    N, H, V = config.tokens, config.hidden, config.vocabulary
    found = [Point(None, N, H, V, WORKS[config.work].kinds)]
    if not config.sweep or config.work != "logprobs":
        return found
    kinds = (NO_GRAD, STEP)
    parts = (8, 4, 2)
    found += [Point("tokens", in_eights(N // k), H, V, kinds) for k in parts]
    found += [Point("vocabulary", N, H, max(8, V // k), kinds) for k in parts]
    found += [Point("hidden", N, max(8, H // k), V, kinds) for k in parts]
    counted = in_eights(N // 4)
    for k in (1, 2, 4):
        kind = Kind(PADDED_STEP, "grpo_step_padded", 6, counted=1 / k)
        found.append(Point("padded", counted * k, H, V, (kind,)))
    return list(dict.fromkeys(found))


def in_eights(tokens: int) -> int:
    """The multiple of SEQUENCES below, or the first."""
    return max(1, tokens // SEQUENCES) * SEQUENCES


def run(config: BenchConfig) -> int:
    """Measures, shows and writes.

    Ctrl-C, SIGTERM and SIGHUP end the measuring; what is there by then is shown and written.

    Returns:
        The exit status: 1 if one of our ways is wrong or fails, else 0; or 130, 143 or 129 after
        one of these.

    Raises:
        UnusableFolder: a ValueError; config.out cannot be written to.
        Unwritable: it could be, at the start.
    """
    from rich.console import Console

    folder = Path(config.out)
    outputs.try_folder(folder, *report.FILES)
    console = Console(width=118, markup=False)
    with stoppable():
        content = measured(config, console)
        if content["records"]:
            try:
                paths = report.write(folder, content)
            finally:
                report.show(console, content)
            for path in paths:
                console.print(f"written to {path}")
        if "interrupted" in content:
            console.print(f"Interrupted with {len(content['records'])} figures.")
    return exit_status(content)


def exit_status(content: Content) -> int:
    """That of the stop; else 1 if one of our ways is wrong or fails, else 0."""
    ours = [r for r in content["records"] if r["provider"].startswith(OURS)]
    return content.get("interrupted") or int(any(r["verdict"] != "right" for r in ours))


def measured(config: BenchConfig, console: Console) -> Content:
    """The environment, the configuration with the peers that are here, and the records.

    A run that a signal ends has the records until then, and its exit status as "interrupted". From
    here on signals wait, where they are handled: what was measured is to be written.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    peers, reasons = usable(config.peers, config.device, WORKS[config.work].peers)
    for reason in reasons:
        console.print(f"left out: {reason}")
    config = replace(config, peers=peers)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    records: list[Record] = []
    stopped = {}
    # What lives by now will go on living: no collection, also none within a call that is timed,
    # needs to look through it again.
    gc.freeze()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            for record in collect(config, progress):
                records.append(record)
        stops.held = True
    except BaseException as error:
        stops.held = True
        stop = stop_behind(error)
        if stop is None:
            raise
        stopped = {"interrupted": status_of(stop)}
    finally:
        gc.unfreeze()
    return {
        "environment": environment(config.device),
        "shape": asdict(config),
        **stopped,
        "records": records,
    }


def collect(config: BenchConfig, progress: Any) -> Iterator[Record]:
    """The records of all points and kinds; a curve is measured beside the first load alone."""
    bar = progress.add_task("", total=None)
    dtype, work = getattr(torch, config.dtype), WORKS[config.work]
    for point in points(config):
        N, H, V = point.tokens, point.hidden, point.vocabulary
        case = work.make(N, H, V, dtype, config.device)
        axis = {"axis": point.axis} if point.axis else {}
        rounds = min(config.rounds, CURVE_ROUNDS) if axis else config.rounds
        for kind in point.kinds:
            loads = config.load[:1] if axis else config.load
            total = len(config.peers) + 2 + rounds * len(loads)
            progress.reset(bar, total=total, description=f"N={N} H={H} V={V}: {kind.title}")
            task = work.task(case, kind)
            tick = partial(progress.advance, bar)
            for record in measure(task, config.peers, rounds, tick, loads):
                yield {**record, **axis}
        del case
    progress.remove_task(bar)
