"""What `fused-rl plan` prints: bytes and FLOP of each way, and on a card that it knows, times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rl.plan import forecast
from fused_rl.plan.devices import CARDS
from fused_rl.plan.memory import Plan, Way

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("logits", "dweight", "dhidden", "operands")


def readable(count: int) -> str:
    """Bytes for people."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def show(console: Console, planned: Plan) -> None:
    """The plan as a table: each way at its peak; a second one of times, on a card."""
    from rich.table import Table

    p = planned
    table = Table(
        title=f"N = {p.tokens} tokens, H = {p.hidden}, V = {p.vocabulary}", title_justify="left"
    )
    table.add_column("way")
    for name in ("NHV", "TFLOP", *COLUMNS, "peak"):
        table.add_column(name, justify="right")
    table.add_column("in")
    for way in p.ways:
        parts = way.phases[way.phase]
        cells = (readable(parts[c]) if parts.get(c) else "" for c in COLUMNS)
        work = (str(way.nhv), f"{way.flop / 1e12:.3g}")
        table.add_row(way.name, *work, *cells, readable(way.peak), way.phase)
    console.print(table)
    for line in about_chunks(p):
        console.print(line)
    if p.device in CARDS:
        show_times(console, p)


def show_times(console: Console, p: Plan) -> None:
    """Each way's predicted time beside the measured one, and what they stand on."""
    from rich.table import Table

    table = Table(title=f"on one {CARDS[p.device].title}", title_justify="left")
    table.add_column("way")
    for name in ("predicted, ms", "measured, ms"):
        table.add_column(name, justify="right")
    predicted, measured = forecast.predicted(p), forecast.measured(p)
    for way in p.ways:
        table.add_row(way.name, *(str(t.get(way.name, "")) for t in (predicted, measured)))
    console.print()
    console.print(table)
    for line in about_times(p):
        console.print(line)


def about_chunks(p: Plan) -> list[str]:
    """How many there are, and why not fewer passes."""
    count = len(p.chunks)
    lines = [
        f"chunk_bytes {readable(p.chunk_bytes)}: {count} chunk{'s' * (count > 1)} "
        f"of {max(p.chunks)} tokens"
    ]
    if p.ways[-1].nhv == 8:
        lines.append(
            "linear_policy_loss takes two passes: chunks so small would read and write dweight too "
            "often. A larger --chunk-bytes gives the one pass of 6 NHV."
        )
    return lines


def about_times(p: Plan) -> list[str]:
    """The ceilings, that predictions are no measurements, where measurements are from, and what
    the card has no memory for.
    """
    card = CARDS[p.device]
    c = card.ceilings
    lines = [
        f"{card.title}: products {c.alone:.0f} TFLOP/s alone, {c.sustained:.0f} sustained, copies "
        f"{c.copy:.0f} GB/s ({c.source}); {card.multiprocessors} multiprocessors at "
        f"{card.clock / 1e9:.2f} GHz.",
        "Predicted times are those of a model, not measurements: of a chip that keeps its "
        "clock .. of one at its power limit.",
    ]
    if not forecast.predicted(p):
        lines.append(f"Times are predicted for half precisions alone, not for {p.dtype}.")
    if forecast.measured(p):
        lines.append(f"Measured times are medians {forecast.origin(p)}.")
    else:
        lines.append("No measurement is known at these sizes on that card.")
    if over := [way.name for way in p.ways if not fits(p, way)]:
        lines.append(
            f"Beside hidden states and head {card.memory_gb} GB do not hold: {', '.join(over)}."
        )
    return lines


def fits(p: Plan, way: Way) -> bool:
    """Whether the card's memory holds a way's peak, the hidden states and the head."""
    there = (p.tokens + p.vocabulary) * p.hidden * p.dtype.itemsize
    return way.peak + there <= CARDS[p.device].memory_gb * 1e9
