"""The fused forward for sm_90 by a kernel that is split among its warps; the driver.

    raw[n, v] = hidden[n] . weight[v]; the rest as in logprobs.py

The device code is in hopper_kernels.py, in Gluon, a language of triton that is experimental: where
this triton has no such language, `takes` is False. What it computes is what `fused_statistics`
of linear_logprobs.py does, in the same units, with the same parts.

`exponentials` also writes E[n, v] = 2^(z2[n, v] - reference[n]), with z2 in units of log2.
Traffic: as `fused_statistics`; `exponentials` writes 2 NV bytes beside.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configs import HOPPER, Config, Device, can_describe

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import hopper_kernels as kernels
except ImportError:
    kernels = None

CONFIGS = {9: HOPPER}

# Hidden states of the programs that run at the same time, so that they stay in an L2 of 50 MB
# beside as much of the weight.
GROUP_BYTES = 16 * 2**20
# What a program costs beside its products, in steps of BLOCK_K: barriers, the first loads, the
# last sums. An estimate, not a measurement: 2 us, where a step takes 0.6 us at 750 TFLOP/s.
START_STEPS = 4


class Cut(NamedTuple):
    """How a call is cut into programs."""

    tiles: int  # of tokens
    splits: int  # of the vocabulary
    columns_per_split: int  # a multiple of BLOCK_N
    group: int  # tiles of tokens that run side by side on one split

    @property
    def programs(self) -> int:
        return self.tiles * self.splits


class Stored(NamedTuple):
    """What the storing variant works on beside the head."""

    # [N, V] bf16, written; rows begin at multiples of 16 bytes, and what a row leaves of its last
    # 16 bytes becomes 0.
    exponentials: Tensor
    reference: Tensor  # [N] fp32, in the units of the logits
    again: Tensor | None = None  # [tiles] int32: those to form; what is not wanted is not touched


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can run on these operands, on a device that CONFIGS has.

    With fewer columns than a step has, products are not what takes the time.
    """
    half = hidden.dtype in (torch.float16, torch.bfloat16) and weight.dtype == hidden.dtype
    described = can_describe(hidden) and can_describe(weight)
    return kernels is not None and half and described and hidden.shape[1] >= 64


@lru_cache(maxsize=256)
def cut(tokens: int, V: int, H: int, multiprocessors: int, config: Config) -> Cut:
    """The splits that take the fewest steps, among equals the fewest parts.

    Shared memory holds one program per multiprocessor, so that programs run in waves, and the
    device waits for the last program of the last wave: with 64 tiles on 132 multiprocessors two
    splits leave 3 % idle in one wave, 33 splits nothing in 16.
    """
    tiles, columns = triton.cdiv(tokens, config.block_m), triton.cdiv(V, config.block_n)
    steps = triton.cdiv(H, config.block_k)

    def cost(splits: int) -> int:
        waves = triton.cdiv(tiles * splits, multiprocessors)
        return waves * (triton.cdiv(columns, splits) * steps + START_STEPS)

    per_split = triton.cdiv(columns, min(range(1, columns + 1), key=cost))
    # A row of hidden states takes 2 H bytes.
    group = max(1, min(tiles, GROUP_BYTES // (config.block_m * 2 * H)))
    return Cut(tiles, triton.cdiv(columns, per_split), per_split * config.block_n, group)


def described(tensor: Tensor, *block: int) -> object:
    """The tensor as the kernel takes it, in boxes of `block`; outside it is 0 and keeps nothing."""
    layout = kernels.shared_layout(block, tensor.dtype)
    return TensorDescriptor.from_tensor(tensor, list(block), layout)


def _launch(
    head: tuple, stored: Stored | None, partial: Tensor, device: Device, config: Config
) -> None:
    hidden, weight, bias, labels, temperature, scale, softcap, rounding = head
    (N, H), V = hidden.shape, weight.shape[0]
    parts = cut(N, V, H, device.multiprocessors, config)
    left = described(hidden, config.block_m, config.block_k)
    right = described(weight, config.block_n, config.block_k)
    exponentials, reference, again = stored or (None, temperature, None)
    if exponentials is not None:
        exponentials = described(exponentials, config.block_m // 2, config.block_n // 2)
    kernels._hopper_statistics_kernel[(parts.programs,)](
        left,
        right,
        left if exponentials is None else exponentials,
        hidden if bias is None else bias,
        labels,
        temperature,
        reference,
        labels if again is None else again,
        partial,
        N,
        V,
        H,
        parts.columns_per_split,
        parts.splits,
        parts.group,
        scale,
        softcap,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        ROUNDING=rounding,
        STORE=stored is not None,
        AGAIN=again is not None,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )


def parts_of(head: tuple, device: Device, config: Config) -> Tensor:
    """Room for the parts of a call: [splits, 4, N] fp32."""
    hidden, weight, *_ = head
    splits = cut(*hidden.shape[:1], *weight.shape, device.multiprocessors, config).splits
    return torch.empty(splits, 4, len(hidden), dtype=torch.float32, device=hidden.device)


def statistics(
    hidden: Tensor,  # [N, H], described, fp16 or bf16
    weight: Tensor,  # [V, H], described, the dtype of hidden
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    rounding: int,
    device: Device,
    config: Config,
) -> Tensor:  # [splits, 4, N] fp32, in multiples of linear_logprobs.unit(bias)
    """Parts of the running softmax: the largest logit, the two sums, the label's logit."""
    head = (hidden, weight, bias, labels, temperature, scale, softcap, rounding)
    partial = parts_of(head, device, config)
    _launch(head, None, partial, device, config)
    return partial


def exponentials(
    head: tuple,  # hidden ... rounding, as `statistics` takes them
    stored: Stored,
    partial: Tensor,  # of parts_of, written
    device: Device,
    config: Config,
) -> None:
    """E, and the parts of what linear_exponentials.py sums: the largest logit, s, t, the label's.

    Logits and references as `statistics` writes them, t in units of log2.
    """
    _launch(head, stored, partial, device, config)
