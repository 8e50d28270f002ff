"""What every op means, in plain torch. Forward only: autograd derives the gradients.

    z[n, v]     = softcap(scale * rounded(hidden[n] . weight[v] + bias[v])) / temperature[n]
    rounded(x)  = the nearest number of a narrower dtype, with the slope of x; or x
    softcap(x)  = c * tanh(x / c), or x where c is 0
    lse[n]      = log sum_v exp z[n, v]
    logprobs[n] = z[n, labels[n]] - lse[n]
    entropy[n]  = lse[n] - sum_v p[n, v] z[n, v]        p = exp(z - lse)
    top[n]      = max_v z[n, v] - lse[n]

top is for comparing with logprobs, and the ops give it no gradient. Rounding keeps the order, so
that logprobs <= top, and the two are equal where the label has the largest logit.

Labels here are all inside the vocabulary: the ops leave ignored tokens out before they come here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What logits may be rounded to; logits() takes the place in here, as csrc/loops.h has it.
ROUNDED = (None, torch.bfloat16, torch.float16)
# The estimators of KL, by the number that kl() takes.
K1, K2, K3, ABS = 1, 2, 3, 4
# The divergences, by the number that slopes() takes.
REVERSE, FORWARD, JSD, ALPHA, TOTAL_VARIATION = 1, 2, 3, 4, 5
# The entry whose set, alone, is the whole vocabulary: no sampler kept a part of it.
WHOLE_VOCABULARY = -1
# Where one of two probabilities is 0, the slopes take their log-ratio for so many nats.
INFINITE = 100.0
# Exponents of the log-ratio are held here: exp of it, and sums of such, are finite in float32.
EXPONENT = 80.0


def acc_dtype(*tensors: Tensor) -> torch.dtype:
    """What sums are formed in: float64 where an input is float64, float32 for everything else."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in acc_dtype of them all: half precision is for storing, not for computing."""
    dtype = acc_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    temperature: Tensor,  # [N]
    scale: float,
    softcap: float,
    rounding: int = 0,
) -> Tensor:  # [N, V]
    """The logits that are sampled from, in the accumulator dtype."""
    dtype = acc_dtype(hidden, weight)
    raw = hidden.to(dtype) @ weight.to(dtype).T
    return from_products(raw, bias, temperature[:, None], scale, softcap, rounding)


def from_products(
    raw: Tensor,  # hidden . weight, in the accumulator dtype
    bias: Tensor | None,  # broadcasts to raw
    temperature: Tensor,  # broadcasts to raw
    scale: float,
    softcap: float,
    rounding: int = 0,
) -> Tensor:
    """What a head does to the products of hidden and weight: bias, rounding, scale, softcap,
    temperature.
    """
    z = raw if bias is None else raw + bias.to(raw.dtype)
    z = rounded(z, rounding) if rounding else z
    z = z * scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature.to(raw.dtype)


def rounded(z: Tensor, rounding: int) -> Tensor:
    """To nearest, ties to even; the gradient is that of z. float64 goes by way of float32."""
    exact = z.detach()
    # z + (near - z) is near, bit by bit: numbers so close have an exact difference.
    away = exact.to(ROUNDED[rounding]).to(z.dtype) - exact
    return z + away.masked_fill(~exact.isfinite(), 0.0)


def statistics(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [N, V], labels [N] -> logprobs, entropy, lse, top, each [N]."""
    logp = torch.log_softmax(z, dim=-1)
    # A token with p = 0 adds nothing, also where its log p is -inf.
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    logprobs = logp.gather(-1, labels[:, None])[:, 0]
    return logprobs, entropy, torch.logsumexp(z, dim=-1), logp.amax(-1)


def linear_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N]
    scale: float,
    softcap: float,
    rounding: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top, each [N]."""
    return statistics(logits(hidden, weight, bias, temperature, scale, softcap, rounding), labels)


def kept_logprobs(
    z: Tensor,  # [N, V]
    labels: Tensor,  # [N] int64
    kept: Tensor,  # [M] int64: the kept entries of one token after another
    cu_kept: Tensor,  # [N + 1] int64: where those of each token begin
) -> Tensor:  # [N]
    """z[n, label] - log sum_{v in kept[n]} exp z[n, v]: logprobs under the sampling mask."""
    token = torch.arange(len(labels), device=z.device).repeat_interleave(cu_kept.diff())
    excluded = torch.ones_like(z, dtype=torch.bool).index_put((token, kept), z.new_zeros(()).bool())
    lse = torch.logsumexp(z.masked_fill(excluded, -torch.inf), dim=-1)
    return z.gather(-1, labels[:, None])[:, 0] - lse


def kept_at(
    kept: Tensor,  # [M]
    cu_kept: Tensor,  # [N + 1]
    rows: Tensor | slice,  # [n] int64, or a slice
) -> tuple[Tensor, Tensor]:  # [m], [n + 1]
    """The kept sets of the tokens at rows; a slice without steps copies none."""
    if isinstance(rows, slice) and rows.step in (None, 1):
        first, last, _ = rows.indices(len(cu_kept) - 1)
        cu_kept = cu_kept[first : max(first, last) + 1]
        return kept[int(cu_kept[0]) : int(cu_kept[-1])], cu_kept - cu_kept[0]
    lengths = cu_kept.diff()[rows]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    moved = (cu_kept[:-1][rows] - offsets[:-1]).repeat_interleave(lengths)
    return kept[moved + torch.arange(len(moved), device=kept.device)], offsets


def wrong_offsets(offsets: Tensor, M: int, name: str = "cu_kept", of: str = "kept") -> str | None:
    """What is wrong with the first offset that does not rise, or begin at 0 and end at M."""
    steps = offsets.diff()
    if offsets[0] != 0:
        return f"{name}[0] is {int(offsets[0])}, and must be 0"
    if (falls := steps < 0).any():
        n = int(falls.nonzero()[0])
        return (
            f"{name}[{n + 1}] is {int(offsets[n + 1])}, below {name}[{n}], "
            f"which is {int(offsets[n])}"
        )
    if offsets[-1] != M:
        return f"{name}[{len(steps)}] is {int(offsets[-1])}, and must be the length of {of}, {M}"
    return None


def logits_logprobs(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, each [N], from logits that are already there."""
    z = logits.to(acc_dtype(logits)) / temperature[:, None]
    return statistics(z, labels)[:3]


def kl(d: Tensor, kind: int) -> Tensor:
    """An estimate of KL(policy, reference) from d = logprobs - ref_logprobs.

    k3's exponent is held at 20 nats, so that a token the policy has all but abandoned cannot make
    the sum infinite.
    """
    if kind == K1:
        return d
    if kind == K2:
        return 0.5 * d * d
    if kind == K3:
        return torch.expm1((-d).clamp(max=20.0)) + d
    return d.abs()


def kl_slope(d: Tensor, kind: int) -> Tensor:
    """The derivative of kl(d, kind); for k3 beyond 20 nats the one at the bound, not 0."""
    if kind == K1:
        return torch.ones_like(d)
    if kind == K2:
        return d
    if kind == K3:
        return -torch.expm1((-d).clamp(max=20.0))
    return d.sign()


class Pair(NamedTuple):
    """Two probabilities of each entry, and how they differ: exactly, also where they hardly do."""

    s: Tensor
    t: Tensor
    d: Tensor  # log s - log t; 0 where both probabilities are 0, infinite where one is
    delta: Tensor  # s - t

    @classmethod
    def of(cls, logs: Tensor, logt: Tensor, d: Tensor | None = None) -> "Pair":
        """d: the log-ratio, where more is known of it than logs - logt.

        The smaller comes from the larger: an error of either's normalisation is then one of both,
        and cancels between slopes.
        """
        d = logs - logt if d is None else d
        d = d.where((logs != logt) | (logs != -torch.inf), 0.0)
        below = d < 0
        larger, apart = torch.where(below, logt, logs).exp(), -d.abs()
        smaller, between = larger * apart.exp(), larger * torch.expm1(apart)
        s, t = torch.where(below, smaller, larger), torch.where(below, larger, smaller)
        delta = torch.where(below, between, -between)
        return cls(s, t, d, delta)


def slopes(pair: Pair, kind: int, parameter: float) -> tuple[Tensor, Tensor]:
    """dc / d log s and dc / d log t of the terms c of a divergence, which are also their sum.

    A divergence is D = sum_v c(s, t), homogeneous of degree 1, so that c is the sum of its slopes.
    Of the terms with this D, these are 0 with both slopes where s = t: nothing cancels there, and
    an error in the normalisation of s or t is one of second order.
    """
    s, t, d, delta = pair
    d = d.nan_to_num(nan=torch.nan, posinf=INFINITE, neginf=-INFINITE)
    if kind == REVERSE:
        return s * d, -delta
    if kind == FORWARD:
        return delta, -t * d
    if kind == JSD:
        # log(m / s) and log(m / t), m = (1 - beta) s + beta t
        less, more = (1 - parameter) * torch.expm1(d), parameter * torch.expm1(-d)
        to_s = torch.where(d < 0, torch.log1p(less) - d, torch.log1p(more))
        return (parameter - 1) * s * to_s, -parameter * t * (to_s + d)
    if kind == ALPHA:
        a = parameter
        most = EXPONENT / max(abs(a), abs(a - 1), 1.0)
        d = d.clamp(-most, most)
        return s * torch.expm1((a - 1) * d) / (a - 1), -t * torch.expm1(a * d) / a
    return 0.5 * s * d.sign(), -0.5 * t * d.sign()


def is_infinite(d: Tensor, kind: int, parameter: float) -> Tensor:
    """Where a term of the divergence is: its log-ratio d is, and that counts. [...] bool"""
    if kind == REVERSE or (kind == ALPHA and parameter >= 1):
        return d == torch.inf
    if kind == FORWARD or (kind == ALPHA and parameter <= 0):
        return d == -torch.inf
    return torch.zeros_like(d, dtype=torch.bool)
