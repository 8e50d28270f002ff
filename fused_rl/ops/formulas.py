"""The formulas that the operators share in plain torch; those of the forward pass are reference.py.

dz[n, v]   = dlogprobs[n] (1[v = label] - p) - dentropy[n] p (log p + entropy[n])
draw[n, v] = dz[n, v] (1 - (z temperature / softcap)^2) scale / temperature[n]
"""

import torch
from torch import Tensor

from fused_rl import reference
from fused_rl.ops.record import Head, Known, Statistics, Upstream


def statistics(z: Tensor, labels: Tensor) -> Statistics:
    """reference.statistics, with lse in float64."""
    logprobs, entropy, _, top = reference.statistics(z, labels)
    return Statistics(logprobs, entropy, _lse(z, top), top)


def _lse(z: Tensor, top: Tensor) -> Tensor:
    """[N] float64, from the largest logit and log_sum = -top; -inf where every logit is."""
    largest = z.amax(-1).double()
    return (largest - top.double()).where(largest != -torch.inf, largest)


def at(rows: Tensor, record: tuple) -> tuple:
    """A record of tensors [N, ...] at some of the tokens."""
    return record._make(t[rows] for t in record)


def live(upstream: Upstream, labels: Tensor, ignore_index: int) -> Tensor:  # [N] bool
    """The tokens that count and have a gradient; NaN is one."""
    return (labels != ignore_index) & ((upstream.dlogprobs != 0) | (upstream.dentropy != 0))


def log_probabilities(z: Tensor, known: Known) -> Tensor:
    """z - lse where z [N, V'] is not all of a token's logits, in the dtype of z.

    Logits so large that they lie 64 apart or more leave log_sum no place in lse = max + log_sum.
    But then only those that tie with the largest have a probability, so that log_sum is the
    entropy, and lse rounds to the largest.
    """
    rounded = known.lse.to(z.dtype)
    apart = 128 / torch.finfo(z.dtype).eps
    rest = (known.lse - rounded).to(z.dtype)
    rest = rest.where(known.lse.abs() < apart, known.entropy.to(z.dtype))
    return (z - rounded[:, None]) - rest[:, None]


def log_softmax(z: Tensor, known: Known) -> Tensor:
    """log p [N, V] of all of a token's logits, or of a part of them whose own lse is another.

    An lse of large logits has lost digits of log_sum: where it is that of z, z has them.
    """
    logp = torch.log_softmax(z, -1)
    own = _lse(z, logp.amax(-1))
    outside = known.lse - own
    alike = outside.abs() <= 4 * torch.finfo(torch.float64).eps * own.abs()
    # A part of nothing but -inf has no softmax of its own.
    logp.masked_fill_(z == -torch.inf, -torch.inf)
    return logp.sub_(outside.masked_fill(alike, 0.0).to(z.dtype)[:, None])


def softmax_gradient(
    upstream: Upstream,
    entropy: Tensor,
    logp: Tensor,  # [N, V], or some columns of it
    labels: Tensor,  # those outside the columns add nothing
) -> Tensor:
    """dz [N, V]."""
    dlogprobs, dentropy = upstream
    p = logp.exp()
    # An entry with p = 0 has no gradient, also where its log p is -inf.
    surprise = logp.masked_fill(logp == -torch.inf, 0.0) + entropy[:, None]
    dz = -p * (dlogprobs[:, None] + dentropy[:, None] * surprise)
    here = (labels >= 0) & (labels < logp.shape[1])
    return dz.scatter_add(-1, labels.where(here, 0)[:, None], dlogprobs.where(here, 0.0)[:, None])


def raw_gradient(
    upstream: Upstream,
    entropy: Tensor,
    head: Head,  # of these tokens, with labels counted from the first of the columns
    z: Tensor,  # [N, V], or some columns of it
    logp: Tensor,  # beside z
) -> Tensor:
    """draw, the gradient of hidden . weight^T, [N, V]."""
    return of_product(softmax_gradient(upstream, entropy, logp, head.labels), head, z)


def of_product(dz: Tensor, head: Head, z: Tensor) -> Tensor:
    """The gradient of hidden . weight^T from that of the logits z, [N, V] each."""
    if head.softcap:
        dz = dz * (1 - (z * head.temperature[:, None] / head.softcap) ** 2)
    return dz * (head.scale / head.temperature[:, None])


def add_gradients(
    upstream: Upstream,
    known: Known,
    head: Head,
    z: Tensor,  # [N, V]
    dweight: Tensor,
    dbias: Tensor,
) -> Tensor:
    """dhidden of a chunk of tokens; adds to dweight and dbias, unless those are empty."""
    draw = raw_gradient(upstream, known.entropy, head, z, log_softmax(z, known))
    return add_products(draw, head, dweight, dbias)


def add_products(draw: Tensor, head: Head, dweight: Tensor, dbias: Tensor) -> Tensor:
    """dhidden from draw [N, V]; adds to dweight, or its last columns, and dbias, unless empty."""
    if dweight.numel():
        beside = head.hidden[:, head.hidden.shape[1] - dweight.shape[1] :]
        dweight += draw.T @ beside.to(draw.dtype)
    if dbias.numel():
        dbias += draw.sum(0)
    return draw @ head.weight.to(draw.dtype)
