"""The Triton kernels on the CPU, in Triton's interpreter: what gpu.py runs where there is no GPU.

`start` gives every kernel of ops/triton.py the place of the C++ kernel, and torch's CPU the
products of half precisions with float32 results, which only its CUDA has. The path is then the
GPU's, from the operators down to the kernels' arithmetic. `Launches` counts who ran, there and
here.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# torch.library takes a registration back when its Library is dropped.
_libraries: list[torch.library.Library] = []


def start() -> None:
    """Every kernel of ops/triton.py on CPU tensors, interpreted, for the rest of the process.

    Raises:
        RuntimeError: triton is imported already, and its kernels are for a GPU.
    """
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before TRITON_INTERPRET was set")
    os.environ["TRITON_INTERPRET"] = "1"
    _products()
    _operators()


def _products() -> None:
    """torch.mm and torch.addmm with out_dtype: exact in float32 from halves, as on a GPU."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1):
        wide = (t.to(out_dtype) for t in (c, a, b))
        return torch.addmm(*wide, beta=beta, alpha=alpha)

    def into(function: Callable) -> Callable:
        return lambda *args, out, **scalars: out.copy_(function(*args, **scalars))

    library = torch.library.Library("aten", "IMPL")
    for name, function in (("mm", mm), ("addmm", addmm)):
        library.impl(f"{name}.dtype", function, "CPU")
        library.impl(f"{name}.dtype_out", into(function), "CPU")
    _libraries.append(library)


def device():
    """What stands for the GPU: two multiprocessors, so that vocabularies are cut into parts."""
    from fused_rl.kernels.configs import Device
    from fused_rl.ops import trust

    def trusts(config, call) -> bool:
        return config.proof is not None or trust.options().unproven

    return Device(multiprocessors=2, major=0, interpreted=True, trusts=trusts)


def _operators() -> None:
    from fused_rl import ops
    from fused_rl.ops import frozen, native, triton

    def on_cpu(kernel: Callable, plain: Callable) -> Callable:
        def run(*records):
            if triton.in_float64(records):
                return plain(*records)
            return triton.launch(kernel, records, device())

        return run

    library = torch.library.Library("fused_rl", "IMPL")
    for operator, kernel in triton.OPERATORS.items():
        run = operator.flat(on_cpu(kernel, operator.plain))
        library.impl(operator.__name__, run, "CPU", allow_override=True)
    # A GPU has no kernel of its own for it: a frozen head is two operators of a chunk there. What
    # a chunk keeps is the GPU's choice, too.
    walk = frozen.linear_logprobs_frozen
    library.impl(walk.__name__, walk.flat(walk.plain), "CPU", allow_override=True)
    ops.walks_once = lambda _: False
    native.multiplies_bfloat16 = lambda *_: False
    _libraries.append(library)


class Launches:
    """How often each kernel of these modules was launched, from here on."""

    def __init__(self, *modules: ModuleType) -> None:
        self.count: Counter[str] = Counter()
        for module in modules:
            for name, kernel in vars(module).items():
                # Gluon's are for one architecture each, and no interpreter runs them.
                gluon = getattr(kernel, "is_gluon", bool)()
                if name.endswith("_kernel") and hasattr(kernel, "add_pre_run_hook") and not gluon:
                    self._watch(f"{module.__name__.split('.')[-1]}.{name}", kernel)

    def _watch(self, name: str, kernel) -> None:
        self.count[name] = 0
        kernel.add_pre_run_hook(lambda *_, **__: self.count.update([name]))

    def idle(self) -> list[str]:
        """Those that never ran."""
        return [name for name, times in self.count.items() if times == 0]
