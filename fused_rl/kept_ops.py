"""The operators under linear_kept_logprobs: schema, shape rules, gradients.

    kept_logprobs[n] = z[n, label] - log sum_{v in kept[n]} exp z[n, v]
    slope[n, v]      = d kept_logprobs[n] / d (hidden[n] . weight[v]),    v in kept[n]

The kernel for CPUs (csrc/kept.cpp) takes the kept logits out of the pass over the whole vocabulary.
Elsewhere the other two statistics come from the operators of linear_logprobs, whichever kernel
those have, and the kept logits are formed once more from indexed rows of weight: M H work, in
chunks of bounded memory. Sums over the pairs are in order of their index: no atomics.

Shapes: as in ops.py; kept [M] int64, cu_kept [N + 1] int64, slope [M] beside kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from fused_rl import ops, reference
from fused_rl.chunked import gradients_like, in_full, statistics_like
from fused_rl.derivatives import call, register_gradient
from fused_rl.reference import acc_dtype


@custom_op("fused_rl::linear_kept_logprobs", mutates_args=())
@in_full
def linear_kept_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, kept_logprobs, slope. 2 NHV, and 6 more in the backward pass.

    A loss of kept_logprobs alone: M H more instead of the 6 NHV.
    """
    return forward(
        *(hidden, weight, bias, labels, kept, cu_kept, temperature, scale, softcap),
        *(ignore_index, chunk_bytes),
    )


@linear_kept_logprobs.register_fake
def _(hidden, weight, bias, labels, kept, *rest):
    logprobs, entropy, lse, _ = statistics_like(hidden, weight)
    return logprobs, entropy, lse, torch.empty_like(logprobs), logprobs.new_empty(kept.shape)


@custom_op("fused_rl::linear_kept_logprobs_backward", mutates_args=())
@in_full
def linear_kept_logprobs_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    dkept_logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    slope: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias; what is not needed comes back empty.

    Tokens whose upstream gradients are all 0 cost nothing.
    """
    return backward(
        *(dlogprobs, dentropy, dkept_logprobs, hidden, weight, bias, labels, kept, cu_kept),
        *(temperature, scale, softcap, ignore_index, chunk_bytes, lse, entropy, slope),
        *(need_dhidden, need_dweight, need_dbias),
    )


@linear_kept_logprobs_backward.register_fake
def _(dlogprobs, dentropy, dkept_logprobs, hidden, weight, bias, *rest):
    return gradients_like(hidden, weight, bias, rest[-3:])


def _save(ctx, inputs, output) -> None:
    *tensors, scale, softcap, ignore_index, chunk_bytes = inputs
    _, entropy, lse, _, slope = output
    ctx.options = (scale, softcap, ignore_index, chunk_bytes)
    ctx.save_for_backward(*tensors, lse, entropy, slope)
    ctx.mark_non_differentiable(lse, slope)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dlogprobs, dentropy, _, dkept_logprobs, __):
    *tensors, lse, entropy, slope = ctx.saved_tensors
    upstream = ops.materialized(entropy, dlogprobs, dentropy, dkept_logprobs)
    needs = ctx.needs_input_grad[:3]
    grads = call(
        linear_kept_logprobs_backward,
        *upstream,
        *tensors,
        *ctx.options,
        lse,
        entropy,
        slope,
        *needs,
    )
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*wanted, *(None,) * 8)


register_gradient(
    "linear_kept_logprobs", linear_kept_logprobs, linear_kept_logprobs_backward, _gradient, _save
)


class Pairs(NamedTuple):
    """The packed sets as pairs (token, word), safe to index with whatever the sets hold."""

    token: Tensor  # [M], rising
    word: Tensor  # [M]
    lengths: Tensor  # [N], adding up to M
    broken: Tensor  # [] bool: the offsets do not rise from 0 to M


def _pairs(kept: Tensor, cu_kept: Tensor, vocabulary: int) -> Pairs:
    N, M = len(cu_kept) - 1, len(kept)
    steps = cu_kept.diff()
    broken = (cu_kept[0] != 0) | (cu_kept[-1] != M) | (steps < 0).any()
    # With broken offsets all pairs go to the last token: no index leads astray.
    last = torch.arange(N, device=kept.device) == N - 1
    lengths = steps.where(~broken, last * M)
    # The size is given, so that nothing waits for the device; without tokens it is 0.
    token = torch.repeat_interleave(lengths, output_size=M if N else 0)
    return Pairs(token, kept[: len(token)].clamp(0, vocabulary - 1), lengths, broken)


def _wrong_tokens(
    labels: Tensor, kept: Tensor, pairs: Pairs, vocabulary: int, ignore_index: int
) -> Tensor:  # [N] bool
    """The counted tokens that have no valid set; on CPU a ValueError says which is the first."""
    counted = labels != ignore_index
    of_counted = counted[pairs.token]
    outside = of_counted & (kept != pairs.word)
    twice = of_counted & _seen_before(pairs.token * vocabulary + pairs.word)
    missing = counted & ~_any_of(kept == labels[pairs.token], pairs)
    if not kept.is_cuda:
        _check_sets(labels, kept, vocabulary, pairs, outside, twice, missing)
    return missing | (counted & (_any_of(outside | twice, pairs) | pairs.broken))


def _any_of(flags: Tensor, pairs: Pairs) -> Tensor:
    """[M] -> [N]: whether there is one in the set of the token."""
    counts = torch.segment_reduce(flags.double(), "sum", lengths=pairs.lengths, unsafe=True)
    return counts > 0


def _seen_before(keys: Tensor) -> Tensor:
    """Which keys stand further left as well."""
    ordered, order = keys.sort(stable=True)
    repeats = torch.zeros_like(keys, dtype=torch.bool)
    repeats[1:] = ordered[1:] == ordered[:-1]
    return torch.empty_like(repeats).index_copy_(0, order, repeats)


def _check_offsets(cu_kept: Tensor, M: int) -> None:
    steps = cu_kept.diff()
    if cu_kept[0] != 0:
        raise ValueError(f"cu_kept[0] is {int(cu_kept[0])}, and must be 0")
    if (falls := steps < 0).any():
        n = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_kept[{n + 1}] is {int(cu_kept[n + 1])}, below cu_kept[{n}], "
            f"which is {int(cu_kept[n])}"
        )
    if cu_kept[-1] != M:
        raise ValueError(
            f"cu_kept[{len(steps)}] is {int(cu_kept[-1])}, and must be the length of kept, {M}"
        )


def _check_sets(labels, kept, vocabulary, pairs, outside, twice, missing) -> None:
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(f"kept[{i}] is {int(kept[i])}, outside the vocabulary [0, {vocabulary})")
    if twice.any():
        i = int(twice.nonzero()[0])
        raise ValueError(
            f"kept[{i}] is {int(kept[i])}, twice in the kept set of token {int(pairs.token[i])}"
        )
    if missing.any():
        n = int(missing.nonzero()[0])
        label = int(labels[n])
        if pairs.lengths[n] == 0:
            raise ValueError(f"the kept set of token {n} is empty, and labels[{n}] is {label}")
        raise ValueError(f"labels[{n}] is {label}, which is not in the kept set of token {n}")


def _chunks(M: int, H: int, dtype: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    """Runs of pairs whose rows fit into chunk_bytes: of hidden, of weight, and of their product,
    which is summed in float64.
    """
    size = max(1, chunk_bytes // (H * (3 * dtype.itemsize + 8)))
    return (slice(start, start + size) for start in range(0, M, size))


def _kept_logits(hidden, weight, bias, temperature, scale, softcap, pairs, chunk_bytes) -> Tensor:
    dtype = acc_dtype(hidden, weight)
    z = hidden.new_empty(len(pairs.word), dtype=dtype)
    for run in _chunks(len(z), hidden.shape[1], dtype, chunk_bytes):
        token, word = pairs.token[run], pairs.word[run]
        raw = (hidden[token].to(dtype) * weight[word].to(dtype)).sum(-1)
        of_word = None if bias is None else bias[word]
        z[run] = reference.from_products(raw, of_word, temperature[token], scale, softcap)
    return z


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """linear_kept_logprobs where it has no kernel."""
    head = (weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes)
    stats = ops.linear_logprobs(hidden, *head)[:3]
    if not kept.is_cuda:
        _check_offsets(cu_kept, len(kept))
    pairs = _pairs(kept, cu_kept, weight.shape[0])
    if len(labels) == 0:
        return (*stats, torch.empty_like(stats[0]), torch.empty_like(kept, dtype=stats[0].dtype))
    wrong = _wrong_tokens(labels, kept, pairs, weight.shape[0], ignore_index)
    args = (hidden, weight, bias, temperature, scale, softcap, pairs, chunk_bytes)
    z = _kept_logits(*args).double()

    def over_sets(x: Tensor, reduce: str) -> Tensor:
        return torch.segment_reduce(x, reduce, lengths=pairs.lengths, unsafe=True)

    top = over_sets(z, "max")
    weights = (z - top[pairs.token]).exp()
    total = over_sets(weights, "sum")
    is_label = pairs.word == labels[pairs.token]
    at_label = over_sets(z.masked_fill(~is_label, 0.0), "sum")
    kept_logprobs = (at_label - top - total.log()).masked_fill(wrong, torch.nan)
    slope = is_label.double() - weights / total[pairs.token]
    t = temperature.double()[pairs.token]
    if softcap:
        slope = slope * (1 - (z * t / softcap) ** 2)
    slope = (slope * (scale / t)).masked_fill(wrong[pairs.token], torch.nan)
    kept_logprobs = kept_logprobs.where(labels != ignore_index, 0.0)
    slope = slope.where((labels != ignore_index)[pairs.token], 0.0)
    return (*stats, kept_logprobs.to(stats[0].dtype), slope.to(stats[0].dtype))


def backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    dkept_logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    temperature: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    lse: Tensor,
    entropy: Tensor,
    slope: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_kept_logprobs_backward where it has no kernel."""
    head = (weight, bias, labels, temperature, scale, softcap, ignore_index, chunk_bytes)
    dhidden, dweight, dbias = ops.linear_logprobs_backward(
        dlogprobs, dentropy, hidden, *head, lse, entropy, need_dhidden, need_dweight, need_dbias
    )
    pairs = _pairs(kept, cu_kept, weight.shape[0])
    up = dkept_logprobs.where(labels != ignore_index, 0.0)[pairs.token]
    # Only pairs with a gradient: a NaN elsewhere reaches nothing.
    live = (up != 0).nonzero()[:, 0]
    token, word, draw = pairs.token[live], pairs.word[live], (up * slope)[live]
    if need_dhidden:
        _add_products(dhidden, token, draw, weight, word, chunk_bytes)
    if need_dweight or need_dbias:
        word, order = word.sort(stable=True)
        token, draw = token[order], draw[order]
    if need_dweight:
        _add_products(dweight, word, draw, hidden, token, chunk_bytes)
    if need_dbias:
        _add_products(dbias[:, None], word, draw, draw.new_ones(1, 1), token * 0, chunk_bytes)
    return dhidden, dweight, dbias


def _add_products(
    to: Tensor,  # [R, H]
    index: Tensor,  # [M], rising
    draw: Tensor,  # [M]
    rows: Tensor,  # [., H]
    row: Tensor,  # [M]
    chunk_bytes: int,
) -> None:
    """to[index[i]] += draw[i] rows[row[i]] for all i, each sum in float64 and in order.

    A sum that goes on in the next run is carried there: what is written is rounded once.
    """
    M, carried = len(index), None
    for run in _chunks(M, rows.shape[1], draw.dtype, chunk_bytes):
        values = (draw[run, None] * rows[row[run]].to(draw.dtype)).double()
        at, lengths = index[run].unique_consecutive(return_counts=True)
        sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)
        if carried is not None:
            sums[0] += carried
        goes_on = run.stop < M and bool(index[run.stop] == at[-1])
        carried = sums[-1] if goes_on else None
        done = at[:-1] if goes_on else at
        to[done] = (to[done] + sums[: len(done)]).to(to.dtype)
