"""Heads for the forward of sm_90, what it must make of them, and a merge in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import reference


def aligned(x: Tensor) -> Tensor:
    """A copy whose rows begin at multiples of 16 bytes."""
    return F.pad(x, (0, -x.shape[1] % 8))[:, : x.shape[1]]


class Case:
    """A head whose rows are padded to 16 bytes, so that any H can be described for TMA."""

    def __init__(self, N, H, V, dtype=torch.bfloat16, *, bias=False, softcap=0.0, spread=1.0):
        self.hidden, self.weight = (aligned(torch.randn(rows, H).to(dtype)) for rows in (N, V))
        self.bias = torch.randn(V).to(dtype) if bias else None
        # Some belong to no token of the vocabulary, one of them only in int64.
        self.labels = torch.randint(0, V, (N,))
        self.labels[1::5] = -100
        self.labels[3::7] = 2**32 + V // 2
        self.temperature = torch.rand(N) + 0.5
        self.scale, self.softcap, self.rounding = spread / math.sqrt(H), softcap, 0

    def to(self, device: str) -> Case:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        # A copy to a device closes the gaps between rows.
        self.hidden, self.weight = aligned(self.hidden), aligned(self.weight)
        return self

    @property
    def head(self) -> tuple:
        tensors = (self.hidden, self.weight, self.bias, self.labels, self.temperature)
        return (*tensors, self.scale, self.softcap, self.rounding)

    def logits(self) -> Tensor:
        """In float64, on the CPU."""
        tensors = (self.hidden, self.weight, self.bias, self.temperature)
        wide = (None if t is None else t.double().cpu() for t in tensors)
        return reference.logits(*wide, self.scale, self.softcap, self.rounding)

    def exact(self) -> Tensor:
        """The largest logit, lse and entropy, and the label's logit or 0: [4, N] fp64."""
        return self.statistics(self.logits())

    def of_products(self) -> Tensor:
        """The same from the vendor's product in float32, of a head without bias and softcap."""
        raw = torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32).double()
        return self.statistics((raw * self.scale / self.temperature[:, None]).cpu())

    def statistics(self, z: Tensor) -> Tensor:
        """Those of logits."""
        labels = self.labels.cpu()
        lse = z.logsumexp(-1)
        p = (z - lse[:, None]).exp()
        entropy = lse - (p * z.where(p > 0, 0.0)).sum(-1)
        inside = (labels >= 0) & (labels < z.shape[1])
        at = z.gather(1, labels.where(inside, 0)[:, None])[:, 0]
        return torch.stack([z.amax(-1), lse, entropy, at.where(inside, 0.0)])


def merged(partial: Tensor, unit: float) -> Tensor:
    """The same four from the parts of a running softmax: [4, N] fp64."""
    m, s, t, at_label = partial.double().cpu().unbind(1)
    top = m.amax(0)
    shift = (m - top).where(m > float("-inf"), -2000.0) * unit
    factor = shift.exp()
    total = (factor * s).sum(0)
    mean = (factor * (t * unit + shift * s)).sum(0) / total
    lse = top * unit + total.log()
    return torch.stack([top * unit, lse, total.log() - mean, at_label.sum(0) * unit])
