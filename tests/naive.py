"""Every loss a second time, written from its paper: one token after another, one sequence after
another, with Python's branches and scalars, and nothing imported from the library.

A formula is (x, l, A) -> loss of a token: x its log-ratio, l its log-prob, both scalar tensors with
gradient, A a number. A level says what x is; a mean is (tokens, i) -> weight of a token of sequence
i. `loss` puts the three together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tokens:
    """A padded batch: [B, T] each. Where mask is False there may be anything."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    def sequences(self) -> list[list[tuple[int, int]]]:
        B, T = self.mask.shape
        return [[(i, t) for t in range(T) if self.mask[i, t]] for i in range(B)]

    def log_ratio(self, at: tuple[int, int]) -> Tensor:
        return self.logprobs[at] - self.old[at]

    def advantage(self, at: tuple[int, int]) -> float:
        return float(self.advantages[at])


# Levels: what x is at each counted token.


def token(tokens: Tokens) -> dict[tuple[int, int], Tensor]:
    return {at: tokens.log_ratio(at) for places in tokens.sequences() for at in places}


def product(tokens: Tokens) -> dict[tuple[int, int], Tensor]:
    found = {}
    for places in tokens.sequences():
        total = sum(tokens.log_ratio(at) for at in places)
        found |= {at: total for at in places}
    return found


def sequence(tokens: Tokens) -> dict[tuple[int, int], Tensor]:
    lengths = [len(places) for places in tokens.sequences()]
    return {at: total / lengths[at[0]] for at, total in product(tokens).items()}


def sequence_token(tokens: Tokens) -> dict[tuple[int, int], Tensor]:
    means = sequence(tokens)
    return {
        at: mean.item() + tokens.logprobs[at] - tokens.logprobs[at].item()
        for at, mean in means.items()
    }


def gmpo(tokens: Tokens, low: float, high: float) -> dict[tuple[int, int], Tensor]:
    found = {}
    for places in tokens.sequences():
        total = 0.0
        for at in places:
            x, A = tokens.log_ratio(at), tokens.advantage(at)
            if A > 0 and x > high:
                x = torch.tensor(high, dtype=x.dtype)
            elif A < 0 and x < -low:
                x = torch.tensor(-low, dtype=x.dtype)
            total = total + x
        found |= {at: total / len(places) for at in places}
    return found


# Formulas.


def ppo(x, l, A, low=0.2, high=0.2, dual=None, delta=None):  # noqa: E741
    r = torch.exp(x)
    first = r if delta is None else torch.clamp(r, max=delta)
    gain = torch.min(first * A, torch.clamp(r, 1 - low, 1 + high) * A)
    if dual is not None and A < 0:
        gain = torch.max(gain, torch.tensor(dual * A, dtype=x.dtype))
    return -gain


def unclipped(x, l, A):  # noqa: E741
    return -torch.exp(x) * A


def reinforce(x, l, A):  # noqa: E741
    return -l * A


def cispo(x, l, A, ratio_min=0.0, ratio_max=5.0):  # noqa: E741
    return -min(max(math.exp(x.item()), ratio_min), ratio_max) * A * l


def sapo(x, l, A, positive=1.0, negative=1.05):  # noqa: E741
    tau = positive if A > 0 else negative
    return -A * 4 / tau / (1 + torch.exp(-tau * (torch.exp(x) - 1)))


def aspo(x, l, A, low=0.2, high=0.2, dual=3.0):  # noqa: E741
    r, grow = math.exp(x.item()), torch.exp(l - l.item())
    if A > 0:
        if r > 1 + high:
            return torch.tensor(-A / (1 + high), dtype=x.dtype)
        return -A * min(1 / r, dual) * grow
    if r < 1 - low:
        return torch.tensor(-A * (1 - low), dtype=x.dtype)
    return -A * min(r, dual) * grow


def vespo(x, l, A, positive=(2.0, 3.0), negative=(3.0, 2.0)):  # noqa: E741
    k, rate = positive if A >= 0 else negative
    w = math.exp(min(max(x.item(), math.log(1e-8)), 20.0))
    return -math.exp(rate) * w**k * math.exp(-rate * w) * A * l


def dppo_tv(x, l, A, low=0.2, high=0.2):  # noqa: E741
    moved = math.exp(l.item()) - math.exp((l - x).item())
    inside = moved <= high if A > 0 else moved >= -low
    return -A * min(math.exp(x.item()), 20.0) * l * inside


def dppo_kl(x, l, A, low=0.05, high=0.05):  # noqa: E741
    p, old = math.exp(l.item()), math.exp((l - x).item())
    kl = old * math.log(old / p) + (1 - old) * math.log((1 - old) / (1 - p))
    inside = (kl <= high or p <= old) if A > 0 else (kl <= low or p >= old)
    return -A * min(math.exp(x.item()), 20.0) * l * inside


def dro(x, l, A, penalty=0.05):  # noqa: E741
    return -(l * A - 0.5 * penalty * x**2)


def kimi(x, l, A, tau=0.5):  # noqa: E741
    """The report's (r - mean r - tau x)^2, over 2 tau."""
    return (A - tau * x) ** 2 / (2 * tau)


# Losses of all tokens at once, where tokens are chosen by covariance.


def covariances(tokens: Tokens) -> dict[tuple[int, int], float]:
    places = [at for one in tokens.sequences() for at in one]
    mean_A = sum(tokens.advantage(at) for at in places) / max(len(places), 1)
    mean_l = sum(tokens.logprobs[at].item() for at in places) / max(len(places), 1)
    return {
        at: (tokens.advantage(at) - mean_A) * (tokens.logprobs[at].item() - mean_l) for at in places
    }


def highest(found: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """The first come first among equals."""
    return sorted(found, key=lambda at: -found[at])[:count]


def clip_cov(tokens: Tokens, low: float, high: float, fraction: float) -> dict:
    """Clip at 0.2 either way."""
    all_of_them = covariances(tokens)
    candidates = {}
    for at, covariance in all_of_them.items():
        r, A = math.exp(tokens.log_ratio(at).item()), tokens.advantage(at)
        clipped = (A > 0 and r > 1.2) or (A < 0 and r < 0.8)
        if low < covariance < high and not clipped:
            candidates[at] = covariance
    dropped = highest(candidates, max(int(fraction * len(all_of_them)), 1))
    return {
        at: ppo(tokens.log_ratio(at), tokens.logprobs[at], tokens.advantage(at))
        * (at not in dropped)
        for at in all_of_them
    }


def kl_cov(tokens: Tokens, coef: float, fraction: float) -> dict:
    all_of_them = covariances(tokens)
    held = highest(all_of_them, max(int(fraction * len(all_of_them)), 1))
    return {
        at: unclipped(tokens.log_ratio(at), None, tokens.advantage(at))
        + coef * tokens.log_ratio(at).abs() * (at in held)
        for at in all_of_them
    }


# Means.


def token_mean(tokens: Tokens, i: int) -> float:
    return 1 / sum(len(places) for places in tokens.sequences())


def token_sum(tokens: Tokens, i: int) -> float:
    return 1.0


def sequence_mean(tokens: Tokens, i: int) -> float:
    return 1 / len(tokens.sequences()) / len(tokens.sequences()[i])


def sequence_sum_mean(tokens: Tokens, i: int) -> float:
    return 1 / len(tokens.sequences())


def fixed_length_mean(tokens: Tokens, i: int, length: int = 11) -> float:
    return 1 / len(tokens.sequences()) / length


def length_weighted_mean(tokens: Tokens, i: int, length: int = 11) -> float:
    return len(tokens.sequences()[i]) / len(tokens.sequences()) / length


Level = Callable[[Tokens], dict]
Formula = Callable[[Tensor, Tensor, float], Tensor]
Mean = Callable[[Tokens, int], float]


def terms(tokens: Tokens, level: Level, formula: Formula) -> dict[tuple[int, int], Tensor]:
    return {
        at: formula(x, tokens.logprobs[at], tokens.advantage(at)) for at, x in level(tokens).items()
    }


def total(tokens: Tokens, found: dict[tuple[int, int], Tensor], mean: Mean) -> Tensor:
    start = tokens.logprobs.where(tokens.mask, 0.0).sum() * 0
    return sum((mean(tokens, at[0]) * term for at, term in found.items()), start)


def loss(tokens: Tokens, level: Level, formula: Formula, mean: Mean) -> Tensor:
    return total(tokens, terms(tokens, level, formula), mean)


def trl(tokens: Tokens, loss_type: str, by_sequence: bool = False) -> Tensor:
    """GRPOTrainer's loss of one process without accumulation, as its documentation states it.

    luspo at token level is that of the versions before 1.16, masked; Liger still has it so.

    epsilon 0.2 both ways, or 5 above for cispo; beta 0; longest completion 11.
    """
    B, T = tokens.mask.shape
    levels = (sequence if by_sequence else token)(tokens)
    w = product(tokens)
    of_type = {"cispo": cispo, "sapo": sapo, "vespo": vespo}.get(loss_type, ppo)
    sums = []
    for places in tokens.sequences():
        losses = [
            of_type(
                (w if loss_type == "vespo" else levels)[at],
                tokens.logprobs[at],
                tokens.advantage(at),
            )
            for at in places
        ]
        sums.append((sum(losses), len(losses)))
    items = sum(count for _, count in sums)
    if loss_type in ("grpo", "sapo"):
        return sum(of / max(count, 1) for of, count in sums) / B
    if loss_type == "dr_grpo":
        return sum(of for of, _ in sums) / (B * 11)
    if loss_type == "luspo" and by_sequence:
        # One number per sequence, times the sequence's length, and the mean over sequences.
        return sum(of / max(count, 1) * count for of, count in sums) / B
    if loss_type == "luspo":
        return sum(of * count for of, count in sums) / (B * T)
    return sum(of for of, _ in sums) / items
