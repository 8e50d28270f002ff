"""The operators in plain torch, in chunks of bounded memory, on any device and in any dtype.

What runs where no kernel does. Each function is what the operator of its name in ops.py does; the
forward formulas are reference.py's.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.reference import acc_dtype


def autocasts(kind: str) -> bool:
    """Whether torch.autocast is on for that type of device, which need not have one."""
    # To ask what a device has ends a graph of torch 2.11.
    has = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return has and torch.is_autocast_enabled(kind)


def in_full(body: Callable) -> Callable:
    """An operator's body, outside torch.autocast: who called it has cast what is to be cast, and
    the products in here keep the dtypes that they are given. Its signature is the operator's.
    """

    @functools.wraps(body)
    def run(*args, **options):
        kind = next(a.device.type for a in args if isinstance(a, Tensor))
        if not autocasts(kind):
            return body(*args, **options)
        with torch.autocast(kind, enabled=False):
            return body(*args, **options)

    return run


def chunk_rows(vocabulary: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens whose logits fit into chunk_bytes; whole tiles of 64 where there are that many."""
    rows = max(1, chunk_bytes // (max(vocabulary, 1) * dtype.itemsize))
    return rows // 64 * 64 if rows >= 64 else rows


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


def statistics_like(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for logprobs, entropy, lse and top. lse is in float64 whatever the inputs: its rounding
    would be a relative error of every probability of the row.
    """
    dtype = acc_dtype(hidden, weight)
    dtypes = (dtype, dtype, torch.float64, dtype)
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=t) for t in dtypes)


def gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dhidden, dweight and dbias; none where it is not needed."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        bias.new_empty(bias.shape) if needs[2] else weight.new_empty(0),
    )


def statistics(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.statistics, with lse in float64, from the largest logit and log_sum."""
    logprobs, entropy, _, top = reference.statistics(z, labels)
    return logprobs, entropy, z.amax(-1).double() - top.double(), top


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient waits in for the scale of its loss: float16 could underflow meanwhile."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def padded(n: int) -> int:
    """Tokens that a kept chunk of logits has room for."""
    return (n + 15) // 16 * 16


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tokens(labels, temperature, weight.shape[0], ignore_index)
    out = [t.zero_() for t in statistics_like(hidden, weight)]
    active = (labels != ignore_index).nonzero()[:, 0]
    for rows in active.split(chunk_rows(weight.shape[0], out[0].dtype, chunk_bytes)):
        z = reference.logits(hidden[rows], weight, bias, temperature[rows], scale, softcap)
        for total, part in zip(out, statistics(z, labels[rows]), strict=True):
            total[rows] = part
    return tuple(out)


def linear_logprobs_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = acc_dtype(hidden, weight)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape if need_dweight else 0, dtype=dtype)
    dbias = weight.new_zeros(weight.shape[0] if need_dbias else 0, dtype=torch.float64)
    live = (labels != ignore_index) & ((dlogprobs != 0) | (dentropy != 0))
    for rows in live.nonzero()[:, 0].split(chunk_rows(weight.shape[0], dtype, chunk_bytes)):
        dhidden[rows] = _chunk_gradients(
            (dlogprobs[rows], dentropy[rows], entropy[rows]),
            (hidden[rows], weight, bias, labels[rows], temperature[rows], scale, softcap),
            dweight,
            dbias,
        ).to(hidden.dtype)
    return (
        dhidden if need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype),
        dbias.to(bias.dtype) if need_dbias else dbias.to(weight.dtype),
    )


def log_probabilities(z: Tensor, lse: Tensor, entropy: Tensor) -> Tensor:
    """z - lse where z [N, V'] is not all of a token's logits, in the dtype of z.

    Logits so large that they lie 64 apart or more leave log_sum no place in lse = max + log_sum.
    But then only those that tie with the largest have a probability, so that log_sum is the
    entropy, and lse rounds to the largest.
    """
    rounded = lse.to(z.dtype)
    apart = 128 / torch.finfo(z.dtype).eps
    rest = (lse - rounded).to(z.dtype).where(lse.abs() < apart, entropy.to(z.dtype))
    return (z - rounded[:, None]) - rest[:, None]


def _softmax_gradient(
    dlogprobs: Tensor,
    dentropy: Tensor,
    entropy: Tensor,
    logp: Tensor,  # [N, V], or some columns of it
    labels: Tensor,  # those outside the columns add nothing
) -> Tensor:
    """dz [N, V] = dlogprobs (1[label] - p) - dentropy p (log p + entropy)."""
    p = logp.exp()
    # A token with p = 0 has no gradient, also where its log p is -inf.
    surprise = logp.masked_fill(logp == -torch.inf, 0.0) + entropy[:, None]
    dz = -p * (dlogprobs[:, None] + dentropy[:, None] * surprise)
    here = (labels >= 0) & (labels < logp.shape[1])
    return dz.scatter_add(-1, labels.where(here, 0)[:, None], dlogprobs.where(here, 0.0)[:, None])


def raw_gradient(
    dlogprobs: Tensor,
    dentropy: Tensor,
    entropy: Tensor,
    z: Tensor,  # [N, V], or some columns of it
    logp: Tensor,  # beside z
    labels: Tensor,  # counted from the first of these columns
    temperature: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """The gradient of hidden . weight^T, [N, V]."""
    draw = _softmax_gradient(dlogprobs, dentropy, entropy, logp, labels)
    if softcap:
        draw = draw * (1 - (z * temperature[:, None] / softcap) ** 2)
    return draw * (scale / temperature[:, None])


def _chunk_gradients(
    known: tuple[Tensor, Tensor, Tensor],  # dlogprobs, dentropy, entropy
    args: tuple,
    dweight: Tensor,
    dbias: Tensor,
) -> Tensor:
    """dhidden of a chunk; adds to dweight and dbias."""
    hidden, weight, bias, labels, *transform = args
    z = reference.logits(hidden, weight, bias, *transform)
    draw = raw_gradient(*known, z, torch.log_softmax(z, -1), labels, *transform)
    if dweight.numel():
        dweight += draw.T @ hidden.to(draw.dtype)
    if dbias.numel():
        dbias += draw.sum(0)
    return draw @ weight.to(draw.dtype)


def linear_logprobs_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = reference.logits(hidden, weight, bias, temperature, scale, softcap)
    kept = z.new_zeros(weight.shape[0] * padded(hidden.shape[0]))
    return (*statistics(z, labels), kept)


def linear_logprobs_chunk_backward(
    z: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    lse: Tensor,
    entropy: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    accumulate: bool,
) -> Tensor:
    if not accumulate:
        dweight.zero_()
        dbias.zero_()
    args = (hidden, weight, bias, labels, temperature, scale, softcap)
    dhidden = _chunk_gradients((dlogprobs, dentropy, entropy), args, dweight, dbias)
    return dhidden.to(kept_dtype(hidden))


def logits_logprobs(
    logits: Tensor, labels: Tensor, temperature: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(labels, temperature, logits.shape[1], ignore_index)
    out = [t.zero_() for t in statistics_like(logits, logits)[:3]]
    rows = (labels != ignore_index).nonzero()[:, 0]
    z = logits[rows].to(out[0].dtype) / temperature[rows, None]
    for total, part in zip(out, statistics(z, labels[rows]), strict=False):
        total[rows] = part
    return tuple(out)


def logits_logprobs_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    dlogits = logits.new_zeros(logits.shape)
    live = (labels != ignore_index) & ((dlogprobs != 0) | (dentropy != 0))
    rows = live.nonzero()[:, 0]
    t = temperature[rows, None]
    known = (dlogprobs[rows], dentropy[rows], entropy[rows])
    logp = torch.log_softmax(logits[rows].to(t.dtype) / t, -1)
    dz = _softmax_gradient(*known, logp, labels[rows])
    dlogits[rows] = (dz / t).to(logits.dtype)
    return dlogits


def kl(d: Tensor, value_kind: int, slope_kind: int) -> tuple[Tensor, Tensor]:
    return reference.kl(d, value_kind).clone(), reference.kl_slope(d, slope_kind).clone()
