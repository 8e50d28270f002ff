"""What every op means, in plain torch. Forward only: autograd derives the gradients.

    z[n, v]     = softcap(scale * (hidden[n] . weight[v] + bias[v])) / temperature[n]
    softcap(x)  = c * tanh(x / c), or x where c is 0
    lse[n]      = log sum_v exp z[n, v]
    logprobs[n] = z[n, labels[n]] - lse[n]
    entropy[n]  = lse[n] - sum_v p[n, v] z[n, v]        p = exp(z - lse)
    top[n]      = max_v z[n, v] - lse[n]

top is for comparing with logprobs, and the ops give it no gradient. Rounding keeps the order, so
that logprobs <= top, and the two are equal where the label has the largest logit.

Labels here are all inside the vocabulary: the ops leave ignored tokens out before they come here.
"""

import torch
from torch import Tensor

# The estimators of KL, by the number that kl() takes.
K1, K2, K3, ABS = 1, 2, 3, 4


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
) -> Tensor:  # [N, V]
    """The logits that are sampled from, in the accumulator dtype."""
    dtype = acc_dtype(hidden, weight)
    raw = hidden.to(dtype) @ weight.to(dtype).T
    return from_products(raw, bias, temperature[:, None], scale, softcap)


def from_products(
    raw: Tensor,  # hidden . weight, in the accumulator dtype
    bias: Tensor | None,  # broadcasts to raw
    temperature: Tensor,  # broadcasts to raw
    scale: float,
    softcap: float,
) -> Tensor:
    """What a head does to the products of hidden and weight: bias, scale, softcap, temperature."""
    z = raw if bias is None else raw + bias.to(raw.dtype)
    z = z * scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature.to(raw.dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, top, each [N]."""
    return statistics(logits(hidden, weight, bias, temperature, scale, softcap), labels)


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
