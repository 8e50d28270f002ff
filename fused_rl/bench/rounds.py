"""A task in timed rounds, and what they say.

Every figure can be trusted on a noisy machine: providers run in turns, in one process, with the
bare matrix products of the same shape and dtype, and a time is judged by its ratio to theirs in the
same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from fused_rl.bench.clock import Clock, Timing, interleaved, peak_extra_bytes
from fused_rl.bench.load import competing
from fused_rl.bench.records import ALLOCATING, PRODUCTS, Record
from fused_rl.bench.tasks import Task, judged, times


def measure(
    task: Task,
    peers: tuple[str, ...],
    rounds: int,
    tick: Callable[[], None],
    loads: tuple[int, ...] = (0,),
) -> Iterator[Record]:
    """One record for the bare work and for each provider, beside each number of competing
    processes; tick() after each step of the way.
    """
    providers = task.ways(peers)
    verdicts = {}
    for title, run in providers.items():
        verdicts[title] = judged(task, run)
        tick()
    right = {title: providers[title] for title, v in verdicts.items() if v["verdict"] == "right"}
    runs = {**task.bare, **right}
    peaks: dict[str, int | None] = {}
    for load in loads:
        with competing(load):
            taken = interleaved(runs, rounds, Clock(task.device).timing, tick)
        fields = {**task.fields, "case": beside(task.fields["case"], load), "load": load}
        for title in (*task.bare, *providers):
            record = {**fields, "provider": title, **verdicts.get(title, {"verdict": "right"})}
            if title in taken:
                record |= compared(taken, title)
            if title in right:
                # No matter of the load.
                if title not in peaks:
                    peaks[title] = peak_extra_bytes(right[title], task.device)
                record["peak_extra_bytes"] = peaks[title]
            yield record


def beside(case: str, load: int) -> str:
    """The title of a case that is measured beside so many competing processes."""
    return f"{case}, beside {load} busy process{'es' * (load > 1)}" if load else case


def compared(taken: dict[str, list[Timing]], title: str) -> Record:
    """What the rounds say of one case: times, ratios to both products, the time of processors."""
    seconds = {name: [t.seconds for t in timings] for name, timings in taken.items()}
    found = times(seconds[title], seconds[PRODUCTS])
    if ALLOCATING in taken:
        of_rounds = zip(seconds[title], seconds[ALLOCATING], strict=True)
        found["ratio_to_allocating_products"] = statistics.median(a / b for a, b in of_rounds)
    users = [t.user for t in taken[title]]
    if None not in users:
        found["user_seconds_median"] = statistics.median(users)
    return found
