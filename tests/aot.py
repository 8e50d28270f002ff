"""Compiles every kernel configuration for GPUs that need not be there, and reads the machine code.

    python tests/aot.py cuda 90 [linear]   a line of JSON per kernel, configuration and variant
    python tests/aot.py --names            what is compiled on each target: names

In a process without TRITON_INTERPRET: an interpreted kernel cannot be compiled. Another triton than
the installed one comes from a folder in front of PYTHONPATH. bench/compiled.py makes a table of it.

A kernel is compiled three times, by what is divisible by 16, which the JIT sees at each launch.
`vector`: pointers, row strides, N, V, H and first_column, so that 16 bytes are read at a time;
`padded`: the same without N and V, as of rows that end before their memory does; `scalar`: nothing.

A row holds registers per thread; bytes of stack and of shared memory per block, with the limit of
the latter; instructions of the kernel; what machine_code.COUNTED counts in it; and `per_logit`,
instructions per logit that a thread has of one tile: with tensor cores those of the loop over
vocabulary tiles outside the loop over H, elsewhere those of the main loop or of a kernel without a
loop (machine_code.main_loop says which way through it). For the merge a logit is one part of one
row, for split one number, for kl one token, for a divergence (its number is that of reference.py)
one logit of each side.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hopper_aot
import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime import JITFunction

from fused_rl.kernels import (
    configs,
    divergences,
    hopper_kernels,
    kl,
    linear_exponentials,
    linear_logprobs,
    logprobs,
    split,
)
from fused_rl.kernels import exponentials_gradients as gradients

# Shared memory per block that a device grants, bytes; LDS on AMD.
SHARED_LIMIT = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}

# The flags that a caller's options turn on, and which of them are compiled together.
FLAGS = ("HAS_BIAS", "HAS_SOFTCAP")
TOGETHER = ((), ("HAS_SOFTCAP",), ("HAS_BIAS", "HAS_SOFTCAP"))
FOUR_WARPS = {"num_warps": 4}
# What a launch takes beside the kernel's own parameters.
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# The settings whose product is the logits of a program.
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_V", "BLOCK", "ROWS", "COLUMNS")

# Types by parameter name; pointers to fp32 where nothing else is said.
TYPES = {
    **dict.fromkeys(("N", "V", "H", "first_column", "columns_per_split"), "i32"),
    **dict.fromkeys(("splits", "group", "ignore_index"), "i32"),
    **dict.fromkeys(("rows", "columns", "part_stride", "part_row_stride"), "i32"),
    **dict.fromkeys(("scale", "softcap", "teacher_scale", "teacher_softcap"), "fp32"),
    **dict.fromkeys(("parameter", "factor"), "fp32"),
    **dict.fromkeys(("row_stride", "draw_row_stride", "f_row_stride"), "i64"),
    "teacher_row_stride": "i64",
    **dict.fromkeys(("hidden_row_stride", "weight_row_stride"), "i64"),
    **dict.fromkeys(("hidden", "weight", "hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16"),
    "teacher_bias_ptr": "*bf16",
    **dict.fromkeys(("draw_ptr", "exponentials", "exponentials_ptr"), "*bf16"),
    **dict.fromkeys(("f_ptr", "scaled_ptr", "parts_ptr"), "*bf16"),
    "again_ptr": "*i32",
    "labels_ptr": "*i64",
    **dict.fromkeys(("lse_ptr", "teacher_lse_ptr"), "*fp64"),
}
# Divisible by 16 whatever the shapes are, and where they are.
ALWAYS_DIVISIBLE = {"columns_per_split"}
SIZES = {"N", "V", "rows", "columns"}
DIVISIBLE = {*SIZES, "H", "first_column", *(name for name in TYPES if name.endswith("stride"))}


class Case(NamedTuple):
    """A kernel as it can be launched."""

    name: str
    kernel: JITFunction
    elements: int  # logits that a program has at a time
    warps: int  # among which they are divided
    constants: dict[str, object]
    types: dict[str, str]
    options: dict[str, int]


def cases(major: int) -> Iterator[Case]:
    """All that can be launched on a device of that compute capability, 0: not NVIDIA's."""
    rows = {"BLOCK_V": logprobs.BLOCK_V, "num_warps": logprobs.NUM_WARPS}
    for dtype in ("fp32", "bf16"):
        for name in ("statistics", "gradient"):
            kernel = getattr(logprobs, f"_{name}_kernel")
            yield from with_flags(f"{name} {dtype}", kernel, rows, logits_ptr=f"*{dtype}")
    yield from of_divergences()
    # What is there for few tokens, and again for many, is compiled once.
    for config in {config.title: config for config in configs.configs(major)}.values():
        yield from fused(config, major)
    yield from around_exponentials()
    parts = dict(zip(("BLOCK_S", "BLOCK_N"), logprobs.MERGE_TILE, strict=True)) | FOUR_WARPS
    for unit in (1.0, logprobs.LN2):
        yield from with_flags(f"merge {unit:.2f}", logprobs._merge_kernel, {**parts, "unit": unit})
    sums = {**parts, "unit": logprobs.LN2}
    yield from with_flags("sums", linear_exponentials._sums_kernel, sums)
    tile = dict(zip(("ROWS", "COLUMNS"), split.TILE, strict=True)) | {"num_warps": split.NUM_WARPS}
    for count in (2, 3):
        yield from with_flags(f"split {count}", split._split_kernel, {**tile, "COUNT": count})
    for kind in (1, 2, 3, 4):
        constants = {"VALUE": kind, "SLOPE": kind, "BLOCK": kl.BLOCK, **FOUR_WARPS}
        yield from with_flags(f"kl {kind}", kl._kl_kernel, constants)


def of_divergences() -> Iterator[Case]:
    """Their row kernels, one for each kind. Flags are those of both sides, and on for the kind with
    the most instructions alone: they end where the slopes begin.
    """
    sums, gradient = divergences._divergence_sums_kernel, divergences._divergence_gradient_kernel
    for kind in (1, 2, 3, 4, 5):
        settings = {"BLOCK_V": divergences.BLOCK_V, "num_warps": divergences.NUM_WARPS}
        settings |= {"KIND": kind, "transforms": kind == 3}
        yield from with_flags(f"divergence {kind}, sums", sums, settings, partial_ptr="*fp64")
        yield from with_flags(f"divergence {kind}, gradient", gradient, settings)


def fused(config: configs.Config, major: int) -> Iterator[Case]:
    """A configuration of the fused forward. Where it stores, it also forms tiles again."""
    launch = linear_logprobs.blocks(config, configs.Device(multiprocessors=1, major=major))
    tile = {**launch, "transforms": config.transforms}
    tile |= {"STORE": config.stores, "STAGES": config.num_stages, "AGAIN": False}
    kernel, types, warps = linear_logprobs._linear_statistics_kernel, operands(config), 0
    if config.gluon:
        kernel = hopper_kernels._hopper_statistics_kernel
        types = hopper_aot.types_of(config, "bf16", config.stores)
        # Two consumers; the producer has no logits.
        warps = 2 * config.num_warps
    elif config.stores:
        kernel = linear_exponentials._linear_exponentials_kernel
    yield from with_flags(f"fused {config.title}", kernel, tile, warps, **types)
    if config.stores:
        again = {**tile, "AGAIN": True, "transforms": False}
        yield from with_flags(f"fused {config.title}, again", kernel, again, warps, **types)


def operands(config: configs.Config) -> dict[str, str]:
    """The types of what a tensor descriptor can describe, as the drivers make them."""
    if not config.tma:
        return {}
    return {
        "hidden": f"tensordesc<bf16[{config.block_m}, {config.block_k}]>",
        "weight": f"tensordesc<bf16[{config.block_n}, {config.block_k}]>",
        "exponentials": f"tensordesc<bf16[{config.block_m}, {config.block_n}]>",
    }


def around_exponentials() -> Iterator[Case]:
    """What goes before and after the kernel that stores them."""
    sides = zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), linear_exponentials.REFERENCE_TILE, strict=True)
    reference = {**dict(sides), "UPCAST": False, **FOUR_WARPS}
    yield from with_flags("reference", linear_exponentials._reference_kernel, reference)
    again = {"BLOCK_M": 128, "IN_LOG2": True, **FOUR_WARPS}
    yield from with_flags("again", linear_exponentials._again_kernel, again)
    factor = {"BLOCK_V": gradients.BLOCK_V, "BLOCK_H": 1024, "num_warps": gradients.NUM_WARPS}
    factor |= {"IN_PLACE": True, "SCALED": True}
    yield from with_flags("factor", gradients._factor_kernel, factor)


def with_flags(
    name: str, kernel: JITFunction, settings: dict, warps: int = 0, **types: str
) -> Iterator[Case]:
    """The kernel with none of its flags, then with those that are turned on together.

    `settings` hold its other constants, the options of its launch, the sizes of TILE, and
    `transforms`: False where the flags stay off; `warps` is how many share a tile where not all of
    num_warps do.
    """
    names = [p.name for p in kernel.params if p.is_constexpr]
    own = {flag for flag in FLAGS if flag in names and settings.get("transforms", True)}
    options = {option: settings[option] for option in OPTIONS if option in settings}
    elements = math.prod(settings[size] for size in TILE if size in settings)
    for on in TOGETHER:
        if own.issuperset(on):
            known = {**settings, **{flag: flag in on for flag in FLAGS}}
            known |= {flag.replace("HAS_", "HAS_TEACHER_"): flag in on for flag in FLAGS}
            known |= {"ROUNDING": 0, "TEACHER_ROUNDING": 0}
            yield Case(
                ", ".join([name, *(flag.removeprefix("HAS_").lower() for flag in on)]),
                kernel,
                elements,
                warps or options["num_warps"],
                {constant: known[constant] for constant in names},
                {**TYPES, **types},
                options,
            )


def variants(case: Case) -> Iterator[tuple[str, set[str]]]:
    """vector, padded and scalar, each with the parameters that the JIT marks as divisible by 16.

    padded not where the JIT does not look at sizes; scalar not for descriptors, whose memory is
    always aligned, and only with all flags off.
    """
    marked = [p.name for p in case.kernel.params if not p.do_not_specialize]
    pointers = {name for name in marked if case.types.get(name, "*").startswith("*")}
    vector = {*marked} & (pointers | DIVISIBLE | ALWAYS_DIVISIBLE)
    yield "vector", vector
    if vector & SIZES:
        yield "padded", vector - SIZES
    names = case.kernel.arg_names
    described = any(case.types.get(name, "").startswith("tensordesc") for name in names)
    if not described and not any(case.constants.get(flag) for flag in FLAGS):
        yield "scalar", vector & ALWAYS_DIVISIBLE


def compile_one(case: Case, divisible: set[str], target: GPUTarget):
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "*fp32")
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in divisible and name not in case.constants
    }
    source = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    return triton.compile(
        source(case.kernel, signature, case.constants, attributes),
        target=target,
        options={**case.options, "enable_fp_fusion": True},
    )


def tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read(compiled) -> tuple[dict[str, int], str]:
    """Registers and stack, and the machine code as text."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = dict(re.findall(r"\.(\w+):\s+(\d+)\n", text))
        stack = int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "stack": stack}, text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(path))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        text = tool("nvdisasm", "-c", str(path))
    return {"registers": int(registers), "stack": int(stack)}, text


def row(case: Case, variant: str, divisible: set[str], target: GPUTarget) -> dict[str, object]:
    compiled = compile_one(case, divisible, target)
    found, text = read(compiled)
    code = machine_code.blocks(text)
    each = case.elements / (case.warps * target.warp_size)
    arch = str(target.arch)
    return {
        "triton": triton.__version__,
        "arch": arch,
        "kernel": case.name,
        "variant": variant,
        **found,
        "shared": compiled.metadata.shared,
        "limit": SHARED_LIMIT[arch],
        "instructions": sum(len(block.opcodes) for block in code),
        "per_logit": round(machine_code.main_loop(code) / each, 1),
        "counts": machine_code.counts(code),
    }


def names() -> Iterator[tuple[str, str, str, str]]:
    """arch, name and variant of each row, and what the kernel is called in the code."""
    for arch in SHARED_LIMIT:
        for case in cases(major_of(arch)):
            for variant, _ in variants(case):
                yield arch, case.name, variant, case.kernel.__name__


def major_of(arch: str) -> int:
    return int(arch) // 10 if arch.isdigit() else 0


def rows(target: GPUTarget, prefix: str) -> Iterator[dict[str, object]]:
    for case in cases(major_of(str(target.arch))):
        if case.name.startswith(prefix):
            for variant, divisible in variants(case):
                yield row(case, variant, divisible, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", nargs="?", choices=("cuda", "hip"), default="cuda")
    parser.add_argument("arch", nargs="?", choices=SHARED_LIMIT, default="90")
    parser.add_argument("only", nargs="?", default="", help="what the kernels' names begin with")
    parser.add_argument("--names", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    arch = int(arguments.arch) if arguments.arch.isdigit() else arguments.arch
    target = GPUTarget(arguments.backend, arch, 32 if arguments.backend == "cuda" else 64)
    for line in names() if arguments.names else rows(target, arguments.only):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
