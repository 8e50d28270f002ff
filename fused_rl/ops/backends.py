"""Which kernel serves which device here, and why not the others."""

from typing import NamedTuple

import torch

from fused_rl.ops import native, trust
from fused_rl.ops.chunks import HAS_TRITON

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps fused-rl"


class Backend(NamedTuple):
    """device: a torch device type. kernel: what serves it. note: why not better, and what to do."""

    device: str
    kernel: str
    note: str


def backends() -> list[Backend]:
    """One entry per device, as this process would run it."""
    return [_cpu(), _cuda()]


def _cpu() -> Backend:
    if native.native_missing:
        return Backend(
            "cpu",
            "reference (plain torch)",
            f"{native.native_missing}; with torch and a C++20 compiler at hand: {_REBUILD}",
        )
    isa, *microkernels = native.cpu_features()
    products = ", ".join(microkernels) or "none"
    note = f"loops for {isa}; matrix microkernels: {products}"
    if "bfloat16" not in microkernels:
        note += "; this CPU has no bfloat16 products (AVX512-BF16, AMX): bfloat16 runs as float32"
    return Backend("cpu", "C++", note)


def _cuda() -> Backend:
    here = "" if torch.cuda.is_available() else "; no device of the kind is visible to torch"
    if not HAS_TRITON:
        note = f"triton is not installed: pip install triton{here}"
        return Backend("cuda", "reference (plain torch)", note)
    note = "float64 in plain torch; proved in the interpreter, run on an H100 and an H200"
    note += "; with those that no result has shown to be faster" if trust.options().unproven else ""
    for verdict in trust.verdicts():
        if verdict.error is not None:
            note += f"; {verdict.kernel} is not used on {verdict.device}: {verdict.error}"
    return Backend("cuda", "Triton", note + here)
