"""The KL of categorical policies over a vocabulary of 32768, exact, from samples, and rounded.

States of several scales make prefixes of several entropies, as in text: at some the next token is
all but certain, at others it is open. The policy differs from its reference by noise on the head,
or by a temperature. Everything is formed in float64 but what is rounded on purpose, and that is
rounded from float64, so that other processors round alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import Divergence, kl_penalty, linear_divergence, linear_logprobs_at
from fused_rl.study.gaussians import ERROR, ESTIMATORS, seed_of
from fused_rl.study.part import Numbers

V, H = 32768, 64
# The standard deviation of a prefix's logits, but for a factor of each prefix's own.
SCALES = {"open": 3.0, "peaked": 8.0}


@dataclass(frozen=True)
class Case:
    """A policy and its reference.

    Args:
        seed: of states and heads.
        scale: a key of SCALES.
        change: "noise", on the head, or "temperature", of the policy: it is sharper.
        size: the standard deviation of the noise in parts of that of the head, or the temperature.
        prefixes, tokens: how many states there are, and how many tokens each is sampled.
    """

    seed: int
    scale: str
    change: str
    size: float
    prefixes: int
    tokens: int = 64


@dataclass(frozen=True)
class Policies:
    """Both sides of a case: states [N, H], heads [V, H] and the policy's temperature."""

    hidden: Tensor
    head: Tensor
    ref_head: Tensor
    temperature: float = 1.0

    @classmethod
    def of(cls, case: Case) -> Policies:
        """The same states and reference for all cases of a seed and a scale."""
        generator = torch.Generator().manual_seed(seed_of(case.seed, "vocabulary", case.scale))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        ref_head, noise = normal(V, H) / H**0.5, normal(V, H) / H**0.5
        factors = (0.3 * normal(case.prefixes, 1)).exp()
        hidden = SCALES[case.scale] * factors * normal(case.prefixes, H)
        if case.change == "temperature":
            return cls(hidden, ref_head, ref_head, case.size)
        return cls(hidden, ref_head + case.size * noise, ref_head)

    def logits(self) -> tuple[Tensor, Tensor]:
        """[N, V]: the policy's, and the reference's."""
        return self.hidden @ self.head.T / self.temperature, self.hidden @ self.ref_head.T

    def sampled(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """[N, tokens]: log-probs of both sides at tokens of the policy."""
        cumulative = self.logits()[0].softmax(-1).cumsum(-1)
        draws = torch.rand(len(self.hidden), tokens, generator=generator, dtype=torch.float64)
        ids = torch.searchsorted(cumulative, draws).clamp(max=V - 1)
        policy = linear_logprobs_at(self.hidden, self.head, ids, temperature=self.temperature)
        return policy.logprobs, linear_logprobs_at(self.hidden, self.ref_head, ids).logprobs

    def exact(self) -> Tensor:
        """[N]: KL(policy, reference) at each prefix."""
        return linear_divergence(
            *(self.hidden, self.head, self.hidden, self.ref_head),
            divergence=Divergence.REVERSE,
            temperature=self.temperature,
            teacher_temperature=1.0,
        ).divergence


def compared(case: Case) -> Numbers:
    """The KL of a case, and how far one token's estimate and one prefix's exact KL are from it.

    For each estimator: bias and std over the KL, `prefixes`: the part of the variance that is the
    spread of prefixes, which the exact KL has too; `samples`: independent tokens whose mean has a
    standard error of 10 %, None where the bias is larger; `sampled`: the mean of sampled tokens.
    All but the last are sums over the vocabulary.
    """
    policies = Policies.of(case)
    exact = policies.exact()
    kl = exact.mean().item()
    logp, logq = (z.log_softmax(-1) for z in policies.logits())
    p = logp.exp()
    generator = torch.Generator().manual_seed(seed_of(case))
    sampled = policies.sampled(case.tokens, generator)
    between = exact.var(correction=0).item()
    found: Numbers = {
        **{"scale": case.scale, "change": case.change, "size": case.size, "kl": kl},
        "entropy": -(p * logp).sum(-1).mean().item(),
        "negative": (p * (logp < logq)).sum(-1).mean().item(),
        "exact": {"std": between**0.5 / kl, "samples": max(1.0, between / (ERROR * kl) ** 2)},
    }
    for kind in ESTIMATORS:
        k = kl_penalty(logp, logq, value=kind)
        means = (p * k).sum(-1)
        within = (p * (k - means[:, None]) ** 2).sum(-1).mean().item()
        spread = means.var(correction=0).item()
        bias = round(means.mean().item() / kl - 1, 8) + 0.0
        needed = max(1.0, (within + spread) / (ERROR * kl) ** 2)
        found[kind.name.lower()] = {
            "bias": bias,
            "std": (within + spread) ** 0.5 / kl,
            "prefixes": spread / (within + spread),
            "samples": needed if abs(bias) <= ERROR else None,
            "sampled": kl_penalty(*sampled, value=kind).mean().item() / kl,
        }
    return found


def rounded_logprobs(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probs of logits that were rounded, in float32."""
    return logits.to(dtype).double().log_softmax(-1).float()


def exact_logprobs(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probs that are themselves rounded, of exact logits."""
    return logits.log_softmax(-1).to(dtype)


BF16, F32 = torch.bfloat16, torch.float32
# What is stored of the policy, and what of the reference.
ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reference's logits float32": (
        lambda z: exact_logprobs(z, torch.float64),
        lambda z: rounded_logprobs(z, F32),
    ),
    "float32": (
        lambda z: rounded_logprobs(z, F32),
        lambda z: rounded_logprobs(z, F32),
    ),
    "bf16 log-probs": (
        lambda z: exact_logprobs(z, BF16),
        lambda z: exact_logprobs(z, BF16),
    ),
    "bf16 logits": (
        lambda z: rounded_logprobs(z, BF16),
        lambda z: rounded_logprobs(z, BF16),
    ),
    "reference's log-probs bf16": (
        lambda z: rounded_logprobs(z, F32),
        lambda z: exact_logprobs(z, BF16),
    ),
    "reference's logits bf16": (
        lambda z: rounded_logprobs(z, F32),
        lambda z: rounded_logprobs(z, BF16),
    ),
}


def rounded(case: Case) -> Numbers:
    """The mean of each estimate of a token, where log-probs were rounded, in nats.

    The mean is over the policy's exact probabilities. "exp in float32" and "exp in bf16" are k3 as
    exp(-d) - 1 + d, every step of it rounded, of float32 and of bf16 log-probs. negative: the share
    of tokens whose k3 is.
    """
    policies = Policies.of(case)
    logits = policies.logits()
    p = logits[0].softmax(-1)
    found: Numbers = {
        **{"scale": case.scale, "size": case.size, "kl": policies.exact().mean().item()},
        "rounding": {},
    }

    def average(k: Tensor) -> float:
        return (p * k.double()).sum(-1).mean().item()

    for name, (of_policy, of_reference) in ROUNDINGS.items():
        sides = of_policy(logits[0]), of_reference(logits[1])
        found["rounding"][name] = {
            kind.name.lower(): average(kl_penalty(*sides, value=kind)) for kind in ESTIMATORS
        }
    for name, dtype in (("exp in float32", F32), ("exp in bf16", BF16)):
        logp, logq = (exact_logprobs(z, dtype) for z in logits)
        gap = logq - logp
        k3 = gap.double().exp().to(dtype) - 1 - gap
        found["rounding"][name] = {"k3": average(k3), "negative": average(k3 < 0)}
    return found
