"""Logits and gradients at pairs (token, vocabulary entry), for devices without a kernel for them.

The logits are formed from indexed rows of weight: M H work for M pairs, in chunks of bounded
memory. Sums over the pairs are in order of their index: no atomics.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.record import Gradients, Head, Limits, Needs


def pair_logits(head: Head, token: Tensor, entry: Tensor, chunk_bytes: int) -> Tensor:  # [M]
    hidden, weight, bias, _, temperature, *transform = head
    z = hidden.new_empty(len(entry), dtype=head.dtype)
    for run in _runs(len(z), hidden.shape[1], head.dtype, chunk_bytes):
        n, v = token[run], entry[run]
        raw = (hidden[n].to(head.dtype) * weight[v].to(head.dtype)).sum(-1)
        of_entry = None if bias is None else bias[v]
        z[run] = reference.from_products(raw, of_entry, temperature[n], *transform)
    return z


def add_pairs(
    grads: Gradients,  # added to; in the dtype of what they belong to
    head: Head,
    token: Tensor,  # [M], rising
    entry: Tensor,  # [M]
    draw: Tensor,  # [M], the gradients of hidden[token] . weight[entry]
    live: Tensor,  # [M] bool: only those pairs, for a NaN elsewhere reaches nothing
    limits: Limits,
    needs: Needs,
) -> None:
    chosen = live.nonzero()[:, 0]
    token, entry, draw = token[chosen], entry[chosen], draw[chosen]
    if needs.need_dhidden:
        _add_products(grads.dhidden, token, draw, head.weight, entry, limits.chunk_bytes)
    if needs.need_dweight or needs.need_dbias:
        entry, order = entry.sort(stable=True)
        token, draw = token[order], draw[order]
    if needs.need_dweight:
        _add_products(grads.dweight, entry, draw, head.hidden, token, limits.chunk_bytes)
    if needs.need_dbias:
        ones, first = draw.new_ones(1, 1), token * 0
        _add_products(grads.dbias[:, None], entry, draw, ones, first, limits.chunk_bytes)


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
    for run in _runs(M, rows.shape[1], draw.dtype, chunk_bytes):
        values = (draw[run, None] * rows[row[run]].to(draw.dtype)).double()
        at, lengths = index[run].unique_consecutive(return_counts=True)
        sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)
        if carried is not None:
            sums[0] += carried
        goes_on = run.stop < M and bool(index[run.stop] == at[-1])
        carried = sums[-1] if goes_on else None
        done = at[:-1] if goes_on else at
        to[done] = (to[done] + sums[: len(done)]).to(to.dtype)


def _runs(M: int, H: int, dtype: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    """Runs of pairs whose rows fit into chunk_bytes: of hidden, of weight, and of their product,
    which is summed in float64.
    """
    size = max(1, chunk_bytes // (H * (3 * dtype.itemsize + 8)))
    return (slice(start, start + size) for start in range(0, M, size))
