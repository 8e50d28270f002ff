"""The KL of Gaussians, where everything about k1, k2 and k3 is known.

    policy N(0, 1),  reference N(mu, sigma^2),  x a sample of the policy
    d(x) = log policy - log reference = c + b x + a x^2
    a = (1 / sigma^2 - 1) / 2,  b = -mu / sigma^2,  c = log sigma + mu^2 / (2 sigma^2)

Means and variances of k1 = d and k2 = d^2 / 2 are moments of polynomials. E[e^-d] = 1, so that k3
is unbiased, and var k3 = E[e^-2d] - 1 + var d + 2 (E_ref[d] - E[d]), the first two terms being the
chi-square divergence of the reference from the policy. It is infinite from sigma^2 = 2 on, where
the KL is 0.097 nats. For mu alone (sigma = 1) and K = mu^2 / 2:

    var k1 = 2 K        E[k2] = K + K^2 / 2,  var k2 = 2 K^2 + 2 K^3        var k3 = e^2K - 1 - 2 K
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import KL, kl_penalty
from fused_rl.study.part import Numbers

ESTIMATORS = (KL.K1, KL.K2, KL.K3)
FAMILIES = ("shifted", "sharper", "flatter")
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
# Samples are good where the standard error, and a bias, are at most this part of the KL.
ERROR = 0.1
BATCH = 10_000


class Moments(NamedTuple):
    """Of an estimate from one sample; a variance may be inf."""

    mean: float
    variance: float


@dataclass(frozen=True)
class Pair:
    """A policy N(0, 1) and its reference N(mu, sigma^2)."""

    mu: float = 0.0
    sigma: float = 1.0

    @property
    def kl(self) -> float:
        """KL(policy, reference), in nats."""
        return math.log(self.sigma) + (1 + self.mu**2) / (2 * self.sigma**2) - 0.5

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """c, b, a: of 1, x and x^2 in d."""
        precision = 1 / self.sigma**2
        c = math.log(self.sigma) + self.mu**2 * precision / 2
        return c, -self.mu * precision, (precision - 1) / 2

    def logprobs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log policy and log reference of samples [...], but for one constant that both have."""
        return -(x**2) / 2, -(((x - self.mu) / self.sigma) ** 2) / 2 - math.log(self.sigma)

    def estimates(self, x: Tensor, kind: KL) -> Tensor:
        """[...]: k1, k2 or k3 of samples of the policy."""
        return kl_penalty(*self.logprobs(x), value=kind)

    def moments(self, kind: KL) -> Moments:
        """Mean and variance over samples of the policy, in closed form."""
        d = list(self.coefficients)
        d2 = times(d, d)
        variance = mean(d2) - mean(d) ** 2
        if kind is KL.K1:
            return Moments(mean(d), variance)
        if kind is KL.K2:
            half = mean(d2) / 2
            return Moments(half, mean(times(d2, d2)) / 4 - half**2)
        return Moments(mean(d), self.chi_square + variance - 2 * (self.forward_kl + mean(d)))

    @property
    def forward_kl(self) -> float:
        """KL(reference, policy): minus the mean of d under the reference."""
        c, b, a = self.coefficients
        return -(c + b * self.mu + a * (self.mu**2 + self.sigma**2))

    @property
    def chi_square(self) -> float:
        """E[e^-2d] - 1; inf where the reference is too wide."""
        c, b, a = self.coefficients
        width = 1 + 4 * a
        if width <= 0:
            return math.inf
        return math.expm1(2 * b**2 / width - 2 * c - math.log(width) / 2)

    @property
    def negative(self) -> float:
        """The share of samples whose k1 is negative."""
        c, _, a = self.coefficients
        if self.sigma == 1:
            return math.erfc(self.mu / 2 / math.sqrt(2)) / 2
        end = math.sqrt(-c / a / 2)
        return math.erfc(end) if a < 0 else math.erf(end)


def times(p: list[float], q: list[float]) -> list[float]:
    """The product of polynomials, by their coefficients from the constant on."""
    product = [0.0] * (len(p) + len(q) - 1)
    for i, x in enumerate(p):
        for j, y in enumerate(q):
            product[i + j] += x * y
    return product


def mean(polynomial: list[float]) -> float:
    """Of a polynomial of a standard normal number: E[x^2n] = (2n - 1)!!."""
    even = polynomial[::2]
    return sum(c * math.prod(range(1, 2 * n, 2)) for n, c in enumerate(even))


def pair(family: str, kl: float) -> Pair:
    """The pair with this KL: the reference `shifted`, or wider than a `sharper` policy, or narrower
    than a `flatter` one."""
    if family == "shifted":
        return Pair(mu=math.sqrt(2 * kl))
    # KL ~ log(sigma)^2 near 1, and grows as log(sigma) or as 1 / sigma^2.
    side = 1 if family == "sharper" else -1
    stretch = root(lambda s: Pair(sigma=math.exp(side * s)).kl - kl, 1e-6, 50.0)
    return Pair(sigma=math.exp(side * stretch))


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is negative at low > 0 and positive at high changes its sign."""
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return math.sqrt(low * high)


def samples(moments: Moments, kl: float) -> float | None:
    """Independent samples whose mean has a standard error of ERROR KL; None: no number of them."""
    if abs(moments.mean - kl) > ERROR * kl * (1 + 1e-9) or math.isinf(moments.variance):
        return None
    return max(1.0, moments.variance / (ERROR * kl) ** 2)


def row(family: str, kl: float) -> Numbers:
    """What one sample's estimates are at a KL: everything relative to it, in closed form."""
    chosen = pair(family, kl)
    found: Numbers = {"kl": kl, "mu": chosen.mu, "sigma": chosen.sigma, "negative": chosen.negative}
    for kind in ESTIMATORS:
        moments = chosen.moments(kind)
        finite = math.isfinite(moments.variance)
        found[kind.name.lower()] = {
            "bias": round((moments.mean - kl) / kl, 8) + 0.0,
            "std": math.sqrt(moments.variance) / kl if finite else None,
            "samples": samples(moments, kl),
        }
    return found


def quantiles(family: str, kl: float) -> Numbers:
    """Of each estimate over the KL, by an even grid over the policy's probability."""
    n = 100_000
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = torch.special.ndtri(even)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    chosen = pair(family, kl)
    found = {k.name.lower(): chosen.estimates(x, k).quantile(at) / kl for k in ESTIMATORS}
    return {"kl": kl} | {name: values.tolist() for name, values in found.items()}


def sampled(seed: int, family: str, kl: float, repeats: int) -> Numbers:
    """What means of BATCH samples show, over so many repeats, relative to the KL.

    low, median, high: the 5, 50 and 95 % quantiles of the mean. near: the share of means within
    ERROR. std: that of all samples, which for k3 need not come near the true one. What k3 misses
    where e^-d comes of samples that are never drawn is 1 nat at most, for E[e^-d] is 1.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "gaussian", family, kl))
    chosen = pair(family, kl)
    x = torch.randn(repeats, BATCH, dtype=torch.float64, generator=generator)
    found: Numbers = {"family": family, "kl": kl}
    for kind in ESTIMATORS:
        estimates = chosen.estimates(x, kind) / kl
        means = estimates.mean(-1)
        at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        found[kind.name.lower()] = {
            **dict(zip(("low", "median", "high"), means.quantile(at).tolist(), strict=True)),
            "near": ((means - 1).abs() <= ERROR).double().mean().item(),
            "std": estimates.std().item(),
        }
    return found


def seed_of(*case: object) -> int:
    """A seed for each case, the same in every process."""
    return zlib.crc32(repr(case).encode())


# In nats. The first is the library's; of trainers, that of values comes with one of log-ratios.
CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponent held at 20": lambda d: k3(d),
    "value within 10": lambda d: k3(d.clamp(-20, 20)).clamp(-10, 10),
    "log-ratio within 20": lambda d: k3(d.clamp(-20, 20)),
    "log-ratio within 10": lambda d: k3(d.clamp(-10, 10)),
}


def k3(d: Tensor) -> Tensor:
    """k3 of log-ratios, as the library forms it."""
    return kl_penalty(d, torch.zeros_like(d), value=KL.K3)


def clamped(family: str, kl: float) -> Numbers:
    """The bias of k3 that is clamped, relative to the KL, by the trapezoidal rule."""
    x = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    density = (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
    logprobs, ref_logprobs = pair(family, kl).logprobs(x)
    d = logprobs - ref_logprobs
    biases = {
        name: round((torch.trapezoid(density * clamp(d), x).item() - kl) / kl, 8) + 0.0
        for name, clamp in CLAMPS.items()
    }
    return {"family": family, "kl": kl, "bias": biases}


def limits() -> Numbers:
    """KLs, in nats, at which the estimators change places; None: they do not, up to 10 nats."""

    def crossing(family: str, first: KL, second: KL) -> float | None:
        def gap(kl: float) -> float:
            chosen = pair(family, kl)
            return chosen.moments(first).variance - chosen.moments(second).variance

        return root(gap, 1e-4, 10.0) if gap(10.0) > 0 else None

    found: Numbers = {
        f"{first.name.lower()} over {second.name.lower()}": {
            family: crossing(family, first, second) for family in FAMILIES
        }
        for first, second in ((KL.K3, KL.K1), (KL.K2, KL.K1))
    }

    def biased(family: str) -> float:
        def excess(kl: float) -> float:
            return abs(pair(family, kl).moments(KL.K2).mean - kl) - ERROR * kl

        return root(excess, 1e-5, 10.0)

    found["k2 biased"] = {family: biased(family) for family in FAMILIES}
    found["k3 without variance"] = {
        "shifted": None,
        "sharper": Pair(sigma=math.sqrt(2)).kl,
        "flatter": None,
    }
    return found
