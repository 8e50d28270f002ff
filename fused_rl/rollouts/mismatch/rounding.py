"""What rounding an engine's logits alone does to log-probs, by a model of it.

An engine that keeps logits z in bfloat16 rounds each to the nearest of 8 significant bits. In the
octave 2^e <= |z| < 2^(e + 1) these lie ulp = 2^(e - 7) apart, so that the error e_v of an entry is
at most half of it, a relative 2^-8, and uniform: neighbouring logits have nothing to do with each
other's last bits. To first order, with p the probabilities and y the token,

    error of logprobs[y] = e_y - sum_v p_v e_v = (1 - p_y) e_y - sum_{v != y} p_v e_v

The second term is a mean over what is not y, (1 - p_y) times one of weights that add up to 1. Its
variance is (1 - p_y)^2 ulp^2 / 12 times C, the chance that two draws from the others are the same:
0 where they are many, 1 where there is one rival. C is not known from log-probs; it is taken as
1/2. So the standard deviation is off by at most a factor 1.23 either way (sqrt(1 + C) beside
sqrt(1.5)):

    error of logprobs[y] = (1 - p_y) ulp (u_1 - sqrt(1/2) u_2)      u uniform in [-1/2, 1/2]

Logits of several tokens lie in several octaves. So |z| is drawn for each token, log-uniform over an
octave around `magnitude`, and the mean error grows steadily with it, not in steps of 2.

What it assumes: the logits that have probability are of about that magnitude, and of one size at
one token; the trainer's are not rounded; hidden states are the same on both sides. A token that is
all but certain has no error, whatever its logits are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks

# C of the module's docstring: the chance that two draws from the others are the same entry.
COLLISION = 0.5
# Few tokens are drawn several times: quantiles of a handful of errors would say little.
LEAST_DRAWS = 4096
# In nats: of log-probs in float32, where nothing else is rounded.
FLOAT32 = 1e-6


@dataclass(frozen=True)
class LogitRounding:
    """Errors of log-probs where the engine's logits are rounded, by the model of its module.

    Args:
        magnitude: of the logits that have probability, |z|. The default is usual for language
            models; LMHead.logits shows a model's.
        dtype: of the engine's logits.

    Raises:
        ValueError: a magnitude that is not positive, or a dtype that does not round.
    """

    magnitude: float = 16.0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        checks.is_positive("magnitude", self.magnitude)
        checks.require(
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point,
            lambda: f"dtype must be that of the engine's logits, got {checks.shown(self.dtype)}",
        )

    def differences(self, logprobs: Tensor) -> Tensor:
        """Drawn errors of tokens with these log-probs [n]: [n k] float64, the same every time."""
        certain = logprobs.double().clamp(max=0).exp()
        certain = certain.repeat(math.ceil(LEAST_DRAWS / max(len(certain), 1)))
        generator = torch.Generator(device="cpu").manual_seed(0)
        options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        own, others, octave = torch.rand(3, len(certain), **options) - 0.5
        exponent = (math.log2(self.magnitude) + octave).floor()
        ulp = torch.finfo(self.dtype).eps * torch.exp2(exponent)
        return (1 - certain) * ulp * (own - math.sqrt(COLLISION) * others)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"a model of {dtype} logits of about {self.magnitude:g}"


class RoundingError(NamedTuple):
    """|error| of log-probs by rounding alone, in nats: its mean, 99 % quantile and maximum."""

    mean: float
    p99: float
    max: float
    source: str

    @classmethod
    def of(cls, differences: Tensor, source: str) -> RoundingError:
        """Of errors [n]; NaN says nothing, and of none at all the numbers are NaN."""
        sizes = differences.double().abs()
        sizes = sizes[sizes.isfinite()].sort().values
        if not len(sizes):
            return cls(math.nan, math.nan, math.nan, source)
        p99 = sizes[math.ceil(0.99 * len(sizes)) - 1]
        return cls(sizes.mean().item(), p99.item(), sizes[-1].item(), source)

    def times(self, size: float) -> float:
        """How many times the mean a size is; float32 rounds in any case."""
        return size / max(self.mean, FLOAT32)
