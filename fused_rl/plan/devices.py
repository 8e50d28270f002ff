"""The cards that `fused-rl plan --device` knows: what their makers say, and what they reach.

    clock = data sheet's FLOP/s / (multiprocessors * FLOP per clock)

A ceiling is measured where bench/results has the card, and assumed elsewhere: the share of the data
sheet that the H100 reaches. Nothing here is asked of a device.
"""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    """What products of bfloat16 and copies reach."""

    alone: float  # TFLOP/s of one large product, on a chip that was idle
    sustained: float  # TFLOP/s of products one after another: the chip is at its power limit
    copy: float  # GB/s of a large copy, read and written
    source: str


class Card(NamedTuple):
    """A GPU. Rates are dense ones of bfloat16; those per clock are of one multiprocessor."""

    title: str
    major: int  # of the compute capability; 0: not NVIDIA's
    multiprocessors: int
    flop_per_clock: int
    lanes: int  # instructions of one number each, issued per clock
    exponentials: int  # results of the special function units per clock
    memory_gb: int
    l2_mb: float
    sheet_tflops: float
    sheet_gb_per_s: float
    source: str
    measured: Ceilings | None

    @property
    def clock(self) -> float:
        """Hz at which the data sheet counts its FLOP/s."""
        return self.sheet_tflops * 1e12 / (self.multiprocessors * self.flop_per_clock)

    @property
    def ceilings(self) -> Ceilings:
        """Those that were measured, or the H100's share of this data sheet."""
        if self.measured:
            return self.measured
        h100 = CARDS["h100"]
        rate = self.sheet_tflops / h100.sheet_tflops
        copy = h100.measured.copy * self.sheet_gb_per_s / h100.sheet_gb_per_s
        alone, sustained = h100.measured.alone * rate, h100.measured.sustained * rate
        shares = (alone / self.sheet_tflops, sustained / self.sheet_tflops)
        source = (
            f"assumed: {shares[0]:.2f}, sustained {shares[1]:.2f}, and "
            f"{copy / self.sheet_gb_per_s:.2f} of the data sheet, as the H100 reaches"
        )
        return Ceilings(alone, sustained, copy, source)


# `ceilings` of the result, and of its products "logits, half" at 8192 tokens.
_RESULT = "measured: bench/results/{}.json"
# Lanes and exponentials: "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++
# Programming Guide, compute capabilities 8.0, 9.0 and 10.0.
CARDS: dict[str, Card] = {
    "h100": Card(
        "H100 SXM",
        *(9, 132, 4096, 128, 16, 80, 50, 989.4, 3350),
        "NVIDIA H100 data sheet and architecture white paper",
        Ceilings(784.8, 694.5, 3006, _RESULT.format("h100-bfloat16-145b923")),
    ),
    "h200": Card(
        "H200 SXM",
        *(9, 132, 4096, 128, 16, 141, 50, 989.4, 4800),
        "NVIDIA H200 data sheet",
        Ceilings(775.3, 654.2, 4274, _RESULT.format("h200-bfloat16")),
    ),
    "b200": Card(
        "B200",
        *(10, 148, 8192, 128, 16, 180, 126.5, 2250, 7700),
        "NVIDIA DGX B200 data sheet; multiprocessors, L2 and bandwidth as the driver reports them",
        None,
    ),
    "a100": Card(
        "A100 SXM 80GB",
        *(8, 108, 2048, 128, 16, 80, 40, 312, 2039),
        "NVIDIA A100 data sheet and architecture white paper",
        None,
    ),
    # One instruction of 64 lanes per clock, exponentials at a quarter of that.
    "mi300x": Card(
        "MI300X",
        *(0, 304, 2048, 64, 16, 192, 256, 1307.4, 5300),
        "AMD Instinct MI300X data sheet and CDNA 3 white paper",
        None,
    ),
}
