"""What a model does around the product of its output layer, and how it shows.

    y = before * hidden . weight^T + bias          what the output layer gives
    z = softcap(after * y)[..., :tokens]           what the model makes of it, -inf at `never`

A scale before the cap and one behind it are one of each: k c tanh(s y / c) is our form with
after = k s and softcap = k c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A logit below this is one that the model rules out: no product comes near it.
RULED_OUT = -1e8


@dataclass(frozen=True)
class Recipe:
    """before multiplies the hidden states, after the layer's output; the first `tokens` rows of the
    vocabulary are kept (None: all), and the ids in `never` have a logit of -inf."""

    before: float = 1.0
    after: float = 1.0
    softcap: float | None = None
    tokens: int | None = None
    never: tuple[int, ...] = ()

    def parts(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float, float | None]:
        """weight, bias, scale and softcap of the head that does the same."""
        if self.tokens is not None:
            weight = weight[: self.tokens]
            bias = None if bias is None else bias[: self.tokens]
        return self.of_rows(weight, bias, 0)

    def of_rows(
        self, weight: Tensor, bias: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor | None, float, float | None]:
        """The same of some rows, from the vocabulary entry `start` on; those kept are not cut."""
        if bias is not None and self.before != 1.0:
            bias = bias / self.before
        # Every rank that has a part of the vocabulary has a bias, or none has.
        if self.never:
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            here = [v - start for v in self.never if start <= v < start + len(weight)]
            at = torch.tensor(here, dtype=torch.int64, device=weight.device)
            bias = bias.index_fill(0, at, -math.inf)
        return weight, bias, self.before * self.after, self.softcap

    def logits(self, y: Tensor) -> Tensor:
        """What becomes of the layer's output y [..., V]: [..., tokens], in the dtype of y."""
        z = y[..., : self.tokens] * self.after
        if self.softcap:
            z = torch.tanh(z / self.softcap) * self.softcap
        if self.never:
            z = z.index_fill(-1, torch.tensor(self.never, device=z.device), -math.inf)
        return z


def wide_numbers(like: Tensor) -> Tensor:
    """Numbers of both signs from 1e-3 to 3e4 in the place of a layer's output, in no order.

    float32, or float64 for float64: what is done to them is then seen without rounding.
    """
    i = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    size = 10 ** (7.5 * ((i * 0.6180339887498949) % 1.0) - 3.0)
    numbers = size.where(((i * 0.7548776662466927) % 1.0) < 0.5, -size)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return numbers.reshape(like.shape).to(dtype)


def found(y: Tensor, z: Tensor) -> Recipe | None:
    """The recipe by which y [..., V], as from wide_numbers, became z; None where none does."""
    tokens = z.shape[-1]
    if z.shape[:-1] != y.shape[:-1] or tokens > y.shape[-1]:
        return None
    out = (z < RULED_OUT).reshape(-1, tokens).all(0)
    y, z = (t[..., :tokens][..., ~out].double().flatten() for t in (y, z))
    after, softcap = _slope(y, z, y.abs() < 3e-3), None
    largest = y.abs() == y.abs().max()
    if z[largest].abs().max() < 0.5 * abs(after) * y[largest].abs().max():
        softcap = z.abs().max().item()
        bent = (z.abs() < 0.7 * softcap) & (y.abs() > 1e-2)
        after = _slope(y, softcap * torch.atanh(z / softcap), bent)
    never = tuple(out.nonzero()[:, 0].tolist())
    # Ruled out after a cap: a bias of -inf would be capped too.
    impossible = (never and softcap) or not math.isfinite(after)
    return None if impossible else Recipe(1.0, after, softcap, tokens, never)


def _slope(y: Tensor, z: Tensor, where: Tensor) -> float:
    ratios = (z / y)[where]
    return ratios.median().item() if ratios.numel() else math.nan


def factor(hidden: Tensor, into: Tensor) -> float | None:
    """b with into = b * hidden, both [..., H] of the same tokens; None where there is none."""
    if hidden.numel() != into.numel():
        return None
    x, h = into.double().flatten(), hidden.double().flatten()
    # A layer may be called with them rounded: mixed precision.
    if torch.equal(x, hidden.to(into.dtype).double().flatten()) or not h.any():
        return 1.0
    b = (x.dot(h) / h.dot(h)).item()
    eps = max(torch.finfo(t.dtype).eps for t in (into, hidden))
    near = (x - b * h).abs().max() <= max(1e-5, 2 * eps) * x.abs().max()
    return b if near else None


def like(recipe: Recipe, hint: Recipe, vocabulary: int, tolerance: float) -> Recipe:
    """recipe with the hint's exact numbers where they are as near as the measurement is exact."""
    before, after, softcap = recipe.before, recipe.after, recipe.softcap
    if before * after != 0 and math.isclose(before * after, hint.after, rel_tol=tolerance):
        after = hint.after / before
    if softcap and hint.softcap and math.isclose(softcap, hint.softcap, rel_tol=tolerance):
        softcap = float(hint.softcap)
    tokens = None if recipe.tokens == vocabulary else recipe.tokens
    return replace(recipe, after=after, softcap=softcap, tokens=tokens)


def agrees(recipe: Recipe, y: Tensor, z: Tensor) -> bool:
    """Whether z is what the recipe makes of wide numbers y, each to the precision of z."""
    ours, theirs = recipe.logits(y.double()), z.double()
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.masked_fill(theirs < RULED_OUT, -math.inf)
    eps = max(torch.finfo(z.dtype).eps, torch.finfo(torch.float32).eps)
    return torch.allclose(ours, theirs, rtol=16 * eps, atol=16 * eps)


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference in log-probability of two logits [..., V], and what rounding allows.

    The first is inf where shapes differ; NaN in both places is no difference.
    """
    if ours.shape != theirs.shape:
        return math.inf, 0.0
    eps = max(torch.finfo(t.dtype).eps for t in (ours, theirs))
    theirs = theirs.double().masked_fill(theirs < RULED_OUT, -math.inf)
    a, b = (t.double().log_softmax(-1) for t in (ours, theirs))
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max().item()
    size = theirs.abs().masked_fill(~theirs.isfinite(), 0.0).max().item()
    return gap, 1e-4 + 4 * eps * size
