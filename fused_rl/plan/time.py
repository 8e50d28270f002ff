"""How long the parts of a call take on a GPU: a model, not a measurement.

    overlapped(a, b, ...) = (a^p + b^p + ...)^(1/p)      what runs side by side; p = POWER
    product     overlapped(FLOP / rate * waves + tiles / multiprocessors * TILE, bytes / bandwidth)
    row pass    overlapped(instructions / (issue rate * ISSUE), bytes / bandwidth)
    fused tile  overlapped(main loop, loads in flight) + instructions / (issue rate * ISSUE)
    low         the sum of the parts, and the time that the device waits for the host
    high        max(low, FLOP / sustained rate + OTHERS * (low - FLOP / rate))

A product alone runs at the rate of a cool chip. Products one after another bring it to its power
limit, and then a call's time is that of the energy which it spends. So each call has two times, and
measurements lie between them or near. waves: multiprocessors that idle in the last wave of 128 x
256 tiles are paid for; the library splits a long K instead, so that dhidden has none.

Constants that are called fitted were found together, by least deviation from the medians in
bench/results/{h100,h200}-bfloat16.json; docs/predictions.md has each case beside its prediction.
Instructions per logit are counted in the machine code for sm_90.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fused_rl.plan.devices import Card

# Fitted: how far two limits overlap, mainly on the row kernels and the products that add in fp32.
POWER = 2.5
# Fitted on the row kernels: share of the issue slots that their instructions get.
ISSUE = 0.75
# Fitted on dweight, whose K is short: seconds that a multiprocessor spends between two tiles.
TILE = 1.4e-6
# Fitted on "dweight, fp32 added": share of the bandwidth where a product reads what it adds to.
ADDED = 0.67
# Fitted on the products of 1024 tokens and more: power of all but products, in that of products.
OTHERS = 0.95
# Fitted on the fused forwards: rate of Triton's main loop in the library's, through tensor
# descriptors and through pointers; seconds until a load from L2 is there.
MAIN_LOOP = {True: 0.90, False: 0.68}
LATENCY = 0.52e-6
# Fitted on the forwards of 64 and 512 tokens: seconds of the host before a call's first kernel,
# and for each tile in L2; of the device between the kernels of such a tile, and for each step of
# `merge`.
START, TILE_HOST, TILE_GAP, MERGE = 50e-6, 84e-6, 12e-6, 0.8e-6

# The tile that the library's products are cut into, and parts that a step of `merge` takes.
PRODUCT_TILE, MERGED = (128, 256), 32
# The columns that a row kernel takes at once, and instructions of its machine code per logit.
ROW_BLOCK, STATISTICS, GRADIENT = 4096, 41, 32
# What a multiprocessor's shared memory gives or takes per clock, in bytes.
SHARED = 128


class Part(NamedTuple):
    """flop: of products on the tensor cores."""

    name: str
    flop: float
    seconds: float

    def __mul__(self, count: int) -> Part:
        """That many of it, one after another."""
        return Part(self.name, self.flop * count, self.seconds * count)


class Times(NamedTuple):
    """Predicted milliseconds: of a chip that keeps its clock, and of one at its power limit."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The geometric mean: what a measurement is compared with."""
        return (self.low * self.high) ** 0.5

    def __str__(self) -> str:
        low, high = (f"{t:.1f}" if t < 100 else f"{t:.0f}" for t in self)
        return low if low == high else f"{low}..{high}"


class Tile(NamedTuple):
    """A way of the fused forward: its blocks, and what its epilogue costs per logit."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    instructions: float
    main_loop: float | None = None  # rate in the library's; None: Triton's
    stored: int = 0  # bytes that it writes


def cut(total: int, size: int) -> list[tuple[int, int]]:
    """(size, count) of the pieces that a total is cut into; the last may be smaller."""
    pieces = [(size, total // size), (total % size, 1)]
    return [(n, count) for n, count in pieces if n and count]


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def overlapped(*seconds: float) -> float:
    """Of what runs side by side: the longest, and a share of the others."""
    return sum(s**POWER for s in seconds) ** (1 / POWER)


def times(card: Card, parts: Iterable[Part]) -> Times:
    """Of a call that is made of these."""
    parts = list(parts)
    low, flop = (sum(p.seconds for p in parts), sum(p.flop for p in parts))
    rate, sustained = card.ceilings.alone * 1e12, card.ceilings.sustained * 1e12
    hot = flop / sustained + OTHERS * (low - flop / rate)
    return Times(low * 1e3, max(low, hot) * 1e3)


def moved(card: Card, bytes_: float) -> float:
    """Seconds that bytes take to or from memory."""
    return bytes_ / (card.ceilings.copy * 1e9)


def issued(card: Card, instructions: float) -> float:
    """Seconds that instructions of one number each take on all multiprocessors."""
    return instructions / (card.multiprocessors * card.lanes * card.clock * ISSUE)


def waves(card: Card, tiles: int) -> float:
    """Time of that many tiles in that of as many as fill every multiprocessor to the end."""
    return ceil(tiles, card.multiprocessors) * card.multiprocessors / tiles


def rate(card: Card) -> float:
    """FLOP/s of products in full waves, without what lies between tiles: from the one product of
    [8192, 8192] matrices that bench/gpu.py times.
    """
    flop, tiles = 2 * 8192**3, 8192 // PRODUCT_TILE[0] * (8192 // PRODUCT_TILE[1])
    between = tiles / card.multiprocessors * TILE
    return flop * waves(card, tiles) / (flop / (card.ceilings.alone * 1e12) - between)


def product(
    card: Card, name: str, m: int, n: int, k: int, *, width: int, added: bool = False
) -> Part:
    """[m, k] x [k, n] of a half precision, as the vendor's library forms it.

    Args:
        width: bytes of an element of the result; 0 where it stays in L2.
        added: whether the result is added to what is there, in fp32.
    """
    flop = 2 * m * n * k
    tiles = ceil(m, PRODUCT_TILE[0]) * ceil(n, PRODUCT_TILE[1])
    idle, between = waves(card, tiles), tiles / card.multiprocessors * TILE
    # A K much longer than the tiles are many is split over the multiprocessors that would idle.
    if k > max(m, n):
        idle, between = 1.0, 0.0
    result = moved(card, 8 * m * n) / ADDED if added else moved(card, m * n * width)
    arithmetic = flop * idle / rate(card) + between
    return Part(name, flop, overlapped(arithmetic, result + moved(card, 2 * k * (m + n))))


def row_pass(card: Card, name: str, logits: float, instructions: int, bytes_: int) -> Part:
    """A row kernel over fp32 logits in memory."""
    of_memory = moved(card, logits * bytes_)
    return Part(name, 0, overlapped(issued(card, logits * instructions), of_memory))


def start() -> Part:
    """What the host does before a call's first kernel."""
    return Part("start", 0, START)


def elementwise(card: Card, name: str, bytes_: float) -> Part:
    return Part(name, 0, moved(card, bytes_))


def shared_memory(tile: Tile) -> float:
    """Clocks of shared memory per clock of arithmetic at 4096 FLOP: each group of four warps reads
    its rows of one operand and its columns of the other, and every operand is written once.
    """
    groups = tile.num_warps // 4
    rows, columns = 64, tile.block_n
    if tile.block_m // rows < groups:
        columns //= groups
    read = groups * (rows + columns)
    both = (read + tile.block_m + tile.block_n) * 2 / SHARED
    return both / (tile.block_m * tile.block_n * 2 / 4096)


LIBRARY = Tile(128, 256, 64, 8, 4, True, 0)


def fused_forward(
    card: Card, N: int, H: int, V: int, tile: Tile, merged: int = MERGED
) -> list[Part]:
    """Logits that stay in registers: `kernels.linear_logprobs.fused_statistics`, and its merge.

    merged: parts that a step of the merge takes.
    """
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    across, along = ceil(N, m), ceil(V, n)
    splits = max(1, min(2 * card.multiprocessors // across, along))
    per_split = ceil(along, splits)
    splits = ceil(along, per_split)
    # Tiles of the busiest multiprocessor.
    mine = ceil(across * splits, card.multiprocessors) * per_split
    share = tile.main_loop or MAIN_LOOP[tile.tma]
    contended = overlapped(1, shared_memory(tile)) / overlapped(1, shared_memory(LIBRARY))
    arithmetic = 2 * m * n * H / (rate(card) / card.multiprocessors) / share * contended
    loads = ceil(H, k) * LATENCY / (tile.num_stages - 1)
    # All multiprocessors have an epilogue at once, and each waits for its own.
    epilogue = issued(card, tile.instructions * m * n * card.multiprocessors)
    exponentials = m * n / (card.exponentials * card.clock)
    of_tile = overlapped(arithmetic, loads) + max(epilogue, exponentials)
    memory = moved(card, 2 * (V * H + N * H) + tile.stored * N * V)
    forward = Part("forward", 2 * N * H * V, overlapped(mine * of_tile, memory))
    return [forward, _ends(splits, merged)]


def _ends(parts: int, merged: int) -> Part:
    return Part("start, merge", 0, START + ceil(parts, merged) * MERGE)


def tiled_forward(
    card: Card, N: int, H: int, V: int, sides: tuple[int, int], merged: int = MERGED
) -> list[Part]:
    """Tiles of logits in L2: `kernels.linear_logprobs.tiled_statistics`, and its merge.

    sides: tokens and columns of a tile.
    """
    rows, columns = sides
    tiles, arithmetic = 0, 0.0
    for n, of_rows in cut(N, rows):
        for here, of_columns in cut(V, columns):
            count, block = of_rows * of_columns, ceil(here, ROW_BLOCK) * ROW_BLOCK
            statistics = issued(card, n * block * STATISTICS)
            of_tile = product(card, "", n, here, H, width=0).seconds + statistics + TILE_GAP
            tiles, arithmetic = tiles + count, arithmetic + count * of_tile
    spilled = rows * columns * 4 > card.l2_mb * 1e6
    memory = moved(card, 2 * V * H * ceil(N, rows) + 8 * N * V * spilled)
    busy = overlapped(arithmetic, memory)
    forward = Part("forward", 2 * N * H * V, busy)
    waiting = Part("waiting for the host", 0, max(0.0, tiles * TILE_HOST - busy))
    return [forward, waiting, _ends(ceil(V, columns), merged)]
