"""The device code of hopper.py, in Gluon: one warp loads, two groups of four warps multiply.

    z2[n, v] = log2(e) softcap(scale * rounded(hidden[n] . weight[v] + bias[v])) / temperature[n]

A program owns BLOCK_M = 128 tokens and one part of the vocabulary. The producer, one warp with 24
registers a thread, brings tiles of BLOCK_K columns into a ring of STAGES buffers by TMA; each
consumer, four warps with 240 registers a thread, multiplies 64 tokens by BLOCK_N = 256 entries of
the vocabulary with asynchronous wgmma and keeps the running softmax of its tokens. While a consumer
is between two tiles the producer loads ahead, and the other may still multiply.

Barriers. All three walk the same sequence of steps i = 0, 1, ...: for each tile of the vocabulary,
for each BLOCK_K of H. Step i lives in buffer i % STAGES, and is that buffer's use number
u = i // STAGES. A wait for parity p returns once the barrier's phase of that parity is complete;
the phase before the first counts as complete with parity 1.

    ready[s]  one arrival, the producer's, which also announces the bytes of both tiles; phase u is
              complete when they have landed. The consumers wait for parity u % 2 before they
              multiply.
    empty[s]  two arrivals, one of each consumer, when its products that read the buffer are done;
              phase u completes when both are. Before use u the producer waits for phase u - 1,
              parity (u + 1) % 2; for u = 0 that returns at once.

So a buffer is overwritten only after both consumers have read it, and no barrier runs more than
one phase ahead of who waits for it: use u + 1 is announced to ready[s] after both consumers have
arrived at empty[s] for u, and they arrive for u + 1 after the loads of u + 1. The three loops have
the same bounds, so every load is waited for once by each consumer, and every wait has its load. A
part of the vocabulary that is empty, or one step of H, is no special case: no step, or one a tile.

Four warps arrive as one: the compiler puts a barrier of their own before the arrival, which one
thread makes. Products are waited for before it: at most one, that of the last step, is in flight
when the buffer of the step before is handed back. So it takes two buffers at least.

The storing variant has a buffer of its own for each consumer. It is filled after the store before
has read it (store_wait, which only the thread that stores can do, and a barrier, which the compiler
puts), and stored after a fence and such a barrier: TMA sees what all four warps wrote.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import logprobs

# Renamed between triton 3.6 and 3.9, where the old name is there and raises.
RENAMED = hasattr(tma, "async_load")
load_tile = tma.async_load if RENAMED else tma.async_copy_global_to_shared
store_tile = tma.async_store if RENAMED else tma.async_copy_shared_to_global

INTEGERS = ["N", "V", "H", "columns_per_split", "splits", "group"]


@gluon.jit
def _producer(
    hidden, weight, a_bufs, b_bufs, ready, empty, first_row, begin, end, H
):  # fmt: skip
    STAGES: gl.constexpr = b_bufs.shape[0]
    BLOCK_N: gl.constexpr = b_bufs.shape[1]
    BLOCK_K: gl.constexpr = b_bufs.shape[2]
    i = 0
    for v0 in range(begin, end, BLOCK_N):
        for k0 in range(0, H, BLOCK_K):
            s = i % STAGES
            mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
            # Columns past the ends of the tensors are loaded as zeros and count as bytes.
            mbarrier.expect(ready.index(s), hidden.block_type.nbytes + weight.block_type.nbytes)
            load_tile(hidden, [first_row, k0], ready.index(s), a_bufs.index(s))
            load_tile(weight, [v0, k0], ready.index(s), b_bufs.index(s))
            i += 1


@gluon.jit
def _product(
    a_bufs, b_bufs, ready, empty, i, H, layout: gl.constexpr, WHICH: gl.constexpr
):  # fmt: skip
    """The raw logits of 64 tokens and a tile of the vocabulary, and the number of the next step."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    BLOCK_N: gl.constexpr = b_bufs.shape[1]
    BLOCK_K: gl.constexpr = b_bufs.shape[2]
    ROWS: gl.constexpr = a_bufs.shape[1] // 2
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=layout)
    s = i % STAGES
    mbarrier.wait(ready.index(s), (i // STAGES) & 1)
    a = a_bufs.index(s).slice(WHICH * ROWS, ROWS, 0)
    b = b_bufs.index(s).permute((1, 0))
    acc = warpgroup_mma(a, b, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    i += 1
    for _ in range(BLOCK_K, H, BLOCK_K):
        s = i % STAGES
        mbarrier.wait(ready.index(s), (i // STAGES) & 1)
        a = a_bufs.index(s).slice(WHICH * ROWS, ROWS, 0)
        b = b_bufs.index(s).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # One product stays in flight; the one before it has read its buffer.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        i += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
    return acc, i


@gluon.jit
def _halves(acc, layout: gl.constexpr):
    """The left and the right half of the columns: each thread has both in registers already."""
    pairs = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute((0, 2, 1))
    left, right = gl.split(pairs)
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def _logits(
    raw, bias_ptr, v0, V, scale, softcap, inv_temperature, layout: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SOFTCAP: gl.constexpr, ROUNDING: gl.constexpr,
):  # fmt: skip
    """Logits from raw products: in units of log2, but not with a bias."""
    bias = 0.0
    if HAS_BIAS:
        # Each thread loads its share, and they exchange them: few loads, few registers.
        entries = v0 + gl.arange(0, raw.shape[1], layout=gl.BlockedLayout([1], [32], [4], [0]))
        bias = gl.load(bias_ptr + entries, mask=entries < V, other=0.0).to(gl.float32)
        bias = gl.convert_layout(bias, gl.SliceLayout(0, layout))[None, :]
    per_token = inv_temperature[:, None]
    return logprobs.in_units(raw, bias, scale, softcap, per_token, HAS_BIAS, HAS_SOFTCAP, ROUNDING)


@gluon.jit
def _consumer(
    exps, bias_ptr, labels_ptr, temperature_ptr, reference_ptr, partial_ptr,
    a_bufs, b_bufs, e_bufs, ready, empty, first_row, split, begin, end,
    N, V, H, written, scale, softcap,
    WHICH: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    ROUNDING: gl.constexpr, STORE: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = a_bufs.shape[1] // 2
    BLOCK_N: gl.constexpr = b_bufs.shape[1]
    HALF: gl.constexpr = BLOCK_N // 2
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK_N, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, HALF, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    row0 = first_row + WHICH * ROWS
    rows = row0 + gl.arange(0, ROWS, layout=row_layout)
    row_mask = rows < N
    cols = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    labels = gl.load(labels_ptr + rows, mask=row_mask, other=-1)
    # In int32, and -1 for those of other parts: they are in no tile.
    labels = gl.where((labels >= begin) & (labels < end), labels, -1).to(gl.int32)
    inv_temperature = 1.0 / gl.load(temperature_ptr + rows, mask=row_mask, other=1.0)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=row_layout)
    s_i = gl.full([ROWS], 0.0, gl.float32, layout=row_layout)
    t_i = gl.full([ROWS], 0.0, gl.float32, layout=row_layout)
    at_label = gl.full([ROWS], 0.0, gl.float32, layout=row_layout)
    if STORE:
        reference = gl.load(reference_ptr + rows, mask=row_mask, other=0.0)
    i = 0
    for v0 in range(begin, end, BLOCK_N):
        # Few tiles hold a label of these tokens: asked while the products run.
        holds_label = gl.max(((labels >= v0) & (labels < v0 + BLOCK_N)).to(gl.int32), axis=0) > 0
        raw, i = _product(a_bufs, b_bufs, ready, empty, i, H, whole, WHICH)
        halves = _halves(raw, layout)
        # Half after half: fewer numbers are alive at a time, so that none leaves the registers.
        for half in gl.static_range(2):
            v = v0 + half * HALF
            z = _logits(
                halves[half], bias_ptr, v, V, scale, softcap, inv_temperature, layout,
                HAS_BIAS, HAS_SOFTCAP, ROUNDING,
            )  # fmt: skip
            if v + HALF > end:
                z = gl.where((v + cols < end)[None, :], z, float("-inf"))
            if holds_label:
                is_label = cols[None, :] == (labels - v)[:, None]
                at_label += gl.sum(gl.where(is_label, z, 0.0), axis=1)
            if STORE:
                m_i = gl.maximum(m_i, gl.max(z, axis=1))
                d = logprobs.log2_ratio(z, reference[:, None], not HAS_BIAS)
                p = gl.exp2(d)
                t_i += gl.sum(p * d, axis=1)
                s_i += gl.sum(p, axis=1)
                # The buffer is filled again when the store before has read it.
                tma.store_wait(pendings=0)
                e_bufs.index(WHICH).store(p.to(gl.bfloat16))
                fence_async_shared()
                store_tile(exps, [row0, v], e_bufs.index(WHICH))
            else:
                m_i, s_i, t_i = logprobs.added_by_exp2(m_i, s_i, t_i, z, not HAS_BIAS)
    if STORE:
        tma.store_wait(pendings=0)
    if HAS_BIAS and not STORE:
        t_i *= logprobs.LOG_2
    out = partial_ptr + split.to(gl.int64) * 4 * N + rows
    gl.store(out + 0 * N, m_i, mask=rows < written)
    gl.store(out + 1 * N, s_i, mask=rows < written)
    gl.store(out + 2 * N, t_i, mask=rows < written)
    gl.store(out + 3 * N, at_label, mask=rows < written)


@gluon.jit(do_not_specialize=INTEGERS)
def _hopper_statistics_kernel(
    hidden,  # (N, H): descriptor of (BLOCK_M, BLOCK_K)
    weight,  # (V, H): descriptor of (BLOCK_N, BLOCK_K)
    exps,  # (N, V) bf16: descriptor of (64, BLOCK_N), written; unused without STORE
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (N,) int64
    temperature_ptr,  # (N,) fp32
    reference_ptr,  # (N,) fp32; unused without STORE
    again_ptr,  # (tiles,) int32: the tiles of tokens that are to be formed, if AGAIN
    partial_ptr,  # (splits, 4, N) fp32, written
    N,
    V,
    H,
    columns_per_split,
    splits,
    group,
    scale,
    softcap,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    ROUNDING: gl.constexpr,
    STORE: gl.constexpr,
    AGAIN: gl.constexpr,
    STAGES: gl.constexpr,
):
    BLOCK_M: gl.constexpr = hidden.block_type.shape[0]
    BLOCK_K: gl.constexpr = hidden.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight.block_type.shape[0]
    # `group` neighbours share a part of the vocabulary, so that its tiles are read once into L2.
    tiles = gl.cdiv(N, BLOCK_M)
    first_tile = gl.program_id(0) // (group * splits) * group
    size = gl.minimum(tiles - first_tile, group)
    within = gl.program_id(0) - first_tile * splits
    tile = first_tile + within % size
    first_row = tile * BLOCK_M
    split = within // size
    begin = split * columns_per_split
    end = gl.minimum(begin + columns_per_split, V)
    written = N
    if AGAIN:
        # Where nothing is wanted there is nothing to do.
        wanted = gl.load(again_ptr + tile) != 0
        end = gl.where(wanted, end, begin)
        written = gl.where(wanted, N, 0)
    gl.static_assert(STAGES >= 2, "one product stays in flight while the next is loaded")
    a_bufs = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_M, BLOCK_K], hidden.layout)
    b_bufs = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if STORE:
        e_bufs = gl.allocate_shared_memory(
            gl.bfloat16, [2, BLOCK_M // 2, BLOCK_N // 2], exps.layout
        )
    else:
        e_bufs = a_bufs
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (exps, bias_ptr, labels_ptr, temperature_ptr, reference_ptr, partial_ptr,
                         a_bufs, b_bufs, e_bufs, ready, empty, first_row, split, begin, end,
                         N, V, H, written, scale, softcap, 0, HAS_BIAS, HAS_SOFTCAP,
                         ROUNDING, STORE)),
            (_consumer, (exps, bias_ptr, labels_ptr, temperature_ptr, reference_ptr, partial_ptr,
                         a_bufs, b_bufs, e_bufs, ready, empty, first_row, split, begin, end,
                         N, V, H, written, scale, softcap, 1, HAS_BIAS, HAS_SOFTCAP,
                         ROUNDING, STORE)),
            (_producer, (hidden, weight, a_bufs, b_bufs, ready, empty, first_row, begin, end, H)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def shared_layout(block, dtype):
    """How TMA lays a block of that dtype of torch out in shared memory."""
    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(block), element)
