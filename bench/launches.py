"""Host microseconds of a launch, with a driver that launches nothing: no GPU is needed.

    python bench/launches.py [--json FILE]

Each kernel's driver is timed as the operators call it, and so is a tile of `tiled_statistics`, with
a product that is there already. Kernels are compiled for sm_90 at their first launch, which is not
timed. Shown are the fewest microseconds of many repetitions, and the operators of torch that the
call dispatches. As long as the GPU needs more time than the host, the cost is hidden.

Not counted: what the driver of a real device does (packing arguments, encoding tensor descriptors,
the launch itself), the product of a tile, and what allocations and views of CUDA tensors cost more
than those of CPU tensors, which are here.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_rl.kernels import configs, kl, linear_logprobs, logprobs

# Qwen3's vocabulary; tokens of one row of tiles; a head so narrow that nothing is large.
N, V, H = linear_logprobs.TILE_ROWS, 151936, 8
# Others use the processor as well: many short repetitions find it free.
ROUNDS, SECONDS = 200, 1e-3
DEVICE = configs.Device(multiprocessors=132, major=9)


class Driver:
    """What Triton asks of a device: an H100 that does not do anything."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        @staticmethod
        def load_binary(*_) -> tuple[int, ...]:
            """module, function, registers, spills, threads"""
            return (1, 0, 0, 0, 1024)

        @staticmethod
        def unload_module(module: int) -> None:
            pass

    @staticmethod
    def launcher_cls(source, metadata) -> Callable[..., None]:
        return lambda *_, **__: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Operators(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def measured(call: Callable[[], object], parts: int = 1) -> dict[str, float]:
    """Microseconds and operators of a call, or of each of its parts."""
    call()
    with Operators() as operators:
        call()
    calls = max(1, round(SECONDS / min(timeit.repeat(call, number=1, repeat=ROUNDS))))
    seconds = min(timeit.repeat(call, number=calls, repeat=ROUNDS)) / calls
    return {"us": 1e6 * seconds / parts, "operators": operators.count / parts}


def tiles(arguments: tuple) -> dict[str, float]:
    """Of a tile of tiled_statistics, its share of the rest of the call included."""
    asked = []

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Of garbage, there already."""
        asked.append(out)
        return out

    with mock.patch.object(linear_logprobs, "product", product):
        linear_logprobs.tiled_statistics(*arguments)
        parts = len(asked)
        asked.clear()
        return measured(lambda: linear_logprobs.tiled_statistics(*arguments), parts)


def launches() -> dict[str, dict[str, float]]:
    """By kernel and for a tile: microseconds and operators."""
    hidden, weight = (torch.zeros(rows, H, dtype=torch.bfloat16) for rows in (N, V))
    labels, temperature = torch.zeros(N, dtype=torch.int64), torch.ones(N)
    logits, partial = torch.empty(N, logprobs.BLOCK_V), torch.empty(2, 4, N)
    lse, row = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    transform = (None, labels, temperature, 1.0, 0.0, 0)
    head = (hidden, weight, *transform)
    config = configs.chosen(head, DEVICE)
    calls = {
        "statistics of rows": lambda: logprobs.partial_statistics(
            logits, None, labels, temperature, partial[:1]
        ),
        "gradient of rows": lambda: logprobs.bwd(
            row, row, logits, *transform, -100, lse, row, logits
        ),
        "fused forward": lambda: linear_logprobs.fused_statistics(*head, DEVICE, config),
        "merge of parts": lambda: logprobs.merge(partial, labels, V, -100),
        "kl": lambda: kl.fwd(row, 3, 3),
    }
    return {
        **{name: measured(call) for name, call in calls.items()},
        "a tile of the tiled forward": tiles(head),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    driver.set_active(Driver())
    found = launches()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'':30}{'host us':>9}{'operators':>11}")
    for name, cost in found.items():
        print(f"{name:30}{cost['us']:9.1f}{cost['operators']:11.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "launches": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
