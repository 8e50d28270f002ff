"""The kernels for CPUs: a library that registers itself with the operators when it is loaded."""

import warnings
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor


def _load() -> str | None:
    """Registers the kernels; returns why they are missing, or None."""
    library = files("fused_rl") / "libfused_rl_cpu.so"
    if not library.is_file():
        return "the C++ library was not built with this installation"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = f"the C++ library does not load into torch {torch.__version__}: {error}"
        warnings.warn(f"fused_rl: {reason}; CPU tensors take the reference", stacklevel=2)
        return reason
    return None


native_missing = _load()


@lru_cache
def cpu_features() -> tuple[str, ...]:
    """The loops' instruction set, and what has a microkernel; nothing without the library."""
    return () if native_missing else tuple(torch.ops.fused_rl.cpu_features().split())


def multiplies_bfloat16(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the C++ kernels take these operands as they are, on a CPU with bf16 products."""
    both = hidden.dtype == weight.dtype == torch.bfloat16
    return both and hidden.device.type == "cpu" and "bfloat16" in cpu_features()


def empty(like: Tensor, *size: int, dtype: torch.dtype) -> Tensor:
    """like.new_empty; on a CPU a large one is in memory that is kept for the next step."""
    if like.device.type == "cpu" and native_missing is None:
        return torch.ops.fused_rl.cpu_empty(size, dtype)
    return like.new_empty(size, dtype=dtype)


def release_memory() -> None:
    """Hands the system the buffers that the C++ kernels keep for the next call.

    They are 256 MiB at most, and on Linux the system takes their pages by itself where memory runs
    short; until then they count in the resident size of the process.
    """
    if native_missing is None:
        torch.ops.fused_rl.cpu_release_memory()
