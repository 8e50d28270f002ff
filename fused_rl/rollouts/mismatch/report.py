"""The report: how far the trainer's log-probs are from the engine's, and what explains it."""

from __future__ import annotations

import math
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.kl.estimators import KL
from fused_rl.rollouts.diagnosis.findings import Finding, Severity
from fused_rl.rollouts.mismatch import places, values
from fused_rl.rollouts.mismatch.gaps import Counts, Gaps, TokenGap, counted, effective_share
from fused_rl.rollouts.mismatch.rounding import LogitRounding, RoundingError

# A ratio beyond it, either way, is far.
FAR = 1.5
# Of what a finding says.
WIDTH = 96
_GRAVEST_FIRST = list(Severity)
_NUMBERS = ("mean_abs", "max_abs", "mean", "std", "k1", "k2", "k3", "far_fraction")


class MismatchReport(NamedTuple):
    """What mismatch_report found; str() says it in words, numbers() as JSON does.

    With d = logprobs - rollout_logprobs in nats, over the tokens whose two log-probs are finite:

    Args:
        tokens: that count; unknown and infinite of them have a NaN, or an infinite log-prob, and
            are in none of the numbers below.
        sequences: None where tokens were not told apart by sequence.
        mean_abs, max_abs, mean, std: of d. std is that of the log-ratio.
        k1, k2, k3: estimates of KL(rollout || trainer), nats per token. The rollout sampled, so
            k1 = mean(-d), k2 = mean(d^2) / 2, k3 = mean(expm1(d) - d); k1 and k3 are unbiased, and
            k3's exponent is held at 20.
        token_share: (sum w)^2 / (n sum w^2) of w = exp d: the effective share of the tokens.
        sequence_share: that of the sequences, w the product over a sequence's known tokens.
        far_fraction: of the tokens, those with a ratio above 1.5 or below 1 / 1.5.
        rounding: what rounding alone would give.
        worst: tokens with the largest |d|, and where they stand.
        findings: gravest first.
        sequence_log_ratios: [B] float64, sum of d over each sequence.
        logprobs, rollout_logprobs: [n] float64, of the known tokens.
        rounding_errors: drawn or simulated, any number, float64.
    """

    tokens: int
    unknown: int
    infinite: int
    sequences: int | None
    mean_abs: float
    max_abs: float
    mean: float
    std: float
    k1: float
    k2: float
    k3: float
    token_share: float
    sequence_share: float | None
    far_fraction: float
    rounding: RoundingError
    worst: tuple[TokenGap, ...]
    findings: tuple[Finding, ...]
    sequence_log_ratios: Tensor | None
    logprobs: Tensor
    rollout_logprobs: Tensor
    rounding_errors: Tensor

    @property
    def times_rounding(self) -> float:
        """mean_abs over what rounding alone gives, which is no less than 1e-6 nats."""
        return self.rounding.times(self.mean_abs)

    @property
    def verdict(self) -> str:
        """One line: whether rounding explains it."""
        if not len(self.logprobs):
            return "there is nothing to compare"
        if self.max_abs == 0:
            return "both sides say the same"
        if self.times_rounding > places.ROUNDING:
            return f"{self.times_rounding:.3g} times what rounding explains"
        size = "explained by rounding" if self.times_rounding > 0.1 else "less than rounding gives"
        if any(f.severity is not Severity.NOTE for f in self.findings):
            return f"{size} in size, but not in kind"
        return size

    def numbers(self) -> dict[str, Any]:
        """All of it but what is per token, for JSON: None for what is not a number."""
        left_out = ("logprobs", "rollout_logprobs", "rounding_errors")
        found = {n: value for n, value in self._asdict().items() if n not in left_out}
        if self.sequence_log_ratios is not None:
            found["sequence_log_ratios"] = self.sequence_log_ratios.tolist()
        found["rounding"] = self.rounding._asdict()
        found["worst"] = [{**t._asdict(), "difference": t.difference} for t in self.worst]
        found["findings"] = [
            {**finding._asdict(), "severity": finding.severity.value} for finding in self.findings
        ]
        found |= {"times_rounding": self.times_rounding, "verdict": self.verdict}
        return _finite(found)

    def __str__(self) -> str:
        known = len(self.logprobs)
        of = "" if self.sequences is None else f" of {self.sequences} sequences"
        apart = f"{self.unknown} more have a NaN, {self.infinite} are infinite"
        lines = [f"tokens       {known}{of}; {apart}"]
        if known:
            lines += self._lines()
        lines.append(f"verdict      {self.verdict}")
        for finding in self.findings:
            what = wrap(f"{finding.name}: {finding.evidence}", WIDTH) + wrap(finding.advice, WIDTH)
            heads = [finding.severity.value] + [""] * (len(what) - 1)
            lines += [f"{head:<13}{line}" for head, line in zip(heads, what, strict=True)]
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        far = f"{self.far_fraction:.2%} of the ratios are beyond {FAR:g}"
        share = f"{self.token_share:.2%} of the tokens"
        if self.sequence_share is not None:
            share += f", {self.sequence_share:.2%} of the sequences"
        rounding, worst = self.rounding, self.worst[:3]
        shown = ", ".join(f"{t.difference:+.3g} at {list(t.at)}" for t in worst)
        lines = [
            f"difference   mean {self.mean:+.3g}, mean of |d| {self.mean_abs:.3g}, std "
            f"{self.std:.3g}, largest {self.max_abs:.3g} nats (trainer - engine)",
            f"KL           k1 {self.k1:.3g}, k2 {self.k2:.3g}, k3 {self.k3:.3g} nats per token "
            "(of rollout to trainer)",
            f"effective    {share}; {far}",
            f"rounding     mean of |d| {rounding.mean:.3g}, 99 % below {rounding.p99:.3g}, largest "
            f"{rounding.max:.3g} nats ({rounding.source})",
        ]
        return lines + ([f"worst        {shown}"] if self.max_abs and shown else [])


@torch.no_grad()
def mismatch_report(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    loss_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    rounding: Tensor | LogitRounding | None = None,
    worst: int = 5,
) -> MismatchReport:
    """How far the trainer's log-probs are from the engine's, and what explains it.

    Two engines that compute the same policy differ by rounding. What is beyond that has a cause,
    and many causes have a pattern: each that is seen is a Finding, with its numbers and what to do.
    All numbers are float64, formed on the host.

    After "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al.,
    2025); J. Schulman, "Approximating KL divergence" (2020), for k1, k2, k3.

    Args:
        logprobs: [B, T] or [N], any floating dtype: of the trained policy before its step, at the
            tokens that were sampled, in nats.
        rollout_logprobs: the same shape: of the engine that sampled.
        loss_mask: the same shape, bool or 0/1: tokens that count; None: all.
        cu_seqlens: [B + 1] int, where the sequences of [N] begin; None: [N] has none.
        rounding: errors of log-probs by rounding alone, of any shape, as
            linear.rounding_differences gives them; or a model of them; None: LogitRounding().
        worst: how many tokens to name.

    Raises:
        ValueError: shapes or dtypes that do not fit; tensors without values.
    """
    checks.is_integer("worst", worst)
    checks.at_least("worst", worst, 0)
    gaps, counts = counted(logprobs, rollout_logprobs, loss_mask, cu_seqlens)
    errors, explained = _rounding(rounding, gaps)
    numbers = _numbers(gaps) if len(gaps) else dict.fromkeys(_NUMBERS, math.nan)
    sums, share = None, None
    if gaps.sequences is not None:
        sums = gaps.sums(gaps.d)
        share = effective_share(sums[gaps.lengths > 0])
    return MismatchReport(
        tokens=counts.tokens,
        unknown=counts.unknown,
        infinite=counts.infinite,
        sequences=gaps.sequences,
        **numbers,
        token_share=effective_share(gaps.d),
        sequence_share=share,
        rounding=explained,
        worst=tuple(map(gaps.gap, gaps.sizes.argsort(descending=True, stable=True)[:worst])),
        findings=_findings(gaps, counts, explained, sums),
        sequence_log_ratios=sums,
        logprobs=gaps.logprobs,
        rollout_logprobs=gaps.rollout,
        rounding_errors=errors,
    )


def _numbers(gaps: Gaps) -> dict[str, float]:
    return {
        "mean_abs": gaps.mean_size,
        "max_abs": gaps.sizes.max().item(),
        "mean": gaps.d.mean().item(),
        "std": gaps.d.std(correction=0).item(),
        **{kind.name.lower(): gaps.kl(kind) for kind in (KL.K1, KL.K2, KL.K3)},
        "far_fraction": (gaps.sizes > math.log(FAR)).double().mean().item(),
    }


def _rounding(rounding: Any, gaps: Gaps) -> tuple[Tensor, RoundingError]:
    """Errors by rounding alone, and what they come to."""
    if rounding is None:
        rounding = LogitRounding()
    if isinstance(rounding, LogitRounding):
        errors = rounding.differences(gaps.rollout)
        return errors, RoundingError.of(errors, str(rounding))
    checks.require(
        isinstance(rounding, Tensor),
        lambda: (
            "rounding must be a tensor of errors (linear.rounding_differences) or a "
            f"LogitRounding, got {checks.shown(rounding)}"
        ),
    )
    checks.is_floating("rounding", rounding)
    errors = rounding.detach().cpu().double().reshape(-1)
    return errors, RoundingError.of(errors, f"simulated at {len(errors)} tokens")


def _findings(
    gaps: Gaps, counts: Counts, rounding: RoundingError, sums: Tensor | None
) -> tuple[Finding, ...]:
    """What is seen, gravest first; of patterns that look alike, the first."""
    found = [values.unknown(counts), values.infinite(counts), values.positive(gaps)]
    found.append(values.zeros(gaps))
    rest = gaps.where(~values.zero_tokens(gaps))
    if len(rest) >= values.FEW:
        alike = (places.shifted, values.offset, values.temperature, values.one_sided)
        alike += (values.mean_ratio,)
        placed = (places.few_sequences, places.drift, places.few_tokens)
        for judges in (alike, placed, (places.beyond_rounding,)):
            found.append(next(filter(None, (judge(rest, rounding) for judge in judges)), None))
    if sums is not None:
        found.append(places.weak_sequences(sums[gaps.lengths > 0]))
    present = [finding for finding in found if finding is not None]
    return tuple(sorted(present, key=lambda finding: _GRAVEST_FIRST.index(finding.severity)))


def _finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
