"""What this CPU can do, and what the library's inner loops and torch's products reach of it.

Each rate is the best of several short rounds, since clocks vary: on one thread, and on all threads
of torch at once. What is not there, an instruction or the C++ library, has the rate 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.bench.clock import wall

# Of one rate on one number of threads.
SECONDS = 0.2
# No call of a rate is to take longer, if a smaller one can be had.
LONGEST_CALL = 0.05
ROUNDS = 3
TERA, GIGA = 1e12, 1e9
COPY_BYTES = 2**27


class Rate(NamedTuple):
    """What is measured: of one thread, and of all. Per second: FLOP, bytes, or exponentials."""

    title: str
    one: float
    all: float


class Group(NamedTuple):
    """Rates of one kind, in `scale` per second, which is called `unit`."""

    title: str
    unit: str
    scale: float
    rates: tuple[Rate, ...]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch takes so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_threads(title: str, measure: Callable[[], float]) -> Rate:
    """The rate of one thread and of all."""
    with threads(1):
        one = measure()
    return Rate(title, one, measure() if torch.get_num_threads() > 1 else one)


def native(title: str, what: str, seconds: float) -> Rate:
    """A rate of the C++ library, by its name there."""
    if ops.native_missing:
        return Rate(title, 0.0, 0.0)
    return on_threads(title, lambda: torch.ops.fused_rl.cpu_rate(what, seconds))


def best_seconds(run: Callable[[], object], seconds: float) -> float:
    """Of a call, after one to warm up: the best of at least ROUNDS, for about `seconds`."""
    run()
    found = [wall(run) for _ in range(ROUNDS)]
    while sum(found) < seconds:
        found.append(wall(run))
    return min(found)


def product_rate(dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of logits by torch in a dtype: 1024 tokens, H = 1024, into an output that is there.

    Of as many of 8192 vocabulary rows as take no longer than LONGEST_CALL.
    """
    hidden, weight = torch.randn(1024, 1024).to(dtype), torch.randn(8192, 1024).to(dtype)
    rows = 64
    while True:
        run = _product(hidden, weight[:rows])
        took = best_seconds(run, 0.0)
        if rows == len(weight) or 2 * took > LONGEST_CALL:
            break
        rows *= 2
    took = min(took, best_seconds(run, seconds))
    return 2 * hidden.numel() * rows / took


def _product(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    return lambda: torch.mm(hidden, weight.T, out=out)


def copy_rate(seconds: float) -> float:
    """Bytes read and bytes written, per second, of a copy of COPY_BYTES by torch."""
    source, target = torch.ones(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), seconds)


def measured(seconds: float) -> Iterator[Group]:
    """Every rate, as it is measured; `seconds` for each number of threads."""
    yield multiply_adds(seconds)
    yield products(seconds)
    by_torch = ("bfloat16", "float32")
    rates = (on_threads(n, lambda n=n: product_rate(getattr(torch, n), seconds)) for n in by_torch)
    yield Group("torch's products, outputs allocated", "TFLOP/s", TERA, tuple(rates))
    yield exponentials(seconds)
    copy = on_threads("copy of 128 MiB", lambda: copy_rate(seconds))
    yield Group("memory, bytes read and written", "GB/s", GIGA, (copy,))


def multiply_adds(seconds: float) -> Group:
    """What the arithmetic units do with operands in registers."""
    float32 = "float32, vectors"
    if not ops.native_missing:
        float32 = f"float32, {ops.native.cpu_features()[0]}"
    names = {"amx": "bfloat16, AMX", "avx512_bf16": "bfloat16, AVX512-BF16", "float32": float32}
    rates = tuple(native(title, what, seconds) for what, title in names.items())
    return Group("multiply-adds in registers", "TFLOP/s", TERA, rates)


def products(seconds: float) -> Group:
    """The library's products of a block of weight and a tile of tokens, as its forward has them."""
    rates = tuple(native(n, f"{n} product", seconds) for n in ("bfloat16", "float32"))
    return Group("the library's products, in cache", "TFLOP/s", TERA, rates)


def exponentials(seconds: float) -> Group:
    """Logits that join the running softmax of their tokens."""
    rate = native("statistics of logits", "exponentials", seconds)
    return Group("exponentials", "10^9/s", GIGA, (rate,))
