"""A world with a reward that has a flaw: all its sequences can be listed, and so summed over.

V tokens, T to a sequence. A policy is a small network of a prefix: with a state that adds up,
z[t] = sum of added[s, y_s] over s < t,

    hidden[t] = tanh(z[t] + place[t])        logits[t] = weight hidden[t] + bias

The gold reward is a quality, a sum over pairs of neighbours and over places, less what too many
FLATTERY tokens cost. The proxy sees the quality with a smooth error, and likes FLATTERY:

    gold = quality - COST k^2        proxy = quality + ERROR error + BONUS k

k is how many there are of the token, which the reference seldom says. Quality and error have mean 0
and deviation 1 under the reference. So proxy and gold agree where the reference goes, and disagree
far from it: what Gao, Schulman and Hilton (arXiv 2210.10760) call extremal Goodhart.

What is said of a distribution here, [V^T], is exact: sums over all sequences, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import LMHead

V, T, H = 8, 6, 32
FLATTERY = 0
COST, ERROR, BONUS = 0.03, 0.5, 1.5


class Policy(NamedTuple):
    """The parameters, float64: added [T, V, H], place [T, H], weight [V, H], bias [V]."""

    added: Tensor
    place: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def head(self) -> LMHead:
        """What hidden states are multiplied by."""
        return LMHead(self.weight, self.bias)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, T, H]: the states that predict tokens [B, T]."""
        added = self.added[torch.arange(T - 1), tokens[:, :-1]]
        state = torch.cat([torch.zeros_like(added[:, :1]), added.cumsum(1)], dim=1)
        return torch.tanh(state + self.place)

    @torch.no_grad()
    def sampled(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, T] tokens."""
        state = torch.zeros(count, H, dtype=torch.float64)
        tokens = []
        for t in range(T):
            logits = torch.tanh(state + self.place[t]) @ self.weight.T + self.bias
            tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
            state = state + self.added[t, tokens[-1]]
        return torch.stack(tokens, dim=1)

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """[V^T]: of every sequence, in the order of World.tokens."""
        state = torch.zeros(1, H, dtype=torch.float64)
        found = torch.zeros(1, dtype=torch.float64)
        for t in range(T):
            logits = torch.tanh(state + self.place[t]) @ self.weight.T + self.bias
            found = (found[:, None] + logits.log_softmax(-1)).reshape(-1)
            if t < T - 1:
                state = (state[:, None] + self.added[t]).reshape(-1, H)
        return found

    def copied(self) -> Policy:
        """The same, to be trained."""
        return Policy(*(p.clone().requires_grad_() for p in self))


class Point(NamedTuple):
    """Of a distribution: its KL from the reference, and expected rewards above the reference's."""

    kl: float
    proxy: float
    gold: float


class World:
    """A reference, two rewards, and what can be said of distributions.

    Attributes:
        tokens: [V^T, T].
        reference: a Policy.
        ref_logprobs: [V^T].
        proxy, gold: [V^T], less their means under the reference.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        bias = normal(V, scale=0.3)
        bias[FLATTERY] = -2.0
        weight = normal(V, H, scale=0.8 / math.sqrt(H))
        self.reference = Policy(normal(T, V, H, scale=0.7), normal(T, H), weight, bias)
        self.tokens = torch.cartesian_prod(*[torch.arange(V)] * T)
        self.ref_logprobs = self.reference.logprobs()
        quality, error = (self._smooth(normal(V, V), normal(T, V)) for _ in range(2))
        flattery = (self.tokens == FLATTERY).sum(-1).double()
        self.gold = self._centred(quality - COST * flattery.square())
        self.proxy = self._centred(quality + ERROR * error + BONUS * flattery)

    def _smooth(self, pairs: Tensor, places: Tensor) -> Tensor:
        """[V^T]: a sum over neighbours and places, with mean 0 and deviation 1."""
        pairs[FLATTERY], pairs[:, FLATTERY], places[:, FLATTERY] = 0.0, 0.0, 0.0
        score = pairs[self.tokens[:, :-1], self.tokens[:, 1:]].sum(-1)
        score = self._centred(score + places[torch.arange(T), self.tokens].sum(-1))
        return score / (self.ref_logprobs.exp() @ score.square()).sqrt()

    def _centred(self, values: Tensor) -> Tensor:
        return values - self.ref_logprobs.exp() @ values

    def index(self, tokens: Tensor) -> Tensor:
        """[B]: which of all sequences tokens [B, T] are."""
        return (tokens * V ** torch.arange(T - 1, -1, -1)).sum(-1)

    def point(self, logprobs: Tensor) -> Point:
        """Of a distribution [V^T]."""
        p = logprobs.exp()
        kl = (p * (logprobs - self.ref_logprobs)).where(p > 0, 0.0).sum().item()
        # A KL of 0 may come out below it.
        return Point(max(kl, 0.0), (p @ self.proxy).item(), (p @ self.gold).item())

    def tilted(self, beta: float) -> Tensor:
        """[V^T]: log-probs of what maximises proxy - beta KL: reference exp(proxy / beta) / Z."""
        return (self.ref_logprobs + self.proxy / beta).log_softmax(-1)

    def best_of(self, counts: Sequence[int]) -> list[Point]:
        """Of the sample with the highest proxy among n from the reference, for every n.

        A sequence is chosen if none of n is above it and not all are below: with F how probable a
        proxy up to its own is, it has F^n - (F - p)^n. No two sequences have the same proxy.
        """
        order = self.proxy.argsort()
        logprobs = self.ref_logprobs[order]
        below = logprobs.exp().cumsum(0).clamp(max=1.0)
        share = (logprobs.exp() / below).clamp(max=1 - 1e-16)
        found = []
        for n in counts:
            chosen = n * below.log() + torch.log(-torch.expm1(n * torch.log1p(-share)))
            found.append(self.point(torch.empty_like(chosen).index_copy(0, order, chosen)))
        return found
