"""Preference losses as their papers write them, one number at a time.

Nothing here is stable or fast, and nothing is shared with the library. The arithmetic is an
argument: torch differentiates a formula, and mpmath evaluates the same one with as many digits as
an extreme takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = Any  # a float64 tensor of one element, or an mpf
Pair = tuple["Sequence", "Sequence"]  # chosen, rejected


@dataclass(frozen=True)
class Arithmetic:
    """fixed: the same number without its gradient."""

    exp: Callable[[Number], Number]
    log: Callable[[Number], Number]
    fixed: Callable[[Number], Number]


def tensor(x: Number) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


TORCH = Arithmetic(
    lambda x: tensor(x).exp(), lambda x: tensor(x).log(), lambda x: tensor(x).detach()
)


@dataclass(frozen=True)
class Sequence:
    """The counted tokens of a completion, one number each, in nats.

    logps: log-probs under the policy. refs: under the reference. collisions: log sum_v p[v]^2.
    """

    logps: list[Number]
    refs: list[Number]
    collisions: list[Number] | None = None

    @property
    def n(self) -> int:
        return len(self.logps)

    @property
    def S(self) -> Number:
        return sum(self.logps)

    @property
    def R(self) -> Number:
        return sum(self.refs)

    @property
    def r(self) -> Number:
        return self.S - self.R

    def per_token(self, x: Number) -> Number:
        """x / n; 0 for a completion without tokens."""
        return x / self.n if self.n else 0 * x

    def up_to(self, length: int, alpha: float) -> Number:
        """The log-ratio, whose tokens from `length` on count alpha."""
        parts = [p - q for p, q in zip(self.logps, self.refs, strict=True)]
        return sum(parts[:length]) + alpha * sum(parts[length:])


def sigmoid(x: Number, M: Arithmetic) -> Number:
    return 1 / (1 + M.exp(-x))


def log_sigmoid(x: Number, M: Arithmetic) -> Number:
    return M.log(sigmoid(x, M))


def relu(x: Number) -> Number:
    return x if x > 0 else 0 * x


# A pair's loss: a is preferred to b.


def logistic(x: Number, M: Arithmetic, smoothing: float = 0.0) -> Number:
    """Of a margin; with smoothing, "conservative DPO" (E. Mitchell's note on it, 2023)."""
    if not smoothing:
        return -log_sigmoid(x, M)
    return -(1 - smoothing) * log_sigmoid(x, M) - smoothing * log_sigmoid(-x, M)


def dpo(a: Sequence, b: Sequence, M: Arithmetic, *, beta, smoothing=0.0) -> Number:
    """arXiv 2305.18290, equation 7."""
    return logistic(beta * (a.r - b.r), M, smoothing)


def robust(a, b, M, *, beta, smoothing) -> Number:
    """arXiv 2403.00409."""
    x = beta * (a.r - b.r)
    kept, flipped = -log_sigmoid(x, M), -log_sigmoid(-x, M)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def hinge(a, b, M, *, beta) -> Number:
    """arXiv 2309.06657."""
    return relu(1 - beta * (a.r - b.r))


def ipo(a, b, M, *, beta) -> Number:
    """arXiv 2310.12036, equation 17, on log-ratios per token."""
    return (a.per_token(a.r) - b.per_token(b.r) - 1 / (2 * beta)) ** 2


def exo(a, b, M, *, beta, smoothing) -> Number:
    """arXiv 2402.00856, equation 16, for two completions: a reverse KL of two-point laws."""
    p = sigmoid(beta * (a.r - b.r), M)
    q = sigmoid(-beta * (a.r - b.r), M)
    return p * M.log(p / (1 - smoothing)) + q * M.log(q / smoothing)


def nca(a, b, M, *, beta) -> Number:
    """arXiv 2402.05369."""
    x, y = beta * a.r, beta * b.r
    return -log_sigmoid(x, M) - log_sigmoid(-x, M) / 2 - log_sigmoid(-y, M) / 2


def bco_pair(a, b, M, *, beta, shift=0.0) -> Number:
    """arXiv 2404.04656, whose delta is the shift."""
    return -log_sigmoid(beta * a.r - shift, M) - log_sigmoid(-(beta * b.r - shift), M)


def sppo(a, b, M, *, beta) -> Number:
    """arXiv 2405.00675, equation 4.7, for a probability of 1 that the chosen one wins."""
    return (a.r - 1 / (2 * beta)) ** 2 + (b.r + 1 / (2 * beta)) ** 2


def apo_zero(a, b, M, *, beta) -> Number:
    """arXiv 2408.06266, equation 7, up to a constant."""
    return 1 - sigmoid(beta * a.r, M) + sigmoid(beta * b.r, M)


def apo_down(a, b, M, *, beta) -> Number:
    """arXiv 2408.06266, equation 8, up to a constant."""
    return sigmoid(beta * a.r, M) + 1 - sigmoid(beta * (a.r - b.r), M)


def discopop(a, b, M, *, beta, temperature=0.05) -> Number:
    """arXiv 2406.08414, equation 5."""
    x = beta * (a.r - b.r)
    share = sigmoid(x / temperature, M)
    return -log_sigmoid(x, M) * (1 - share) + M.exp(-x) * share


def dpo_norm(a, b, M, *, beta) -> Number:
    """Log-ratios per token in DPO (Tulu 3, arXiv 2411.15124)."""
    return logistic(beta * (a.per_token(a.r) - b.per_token(b.r)), M)


def f_dpo(a, b, M, *, slope, beta) -> Number:
    """arXiv 2309.16240: beta (f'(ratio of a) - f'(ratio of b)), slopes of log-ratios."""
    return logistic(beta * (slope(a.r, M) - slope(b.r, M)), M)


def forward_slope(r: Number, M: Arithmetic) -> Number:
    """f(t) = -log t + t - 1: f'(t) = 1 - 1 / t."""
    return 1 - 1 / M.exp(r)


def jensen_shannon_slope(r: Number, M: Arithmetic) -> Number:
    """f(t) = t log t - (t + 1) log((t + 1) / 2): f'(t) = log(2 t / (t + 1))."""
    return M.log(2 * M.exp(r) / (M.exp(r) + 1))


def alpha_slope(alpha: float) -> Callable[[Number, Arithmetic], Number]:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)."""
    return lambda r, M: (M.exp(r) ** (alpha - 1) - 1) / (alpha - 1)


def ld_dpo(a, b, M, *, alpha, beta) -> Number:
    """arXiv 2409.06411: what is longer than the other one counts alpha."""
    shared = min(a.n, b.n)
    return logistic(beta * (a.up_to(shared, alpha) - b.up_to(shared, alpha)), M)


def wpo(a, b, M, *, beta) -> Number:
    """arXiv 2406.11827, equation 2: DPO times both weights, which have no gradient."""
    return M.fixed(aligned(a, M) * aligned(b, M)) * dpo(a, b, M, beta=beta)


def aligned(s: Sequence, M: Arithmetic) -> Number:
    """exp of the mean over tokens of log p - log sum_v p^2."""
    return M.exp(s.per_token(s.S - sum(s.collisions)))


def simpo(a, b, M, *, beta, gamma) -> Number:
    """arXiv 2405.14734, equation 6."""
    return logistic(beta * (a.per_token(a.S) - b.per_token(b.S)) - gamma, M)


def cpo(a, b, M, *, beta) -> Number:
    """arXiv 2401.08417, equation 3."""
    return logistic(beta * (a.S - b.S), M)


def alphapo(a, b, M, *, beta, alpha, gamma) -> Number:
    """arXiv 2501.03884."""
    x, y = (1 - M.exp(s.per_token(s.S)) ** -alpha for s in (a, b))
    return logistic(beta * (x / alpha - y / alpha) - gamma, M)


def odds(a, b, M, *, beta) -> Number:
    """arXiv 2403.07691, equation 7."""
    p, q = (M.exp(s.per_token(s.S)) for s in (a, b))
    return -beta * log_sigmoid(M.log((p / (1 - p)) / (q / (1 - q))), M)


# The loss of a list of pairs.

Loss = Callable[[list[Pair], Arithmetic], Number]


def mean(pair_loss: Callable, **options) -> Loss:
    return lambda pairs, M: sum(pair_loss(a, b, M, **options) for a, b in pairs) / len(pairs)


def likelihood(pairs: list[Pair], M: Arithmetic) -> Number:
    """The mean over all tokens of the chosen of -log p."""
    return -sum(a.S for a, _ in pairs) / sum(a.n for a, _ in pairs)


def total(*weighted: tuple[float, Loss]) -> Loss:
    return lambda pairs, M: sum(weight * loss(pairs, M) for weight, loss in weighted)


def aot(*, beta: float, smoothing: float = 0.0) -> Loss:
    """arXiv 2406.05882: the margins of the policy and of the reference, each in order."""

    def loss(pairs: list[Pair], M: Arithmetic) -> Number:
        policy = sorted(a.S - b.S for a, b in pairs)
        reference = sorted(a.R - b.R for a, b in pairs)
        gaps = [p - q for p, q in zip(policy, reference, strict=True)]
        return sum(logistic(beta * gap, M, smoothing) for gap in gaps) / len(pairs)

    return loss


def aot_unpaired(*, beta: float, smoothing: float = 0.0) -> Loss:
    """arXiv 2406.05882: the log-ratios of the chosen and of the rejected, each in order."""

    def loss(pairs: list[Pair], M: Arithmetic) -> Number:
        chosen, rejected = sorted(a.r for a, _ in pairs), sorted(b.r for _, b in pairs)
        gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
        return sum(logistic(beta * gap, M, smoothing) for gap in gaps) / len(pairs)

    return loss


# The loss of single sequences, some of them desirable.

Judged = tuple[Sequence, bool]


def kto(
    judged: list[Judged],
    mismatched: list[Sequence],
    M: Arithmetic,
    *,
    beta: float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Number:
    """arXiv 2402.01306, equation 7: the loss is lambda_y - v, the point of reference is fixed."""
    z = M.fixed(sum(s.r for s in mismatched) / len(mismatched)) if mismatched else 0
    z = relu(z)
    parts = [
        desirable * (1 - sigmoid(beta * (s.r - z), M))
        if good
        else undesirable * (1 - sigmoid(beta * (z - s.r), M))
        for s, good in judged
    ]
    return sum(parts) / len(parts)


def bco(judged: list[Judged], M: Arithmetic, *, beta: float, shift: float = 0.0) -> Number:
    """arXiv 2404.04656."""
    parts = [-log_sigmoid((1 if good else -1) * (beta * s.r - shift), M) for s, good in judged]
    return sum(parts) / len(parts)


def apo_zero_unpaired(judged: list[Judged], M: Arithmetic, *, beta: float) -> Number:
    """arXiv 2408.06266, equation 7, of one sequence at a time."""
    parts = [sigmoid((-1 if good else 1) * beta * s.r, M) for s, good in judged]
    return sum(parts) / len(parts)
