"""Heads whose products are exact in float32, whatever the order of their sums, but not in 16 bits.

So all ways to form a logit have the same number to round, and must round it alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import LMHead
from fused_rl.ops import Head

ROUNDINGS = {torch.bfloat16: 1, torch.float16: 2}
IGNORED = -100


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape).double()


def random_head(
    N: int = 37,
    H: int = 24,
    V: int = 130,
    dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype = torch.bfloat16,
    *,
    transform: bool = True,
) -> Head:
    """Of multiples of 2^-10 below 2^12, in 7 bits each; logits of a standard deviation of 4 or so.

    transform: with a bias, a softcap, and temperatures. There is a scale in any case.
    """
    labels = torch.randint(0, V, (N,))
    labels[1::5] = IGNORED
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Head(
        whole(-3, 3, N, H).to(dtype),
        (whole(-127, 127, V, H) * 2.0 ** -whole(2, 10, V, H)).to(dtype),
        (whole(-127, 127, V) / 16).to(dtype) if transform else None,
        labels,
        (torch.rand(N) + 0.5 if transform else torch.ones(N)).to(wide),
        0.055,
        20.0 if transform else 0.0,
        ROUNDINGS[logits_dtype],
    )


def lm_head(head: Head, *leaves: Tensor | None, logits_dtype: torch.dtype | None = None) -> LMHead:
    """As users write it, of weight and bias in the place of its own."""
    weight, bias = leaves or head[1:3]
    names = {number: dtype for dtype, number in ROUNDINGS.items()}
    dtype = names.get(head.rounding) if logits_dtype is None else logits_dtype
    return LMHead(weight, bias, head.scale, head.softcap or None, logits_dtype=dtype)


def leaves_of(head: Head, *, trained: bool = True) -> list[Tensor | None]:
    """hidden, weight and bias that gather gradients."""
    needs = (True, trained, trained)
    pairs = zip(head[:3], needs, strict=True)
    return [None if t is None else t.clone().requires_grad_(n) for t, n in pairs]


class Exact(NamedTuple):
    logits: Tensor  # [N, V], after the temperature
    leaves: list[Tensor | None]

    def logp(self) -> Tensor:
        return torch.log_softmax(self.logits, -1)

    def entropy(self) -> Tensor:
        logp = self.logp()
        return -(logp.exp() * logp).sum(-1)


def exact(head: Head, *, rounds: bool = True) -> Exact:
    """In float64, by torch's own conversion, with the gradient of what is not rounded."""
    leaves = [None if t is None else t.double().requires_grad_() for t in head[:3]]
    hidden, weight, bias = leaves
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if rounds:
        (dtype,) = (dtype for dtype, number in ROUNDINGS.items() if number == head.rounding)
        z = z + (z.detach().float().to(dtype).double() - z.detach())
    z = z * head.scale
    z = torch.tanh(z / head.softcap) * head.softcap if head.softcap else z
    return Exact(z / head.temperature.double()[:, None], leaves)


def gradients(value: Tensor, leaves: list[Tensor | None], *, keep: bool = False) -> list[Tensor]:
    """keep: so that there may be others of the same graph."""
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return list(torch.autograd.grad(value, wanted, retain_graph=keep))


def assert_near(ours: Tensor, right: Tensor, budget: float) -> None:
    """By the largest number of them."""
    gap = (ours.double() - right).abs().max() / right.abs().max()
    assert gap <= budget, f"{gap:.1e}, over {budget:.1e}"
