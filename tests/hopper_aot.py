"""Compiles the Gluon kernel of kernels/hopper_kernels.py for a GPU that need not be there.

    python tests/hopper_aot.py ["hopper bf16" ...]    a line of JSON per case of gluon_cases

Another triton than the installed one comes from a folder in front of PYTHONPATH.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from fused_rl.kernels import hopper, hopper_kernels

SHARED_LIMIT = 232448
FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "STORE", "AGAIN")
TOGETHER = (
    (),
    ("HAS_SOFTCAP",),
    ("HAS_BIAS",),
    ("HAS_BIAS", "HAS_SOFTCAP"),
    ("STORE",),
    ("STORE", "AGAIN"),
    ("STORE", "HAS_BIAS"),
    ("STORE", "AGAIN", "HAS_BIAS", "HAS_SOFTCAP"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A kernel as it can be launched: a GluonJITFunction is compiled from a GluonASTSource."""

    name: str
    kernel: GluonJITFunction
    elements: int  # logits that a program has at a time
    warps: int  # among which they are divided: those that load have none
    constants: dict[str, object]
    types: dict[str, str]  # of every parameter that is no constant
    options: dict[str, int]


def gluon_cases(major: int) -> Iterator[Case]:
    """All that can be launched on a device of that compute capability; the dtype makes no code of
    its own, so that fp16 is compiled once, with everything on."""
    config = hopper.CONFIGS.get(major)
    for flags in TOGETHER if config else ():
        for dtype in DTYPES if len(flags) == len(FLAGS) else ("bf16",):
            yield Case(
                " ".join(["hopper", dtype, *(f.removeprefix("HAS_").lower() for f in flags)]),
                hopper_kernels._hopper_statistics_kernel,
                config.block_m * config.block_n,
                8,
                {**{f: f in flags for f in FLAGS}, "ROUNDING": 0, "STAGES": config.num_stages},
                types_of(config, dtype, "STORE" in flags),
                {"num_warps": config.num_warps},
            )


def types_of(config, dtype: str, stores: bool) -> dict[str, str]:
    def described(dtype: str, *block: int) -> str:
        layout = hopper_kernels.shared_layout(block, DTYPES[dtype])
        return f"tensordesc<{dtype}[{block[0]}, {block[1]}],{layout!r}>"

    hidden = described(dtype, config.block_m, config.block_k)
    stored = described("bf16", config.block_m // 2, config.block_n // 2)
    return {
        "hidden": hidden,
        "weight": described(dtype, config.block_n, config.block_k),
        "exps": stored if stores else hidden,
        "bias_ptr": f"*{dtype}",
        "labels_ptr": "*i64",
        "again_ptr": "*i32" if stores else "*i64",
        **dict.fromkeys(("temperature_ptr", "reference_ptr", "partial_ptr"), "*fp32"),
        **dict.fromkeys(hopper_kernels.INTEGERS, "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }


def compiled(case: Case, target: GPUTarget):
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = GluonASTSource(case.kernel, signature, case.constants, aligned)
    return triton.compile(source, target=target, options={**case.options, "enable_fp_fusion": True})


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# Before these one of the partition's threads may go on alone: what all must have done, in PTX.
TOGETHER_FIRST = {
    "mbarrier.arrive": "wgmma.wait_group",
    "cp.async.bulk.tensor.2d.global": "fence.proxy.async",
    "stmatrix": "cp.async.bulk.wait_group",
}


def alone(ptx: str) -> list[str]:
    """Those of TOGETHER_FIRST between which, and what all must have done, no barrier stands."""
    found, waiting = [], set()
    for line in ptx.splitlines():
        if "bar.sync" in line:
            waiting.clear()
        for then, first in TOGETHER_FIRST.items():
            if first in line:
                waiting.add(first)
            if then in line and first in waiting:
                found.append(line.strip())
    return found


def row(case: Case, target: GPUTarget) -> dict[str, object]:
    """What the compilers make of it; counts: how often each instruction stands in the code."""
    kernel = compiled(case, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", str(path)))
        code = tool("nvdisasm", "-c", str(path))
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)", code)
    return {
        "triton": triton.__version__,
        "kernel": case.name,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": kernel.metadata.shared,
        "limit": SHARED_LIMIT,
        "highest_register": max(map(int, re.findall(r"\bR(\d+)\b", code))),
        "counts": Counter(found),
        "arrivals": kernel.asm["ptx"].count("mbarrier.arrive.shared"),
        "alone": alone(kernel.asm["ptx"]),
    }


def main(*names: str) -> None:
    target = GPUTarget("cuda", 90, 32)
    for case in gluon_cases(9):
        if not names or case.name in names:
            print(json.dumps(row(case, target)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
