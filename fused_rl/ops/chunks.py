"""How many tokens' logits are held at once, and room for what comes of them."""

import math
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fused_rl.ops import trust
from fused_rl.ops.record import Gradients, Head, Needs, Statistics
from fused_rl.reference import acc_dtype

HAS_TRITON = find_spec("triton") is not None

# Scratch for logits when the caller names none. Constants, not a fraction of what happens to be
# free: the chunking, and with it the last bit of the result, must not change from run to run.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
# Or so much of a card's memory, where that is more: 1.4 GiB of 80 GB, 2.5 GiB of 141 GB.
SHARE = 1 / 56
# With several chunks one pass adds up dweight in fp32: it pays from so many tokens in a chunk that
# the arithmetic hides the traffic, 4 x arithmetic rate / memory bandwidth. On CPUs that dweight has
# fresh pages, too: two chunks of 1024 take 0.84 of two passes' time at V = 32768, three of 704 take
# 1.15 of it at V = 151936.
ONE_PASS_TOKENS = {"cpu": 1024, "cuda": 735}


def scratch_bytes(device: torch.device, chunk_bytes: int | None) -> int:
    """chunk_bytes, or the device's own bound."""
    return chunk_bytes or own_bytes(device)


@lru_cache
def own_bytes(device: torch.device) -> int:
    """The bound of a device; of a CUDA device that is not here, that of a small one."""
    if device.type != "cuda":
        return CHUNK_BYTES["cpu"]
    here = torch.cuda.is_available()
    return card_bytes(torch.cuda.get_device_properties(device).total_memory if here else 0)


def card_bytes(memory: int) -> int:
    """The bound of a card with so many bytes."""
    return max(CHUNK_BYTES["cuda"], int(memory * SHARE))


def one_pass_tokens(device: torch.device) -> float:
    """From how many tokens in a chunk on one pass is cheaper than two, if there are several."""
    return ONE_PASS_TOKENS.get(device.type, math.inf)


def chunk_tokens(hidden: Tensor, weight: Tensor, chunk_bytes: int | None) -> int:
    """Tokens whose logits a chunk may hold."""
    scratch = scratch_bytes(hidden.device, chunk_bytes)
    dtype = acc_dtype(hidden, weight)
    if not _has_kernels(hidden, dtype):
        return chunk_rows(weight.shape[0], dtype, scratch)
    from fused_rl.kernels import linear_gradients

    place = _place(hidden.device)
    V, H = weight.shape
    per_logit = bytes_per_logit(hidden, weight, place)
    return linear_gradients.chunk_tokens(V, H, per_logit, scratch, place.multiprocessors)


def pair_tokens(hidden: Tensor, weight: Tensor, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens whose logits by two heads a chunk may hold.

    Args:
        hidden, weight: of the head that may have a gradient; on a GPU there is room for it, too.
        dtype: of the logits.
    """
    V, H = weight.shape
    if not _has_kernels(hidden, dtype):
        return chunk_rows(2 * V, dtype, chunk_bytes)
    from fused_rl.kernels import linear_divergences, linear_gradients

    per_logit = linear_divergences.bytes_per_logit(_product_width(hidden, weight))
    multiprocessors = _place(hidden.device).multiprocessors
    return linear_gradients.chunk_tokens(V, H, per_logit, chunk_bytes, multiprocessors)


def _has_kernels(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of that dtype are formed by kernels for GPUs."""
    return hidden.is_cuda and HAS_TRITON and dtype == torch.float32


def _product_width(hidden: Tensor, weight: Tensor) -> int:
    """Bytes of a number in their products."""
    return hidden.element_size() if hidden.dtype == weight.dtype else 4


def _place(device: torch.device) -> Any:
    """The device, and what may run there as far as is known before the call."""
    from fused_rl.kernels.configs import Device

    return Device.of(device, trusts=partial(trust.allowed, device))


def bytes_per_logit(hidden: Tensor, weight: Tensor, place: Any) -> int:
    """What a chunk on a GPU has in memory of a logit."""
    from fused_rl.kernels import configs, linear_gradients

    if configs.chosen((hidden, weight, None, None, None, 1.0, 0.0), place, stores=True):
        return 2
    return linear_gradients.bytes_per_logit(_product_width(hidden, weight))


def chunk_rows(vocabulary: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens whose logits fit into chunk_bytes; whole tiles of 64 where there are that many."""
    rows = max(1, chunk_bytes // (max(vocabulary, 1) * dtype.itemsize))
    return rows // 64 * 64 if rows >= 64 else rows


def chunks_of(chosen: Tensor, head: Head, chunk_bytes: int) -> tuple[Tensor, ...]:
    """The indices of the tokens that are chosen [N], cut so that their logits fit."""
    rows = chosen.nonzero()[:, 0]
    return rows.split(chunk_rows(head.weight.shape[0], head.dtype, chunk_bytes))


def counted_rows(counted: Tensor, most: int) -> list[Tensor] | list[slice]:
    """The tokens that count [N], `most` at a time. Slices of all of them while a CUDA graph is
    captured: to know which count would be to wait for the device.
    """
    if trust.capturing(counted.device):
        return [slice(start, start + most) for start in range(0, len(counted), most)]
    return list(counted.nonzero()[:, 0].split(most))


def chunk_sizes(tokens: int, most: int) -> list[int]:
    """Sizes of the chunks that `tokens` are cut into: as few as `most` allows, and even."""
    count = max(1, -(-tokens // most))
    size = min(most, round_up(-(-tokens // count), 16)) if tokens else 0
    return [min(size, tokens - start) for start in range(0, tokens, size)] if size else []


def one_pass_pays(tokens: int, most: int, device: torch.device, trained: bool) -> bool:
    """Few chunks, or chunks that are large enough, or no dweight to accumulate over them.

    most: tokens of a chunk, at most; trained: whether the head is.
    """
    sizes = chunk_sizes(tokens, most)
    return len(sizes) <= 1 or sizes[0] >= one_pass_tokens(device) or not trained


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded(tokens: int) -> int:
    """Tokens that the buffer of a chunk's logits has room for."""
    return round_up(tokens, 32)


def check_tokens(labels: Tensor, temperature: Tensor, vocabulary: int, ignore_index: int) -> None:
    """ValueError at the first label outside the vocabulary or temperature that is not positive.

    Not on CUDA, where looking would wait for the device: there such a token's log-prob is NaN.
    """
    if labels.is_cuda:
        return
    counted = labels != ignore_index
    if (wrong := ((labels < 0) | (labels >= vocabulary)) & counted).any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels[{n}] is {int(labels[n])}, outside the vocabulary [0, {vocabulary}) "
            f"and not ignore_index ({ignore_index})"
        )
    if (wrong := ~(temperature > 0) & counted).any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"temperature[{n}] is {float(temperature[n])}, and a temperature must be positive"
        )


def statistics_like(hidden: Tensor, weight: Tensor) -> Statistics:
    """Room for the statistics of N tokens."""
    dtype = acc_dtype(hidden, weight)
    dtypes = Statistics(dtype, dtype, torch.float64, dtype)
    return Statistics(*(hidden.new_empty(hidden.shape[:1], dtype=t) for t in dtypes))


def gradients_like(head: Head, needs: Needs) -> Gradients:
    """Room for the gradients that are needed."""
    hidden, weight, bias, *_ = head
    return Gradients(
        hidden.new_empty(hidden.shape if needs.need_dhidden else (0,)),
        weight.new_empty(weight.shape if needs.need_dweight else (0,)),
        bias.new_empty(bias.shape) if needs.need_dbias else weight.new_empty(0),
    )


def waiting_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient waits in for the scale of its loss: float16 could underflow meanwhile."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
