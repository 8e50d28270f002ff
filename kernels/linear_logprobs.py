"""Log-probability and entropy of each token from hidden states and the head: the forward pass.

    raw[n, v] = hidden[n] . weight[v]; the rest as in logprobs.py

Two ways. `fused_statistics` never writes a logit: a program owns a tile of tokens and one of
`splits` parts of the vocabulary, multiplies tile by tile with fp32 accumulators in registers, and
keeps the running softmax of its tokens. Traffic: reads NH and VH (from L2 for all but the first of
the programs that share a part), writes 4 N splits. `tiled_statistics` lets the vendor's library
write tiles of fp32 logits that stay in L2, and reads them there. Parts merge in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import logprobs
from .linear_gradients import product

# Logits in a tile of `tiled_statistics`: 32 MiB in fp32, which an L2 of 50 MB holds.
TILE = (4096, 2048)
# With few tokens the launches of `tiled_statistics` would take longer than their products.
FUSED_ROWS = 512


class Device(NamedTuple):
    """What the drivers need to know of the device."""

    multiprocessors: int
    major: int  # of the compute capability; 0: not NVIDIA's, or interpreted
    interpreted: bool = False  # the interpreter multiplies bf16 wrongly: convert first

    @classmethod
    def of(cls, device: torch.device) -> Device:
        properties = torch.cuda.get_device_properties(device)
        major = 0 if torch.version.hip else properties.major
        return cls(properties.multi_processor_count, major)


class Config(NamedTuple):
    """A tile of the fused forward."""

    block_m: int  # tokens
    block_n: int  # vocabulary
    block_k: int  # of H
    num_warps: int
    num_stages: int
    tma: bool  # operands through tensor descriptors rather than pointers


# By the major number of the compute capability (0: any other device): what compiles there without
# spills and within shared memory. The first is taken where its operands can be described.
CONFIGS = {
    8: [Config(128, 128, 64, 8, 3, False)],
    9: [Config(128, 128, 64, 8, 4, True), Config(128, 128, 32, 8, 4, False)],
    10: [Config(128, 128, 64, 8, 4, True), Config(128, 128, 32, 8, 4, False)],
    0: [Config(128, 128, 32, 8, 2, False)],
}


def configs(major: int) -> list[Config]:
    """The tiles for a compute capability."""
    return CONFIGS.get(major, CONFIGS[0])


@triton.jit
def _linear_statistics_kernel(
    hidden,  # (N, H): pointer, or descriptor of (BLOCK_M, BLOCK_K)
    weight,  # (V, H): pointer, or descriptor of (BLOCK_N, BLOCK_K)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    partial_ptr,  # (splits, 4, N) fp32, written
    N,
    V,
    H,
    columns_per_split,
    scale,
    softcap,
    hidden_row_stride,
    weight_row_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbours share a part of the vocabulary, so that a tile of weight is read once into L2.
    tiles = tl.cdiv(N, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    split = (tl.program_id(0) // tiles).to(tl.int64)
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < N
    labels = tl.load(labels_ptr + rows, mask=row_mask, other=-1)
    inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s_i = tl.zeros((BLOCK_M,), tl.float32)
    t_i = tl.zeros((BLOCK_M,), tl.float32)
    at_label = tl.zeros((BLOCK_M,), tl.float32)
    ks = tl.arange(0, BLOCK_K)
    begin = (split * columns_per_split).to(tl.int32)
    end = tl.minimum(begin + columns_per_split, V)
    for v0 in range(begin, end, BLOCK_N):
        cols = v0 + tl.arange(0, BLOCK_N)
        col_mask = cols < end
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if not TMA:
            a_ptrs = hidden + rows[:, None] * hidden_row_stride + ks[None, :]
            b_ptrs = weight + cols[:, None].to(tl.int64) * weight_row_stride + ks[None, :]
        for k0 in range(0, H, BLOCK_K):
            if TMA:
                a = hidden.load([first_row, k0])
                b = weight.load([v0, k0])
            else:
                k_mask = ks[None, :] < H - k0
                a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask, other=0.0)
                b = tl.load(b_ptrs, mask=col_mask[:, None] & k_mask, other=0.0)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b.T, z, input_precision="ieee")
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0) if HAS_BIAS else 0.0
        if HAS_BIAS:
            bias = bias.to(tl.float32)[None, :]
        z = logprobs.transformed(z, bias, scale, softcap, inv_temperature[:, None], HAS_SOFTCAP)
        z = tl.where(col_mask[None, :], z, float("-inf"))
        m_i, s_i, t_i = logprobs.added(m_i, s_i, t_i, z)
        is_label = (cols[None, :] == labels[:, None]) & col_mask[None, :]
        at_label += tl.sum(tl.where(is_label, z, 0.0), axis=1)
    out = partial_ptr + split * 4 * N + rows
    tl.store(out + 0 * N, m_i, mask=row_mask)
    tl.store(out + 1 * N, s_i, mask=row_mask)
    tl.store(out + 2 * N, t_i, mask=row_mask)
    tl.store(out + 3 * N, at_label, mask=row_mask)


def descriptors(
    hidden: Tensor, weight: Tensor, config: Config
) -> tuple[Tensor, Tensor] | tuple[object, object]:
    """The operands as the kernel takes them."""
    if not config.tma:
        return hidden, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def can_describe(tensor: Tensor) -> bool:
    """A tensor descriptor wants a 16-byte aligned base and rows, and contiguous columns."""
    return (
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
    )


def fused_statistics(
    hidden: Tensor,  # [N, H], columns contiguous, the dtype of weight
    weight: Tensor,  # [V, H], columns contiguous
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    device: Device,
) -> Tensor:  # [splits, 4, N] fp32
    """Parts of the running softmax, from logits that stay in registers."""
    (N, H), V = hidden.shape, weight.shape[0]
    first, *others = configs(device.major)
    described = can_describe(hidden) and can_describe(weight)
    config = first if described or not first.tma else others[0]
    tiles = triton.cdiv(N, config.block_m)
    # Two programs for each multiprocessor even out the ends of the parts.
    splits = max(1, min(2 * device.multiprocessors // tiles, triton.cdiv(V, config.block_n)))
    per_split = triton.cdiv(triton.cdiv(V, config.block_n), splits) * config.block_n
    splits = triton.cdiv(V, per_split)
    left, right = descriptors(hidden, weight, config)
    partial = torch.empty(splits, 4, N, dtype=torch.float32, device=hidden.device)
    _linear_statistics_kernel[(tiles * splits,)](
        left,
        right,
        hidden if bias is None else bias,
        labels,
        temperature,
        partial,
        N,
        V,
        H,
        per_split,
        scale,
        softcap,
        hidden.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        TMA=config.tma,
        UPCAST=device.interpreted,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return partial


def tiled_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    device: Device,
) -> Tensor:  # [tiles, 4, N] fp32
    """The same, from the vendor's products: tiles of fp32 logits small enough to stay in L2."""
    N, V = hidden.shape[0], weight.shape[0]
    rows, columns = TILE
    parts = triton.cdiv(V, columns)
    partial = torch.empty(parts, 4, N, dtype=torch.float32, device=hidden.device)
    for n0 in range(0, N, rows):
        n1 = min(n0 + rows, N)
        # A contiguous workspace for these rows; copied where the rows are not all there are.
        here = partial if n1 - n0 == N else partial.new_empty(parts, 4, n1 - n0)
        for part in range(parts):
            v0, v1 = part * columns, min((part + 1) * columns, V)
            logprobs.partial_statistics(
                product(hidden[n0:n1], weight[v0:v1].T),
                None if bias is None else bias[v0:v1],
                labels[n0:n1],
                temperature[n0:n1],
                here[part : part + 1],
                scale,
                softcap,
                v0,
            )
        if here is not partial:
            partial[:, :, n0:n1] = here
    return partial


def fuses(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `fwd` takes the fused way.

    Not in fp32: there an lse shows that is from logits which round otherwise than those of the
    backward pass.
    """
    few = len(hidden) <= FUSED_ROWS and weight.stride(1) == 1
    return few and hidden.dtype != torch.float32


def fwd(
    hidden: Tensor,  # [N, H], the dtype of weight
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] fp32
    scale: float,
    softcap: float,
    ignore_index: int,
    device: Device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy [N] fp32, lse [N] fp64, top [N] fp32; nothing of size V is kept."""
    if len(labels) == 0:
        empty = temperature.new_empty(0)
        return empty, empty.clone(), empty.double(), empty.clone()
    statistics = fused_statistics if fuses(hidden, weight) else tiled_statistics
    args = (bias, labels, temperature, scale, softcap)
    partial = statistics(hidden.contiguous(), weight, *args, device)
    return logprobs.merge(partial, labels, weight.shape[0], ignore_index)
