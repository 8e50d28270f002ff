"""What `fused-rl plan --world` prints: what one rank holds and receives, and times of either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rl.plan.ranks import Group, Rank, head_times
from fused_rl.plan.report import readable
from fused_rl.plan.traffic import SUMMAND, TOKEN, from_others

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HELD = ("weight", "optimizer", "dweight", "logits", "dhidden", "buffers")
RECEIVED = ("weight", "dweight", "hidden", "dhidden", "statistics")
MOVED = ("tokens", *RECEIVED, "all", "break-even")


def show_ranks(console: Console, ranks: list[Rank], group: Group, bandwidth: float | None) -> None:
    """Tables of memory and traffic; of times, where the card or the bandwidth is known.

    Args:
        bandwidth: GB/s that a rank receives from the others at.
    """
    tables = [held(ranks, group), received(ranks, group)]
    if bandwidth or any(head_times(rank, group) for rank in ranks):
        tables.append(times(ranks, group, bandwidth))
    for table in tables:
        console.print()
        console.print(table)
    for line in about(ranks, group, bandwidth):
        console.print(line)


def held(ranks: list[Rank], group: Group) -> Table:
    """Bytes of one rank at its peak."""
    table = _table(f"one of {group.world} ranks: memory at its peak", *HELD, "peak")
    table.add_column("in")
    for rank in ranks:
        parts = dict(rank.memory.phases[rank.memory.phase])
        parts["buffers"] = parts.get("buffers", 0) + parts.get("operands", 0)
        sizes = [_bytes(parts.get(name, 0)) for name in HELD]
        table.add_row(rank.name, *sizes, readable(rank.memory.peak), rank.memory.phase)
    return table


def received(ranks: list[Rank], group: Group) -> Table:
    """Bytes that one rank gets from the others in a step."""
    table = _table(f"one of {group.world} ranks: received from the others in a step", *MOVED)
    for row in received_rows(ranks, group):
        table.add_row(*row)
    return table


def received_rows(ranks: list[Rank], group: Group) -> list[list[str]]:
    """The way's name, and what MOVED names."""
    rows = []
    for rank in ranks:
        crossing = {n: from_others(b, group.world) for n, b in rank.received.items()}
        sizes = [_bytes(crossing.get(name, 0)) for name in RECEIVED]
        bound = "" if rank.break_even is None else f"{rank.break_even:,}"
        whole = _bytes(sum(crossing.values()))
        rows.append([rank.name, f"{rank.tokens:,}", *sizes, whole, bound])
    return rows


def times(ranks: list[Rank], group: Group, bandwidth: float | None) -> Table:
    """Milliseconds of a step: of the head as predicted, and of what it receives."""
    columns = ("TFLOP", "head, predicted, ms", *(("received, ms",) if bandwidth else ()))
    table = _table(f"one of {group.world} ranks: time of a step", *columns)
    for rank in ranks:
        row = [f"{group.micro_batches * rank.memory.flop / 1e12:.3g}"]
        row.append(str(head_times(rank, group) or ""))
        if bandwidth:
            crossing = from_others(sum(rank.received.values()), group.world)
            row.append(f"{crossing / bandwidth / 1e6:.1f}")
        table.add_row(rank.name, *row)
    return table


def about(ranks: list[Rank], group: Group, bandwidth: float | None) -> list[str]:
    """What is counted, that it is no measurement, and what the break-even is."""
    p, M, R = ranks[0].local, group.micro_batches, group.world
    width, reduced = p.dtype.itemsize, str(group.reduce_dtype).removeprefix("torch.")
    state = "two moments" if width == 4 else "two moments and a copy of the weight"
    lines = [
        "Calculated, not measured. Memory leaves out hidden states, bias and what an engine holds "
        f"beyond a copy of dweight to reduce; optimizer: AdamW's {state} in float32.",
        f"{M} micro-batch{'es' * (M > 1)} a step. Every rank has tokens of its own, in tp all have "
        f"the same; tokens: those of all {R} ranks. dweight is reduced in {reduced}.",
    ]
    if own := [rank for rank in ranks if rank.break_even is not None]:
        tokens, fewer = own[0].tokens, [rank.name for rank in own if rank.tokens < rank.break_even]
        lines.append(
            "break-even: so many active tokens of all ranks in a step receive as much, if they are "
            "sent (--parallel tokens), as the way's weight and its gradient. A token sent is "
            f"H ({width} + {SUMMAND}) + {TOKEN} bytes. {tokens:,} are fewer than the break-even of "
            f"{'; '.join(fewer) or 'none'}."
        )
    if bandwidth:
        lines.append(f"received, ms: at {bandwidth:g} GB/s, beside the head or hidden behind it.")
    return lines


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _bytes(count: int) -> str:
    return readable(count) if count else ""
