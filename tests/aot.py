"""Compiles every kernel configuration for GPUs that need not be there, and reads the result.

    python tests/aot.py cuda 90 [linear]     one line of JSON per kernel and configuration

In a process without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rl.kernels import configs, kl, linear_logprobs, logprobs, split

# Shared memory per block that a device grants, bytes; LDS on AMD.
SHARED_LIMIT = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}

ROW = {"logits_ptr": "*fp32", "bias_ptr": "*bf16", "labels_ptr": "*i64", "temperature_ptr": "*fp32"}
SIZES = {"N": "i32", "V": "i32", "first_column": "i32", "splits": "i32", "ignore_index": "i32"}
SCALARS = {"scale": "fp32", "softcap": "fp32", "row_stride": "i64", "draw_row_stride": "i64"}


def signature(kernel, constants: dict, **types: str) -> dict[str, str]:
    """Types by parameter name: pointers to fp32 where nothing else is said."""
    rest = {"columns_per_split": "i32", "H": "i32", "lse_ptr": "*fp64"}
    known = {**SIZES, **SCALARS, **ROW, **rest, **types}
    return {
        name: "constexpr" if name in constants else known.get(name, "*fp32")
        for name in kernel.arg_names
    }


def cases(arch: str):
    """(name, kernel, constants, types, options) of all that can be launched on this target."""
    warps = {"num_warps": logprobs.NUM_WARPS}
    for flags in (
        {"HAS_BIAS": False, "HAS_SOFTCAP": False},
        {"HAS_BIAS": True, "HAS_SOFTCAP": True},
    ):
        shape = {**flags, "BLOCK_V": logprobs.BLOCK_V}
        title = " bias softcap" if flags["HAS_BIAS"] else ""
        for dtype in ("fp32", "bf16"):
            types = {"logits_ptr": f"*{dtype}", "draw_ptr": "*bf16"}
            yield f"statistics {dtype}{title}", logprobs._statistics_kernel, shape, types, warps
            yield f"gradient {dtype}{title}", logprobs._gradient_kernel, shape, types, warps
        yield from linear_cases(arch, flags, title)
    at_once, rows = logprobs.MERGE_TILE
    for unit in (1.0, logprobs.LN2):
        merge = {"BLOCK_S": at_once, "BLOCK_N": rows, "unit": unit}
        yield f"merge {unit:.2f}", logprobs._merge_kernel, merge, {}, {"num_warps": 4}
    for kind in (1, 2, 3, 4):
        constants = {"VALUE": kind, "SLOPE": kind, "BLOCK": kl.BLOCK}
        yield f"kl {kind}", kl._kl_kernel, constants, {}, {"num_warps": 4}
    types = {"parts_ptr": "*bf16", "rows": "i32", "columns": "i32"}
    types |= {"part_stride": "i32", "part_row_stride": "i32"}
    for count in (2, 3):
        constants = {"COUNT": count, "ROWS": split.TILE[0], "COLUMNS": split.TILE[1]}
        warps = {"num_warps": split.NUM_WARPS}
        yield f"split {count} parts", split._split_kernel, constants, types, warps


def linear_cases(arch: str, flags: dict, title: str):
    major = int(arch) // 10 if arch.isdigit() else 0
    for config in configs.configs(major):
        if flags["HAS_BIAS"] and not config.transforms:
            continue
        constants = {
            **flags,
            "EXP2": config.exp2,
            "TMA": config.tma,
            "UPCAST": False,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        }
        types = {"hidden": "*bf16", "weight": "*bf16"}
        if config.tma:
            types = {
                "hidden": f"tensordesc<bf16[{config.block_m}, {config.block_k}]>",
                "weight": f"tensordesc<bf16[{config.block_n}, {config.block_k}]>",
            }
        strides = {"hidden_row_stride": "i64", "weight_row_stride": "i64"}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        name = "x".join(map(str, config[:3])) + (" tma" if config.tma else "")
        name += " exp2" if config.exp2 else ""
        kernel = linear_logprobs._linear_statistics_kernel
        yield f"linear {name}{title}", kernel, constants, {**types, **strides}, options


def compile_one(kernel, constants, types, options, target):
    parameters = signature(kernel, constants, **types)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(parameters.items())
        if kind.startswith("*") or name in ("hidden_row_stride", "weight_row_stride", "H")
    }
    source = ASTSource(kernel, parameters, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(compiled) -> dict[str, object]:
    """Registers, spilled bytes, shared memory, and which tensor-core instructions there are."""
    found: dict[str, object] = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        found |= {"registers": int(counts["vgpr_count"]), "spills": int(counts["vgpr_spill_count"])}
        found["mma"] = sorted(set(re.findall(r"v_mfma", text)))
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        usage = [tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
        match = re.search(r"REG:(\d+) STACK:(\d+)", text)
        found |= {"registers": int(match[1]), "spills": int(match[2])}
        text = subprocess.run(
            [tool("nvdisasm"), file.name], capture_output=True, text=True, check=True
        ).stdout
        found["mma"] = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|LDGSTS)\b", text)))
    finally:
        os.unlink(file.name)
    return found


def main(backend: str, arch: str, only: str = "") -> None:
    target = GPUTarget(
        backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32
    )
    for name, kernel, constants, types, options in cases(arch):
        if not name.startswith(only):
            continue
        compiled = compile_one(kernel, constants, types, options, target)
        row = {"arch": arch, "kernel": name, "limit": SHARED_LIMIT[arch], **resources(compiled)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
