"""Every way through the forward pass: its time, and its error beside that of the products.

    TMA, pointers    logits in registers, operands by tensor descriptors or by pointers
      ..., stores    and exponentials in bfloat16 that a backward pass takes, [N, V]
    L2 tiles         the vendor's products, tile by tile

What is tried is the table of the kernels for this device, and the sizes beside it. WAYS names where
ways come from: another one is an entry there.

A way may be as far from float64 as the vendor's own products in float32 are, and a tenth more: that
error is no way's fault, and grows with H. Both are of the same rows in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from decisions import Call, Sizes, replaced, timed
from torch import Tensor

from fused_rl import ops, reference
from fused_rl.bench.clock import Clock
from fused_rl.bench.peers import Case
from fused_rl.bench.products import factors, into_outputs
from fused_rl.bench.records import PRODUCTS, Record
from fused_rl.bench.tasks import exact_stats, judged_rows, largest_errors

JUDGED = 16
# Of the error of the products in float32: 1.1 times, and what rounding may add, in nats.
SHARE, ROUNDING = 1.1, 1e-6
# Rows of float32 logits that are held at a time.
ROWS = 1024

# Titles, and calls that return logprobs, entropy and more.
Ways = Iterator[tuple[str, Call]]


def is_right(record: Record) -> bool:
    """Whether a way's log-probs are as near to float64 as the products allow. NaN is not."""
    return record["logprob_error"] <= SHARE * record["logprob_error_of_products"] + ROUNDING


def forwards(case: Case, sizes: Sizes, device: Any, rounds: int, clock: Clock) -> list[Record]:
    """The log-probs without gradient of the first N tokens, every way."""
    records = []
    for N in sizes.tokens:
        part = Case(case.hidden[:N], case.weight, case.labels[:N])
        rows = judged_rows(N, JUDGED).to(part.labels.device)
        exact = exact_stats(part, rows)
        bound = largest_errors(stats_of_products(part, rows), exact)
        ways = forward_ways(part, sizes, device)
        bare = {PRODUCTS: into_outputs(factors(part.hidden, part.weight, 2))}
        for record in timed({**bare, **ways}, rounds, clock, tokens=N):
            if record["way"] in ways and "failed" not in record:
                found = ways[record["way"]]()
                errors = largest_errors((found[0][rows], found[1][rows]), exact)
                record["logprob_error"], record["entropy_error"] = errors
                record["logprob_error_of_products"], record["entropy_error_of_products"] = bound
            records.append(record)
    return records


def stats_of_products(case: Case, rows: Tensor) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of those tokens in float64, from the vendor's logits in float32."""
    from fused_rl.kernels.linear_gradients import product

    kept = []
    for piece in torch.arange(len(case.labels), device=rows.device).split(ROWS):
        wanted = rows[(rows >= piece[0]) & (rows <= piece[-1])] - piece[0]
        kept.append(product(case.hidden[piece[0] : piece[-1] + 1], case.weight.T)[wanted])
    raw = torch.cat(kept).double()
    ones = torch.ones(len(rows), dtype=raw.dtype, device=raw.device)
    return reference.logits_logprobs(raw, case.labels[rows], ones)[:2]


def forward_ways(case: Case, sizes: Sizes, device: Any) -> dict[str, Call]:
    """title -> logprobs, entropy and more of the case, by each way that the device has."""
    return {title: run for ways in WAYS for title, run in ways(case, sizes, device)}


def in_registers(case: Case, sizes: Sizes, device: Any) -> Ways:
    """The configurations of the kernels' table for the device, proven or not, then the others."""
    from fused_rl.kernels import configs
    from fused_rl.kernels import linear_logprobs as kernel

    # Descriptors are for Hopper and later, and for the interpreter.
    with_tma = (False, True) if device.major >= 9 or device.interpreted else (False,)
    others = [configs.Config(*blocks, tma) for tma in with_tma for blocks in sizes.fused]
    table = [config for config in configs.configs(device.major) if not config.stores]
    for config in (*table, *others):
        settings = (kernel, "chosen", lambda *_, config=config: config)
        yield config.title, library(case, device, settings)


def stored(case: Case, sizes: Sizes, device: Any) -> Ways:
    """Those of the table that store exponentials."""
    from fused_rl.kernels import configs
    from fused_rl.ops.first_use import formed

    head = ops.Head(*arguments(case))
    for config in (c for c in configs.configs(device.major) if c.stores):
        yield config.title, partial(formed, head, config, device)


def in_l2(case: Case, sizes: Sizes, device: Any) -> Ways:
    """The tile of the kernels, then the others."""
    from fused_rl.kernels import linear_logprobs as kernel

    own = (kernel.TILE_ROWS, kernel.TILE_LOGITS // kernel.TILE_ROWS)
    for rows, columns in dict.fromkeys((own, *sizes.tiles)):
        settings = ((kernel, "TILE_ROWS", rows), (kernel, "TILE_LOGITS", rows * columns))
        chosen = (kernel, "chosen", lambda *_: None)
        yield f"L2 tiles {rows}x{columns}", library(case, device, chosen, *settings)


WAYS: tuple[Callable[[Case, Sizes, Any], Ways], ...] = (in_registers, stored, in_l2)


def library(case: Case, device: Any, *settings: tuple[Any, str, Any]) -> Call:
    """The library's forward pass, while these attributes have these values."""
    from fused_rl.kernels import linear_logprobs as kernel

    args = (*arguments(case), -100, device)

    def run() -> tuple[Tensor, ...]:
        with replaced(*settings):
            return kernel.fwd(*args)

    return run


def arguments(case: Case) -> tuple:
    """hidden, weight, bias, labels, temperature, scale, softcap, rounding, as kernels take them."""
    ones = torch.ones(len(case.labels), device=case.labels.device)
    return (case.hidden, case.weight, None, case.labels, ones, 1.0, 0.0, 0)
