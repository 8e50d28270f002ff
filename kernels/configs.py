"""How the fused forward is cut into tiles, per architecture; what was compiled, and what was run.

A configuration without a `proof` stays off until it is asked for. A proof is a result in
bench/results: on the architecture that was measured it shows the configuration right, and faster
than what it replaces; on another, that this code ran, with the tiles of another one. What the
compiler makes of each (registers, stack, shared memory, instructions per logit) is in
bench/results/compiled.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """A tile of the fused forward, and the calls it is for."""

    block_m: int  # tokens
    block_n: int  # vocabulary
    block_k: int  # of H
    num_warps: int
    num_stages: int
    tma: bool  # operands through tensor descriptors rather than pointers
    stores: bool = False  # for linear_exponentials.py, in bfloat16
    gluon: bool = False  # the kernel of hopper.py, whose warps divide the work among them
    rows: float = float("inf")  # tokens of a call, at most
    transforms: bool = True  # whether it is for a bias or a softcap, too
    proof: str | None = None  # a file of bench/results

    @property
    def title(self) -> str:
        """As reports name it."""
        m, n, k, warps, stages = self[:5]
        operands = "Gluon" if self.gluon else "TMA" if self.tma else "pointers"
        epilogue = ", stores" if self.stores else ", exp2"
        return f"{operands} {m}x{n}x{k}, {warps} warps, {stages} stages{epilogue}"


# Up to so many tokens launches of `tiled_statistics` take longer than their products.
FEW = 512
H100 = "h100-bfloat16"
# 0 bytes of stack under triton 3.6 and 3.9, with and without bias, softcap and E; 196,824 to
# 230,472 of the 232,448 bytes of shared memory that a block may have. The four warps are those of
# the first consumer; the others come on top. Rounding takes no stack either, under 3.9.
HOPPER = Config(128, 256, 64, 4, 4, True, gluon=True, proof=H100)
# A bias or a softcap would take it registers that it does not have.
WIDE = Config(128, 256, 64, 8, 3, True, transforms=False, proof=H100)

# By the major number of the compute capability (0: any other device), best first: what compiles
# there without spills and within shared memory. Where none takes the call: `tiled_statistics`.
CONFIGS = {
    8: [Config(128, 128, 64, 8, 3, False, rows=FEW, proof=H100)],
    9: [
        Config(64, 128, 64, 4, 4, False, rows=64, proof=H100),
        # What a program of HOPPER takes to start shows where there are few.
        WIDE._replace(rows=FEW),
        HOPPER,
        # For a triton without Gluon.
        WIDE,
        # With 8192 tokens tiles are as fast.
        Config(128, 128, 64, 8, 4, True, rows=2048, proof=H100),
        HOPPER._replace(stores=True),
        WIDE._replace(stores=True),
        # With 8192 tokens slower than the forward in tiles, and so without a proof.
        Config(128, 128, 64, 8, 4, True, stores=True),
        Config(128, 128, 64, 8, 4, False, rows=FEW, proof=H100),
    ],
    10: [
        # Slower than the forward in tiles on the H100: nothing speaks for it here.
        Config(128, 128, 64, 8, 4, True, stores=True),
        Config(128, 128, 64, 8, 4, True, proof=H100),
        Config(128, 128, 32, 8, 3, False, rows=FEW, proof=H100),
    ],
    0: [
        Config(128, 128, 32, 8, 2, False, rows=FEW, proof=H100),
        # Exponentials by pointers have run nowhere.
        Config(128, 128, 32, 8, 2, False, stores=True),
    ],
}


class Device(NamedTuple):
    """What the drivers need to know of the device."""

    multiprocessors: int
    major: int  # of the compute capability; 0: not NVIDIA's, or interpreted
    interpreted: bool = False  # the interpreter multiplies bf16 wrongly: convert first
    # Whether a configuration may run here, given what it would run on.
    trusts: Callable[[Config, tuple], bool] = lambda config, call: config.proof is not None

    @classmethod
    def of(cls, device: torch.device, **options: Callable) -> Device:
        properties = torch.cuda.get_device_properties(device)
        major = 0 if torch.version.hip else properties.major
        return cls(properties.multi_processor_count, major, **options)


def configs(major: int) -> list[Config]:
    """Those for a compute capability."""
    return CONFIGS.get(major, CONFIGS[0])


def can_describe(tensor: Tensor) -> bool:
    """A tensor descriptor wants a 16-byte aligned base and rows, and contiguous columns."""
    return (
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
    )


def chosen(call: tuple, device: Device, *, stores: bool = False) -> Config | None:
    """The first that takes the call and may run on the device.

    None: linear_logprobs.tiled_statistics takes its place, or logits that of exponentials. Always
    in fp32: there an lse shows that is from logits which round otherwise than those of the backward
    pass. For two dtypes, whose products split.py has. Exponentials need the range of bfloat16.

    Args:
        call: hidden, weight, bias, labels, temperature, scale, softcap, rounding.
        stores: for exponentials.
    """
    hidden, weight, bias, *_, softcap, _ = call
    dtypes = (torch.bfloat16,) if stores else (torch.bfloat16, torch.float16)
    if hidden.dtype not in dtypes or weight.dtype != hidden.dtype or weight.stride(1) != 1:
        return None
    described = can_describe(hidden) and can_describe(weight)
    plain = bias is None and softcap == 0.0
    for config in configs(device.major):
        takes = config.stores == stores and len(hidden) <= config.rows
        takes = takes and (described or not config.tma) and (plain or config.transforms)
        takes = takes and (not config.gluon or _takes_gluon(hidden, weight))
        if takes and device.trusts(config, call):
            return config
    return None


def _takes_gluon(hidden: Tensor, weight: Tensor) -> bool:
    from .hopper import takes

    return takes(hidden, weight)
