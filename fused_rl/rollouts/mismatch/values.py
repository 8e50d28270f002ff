"""What the two log-probs of a token say together, wherever it stands: tell-tale patterns."""

from __future__ import annotations

import math

import torch

from fused_rl.kl.estimators import KL
from fused_rl.kl.log_ratios import BOUND
from fused_rl.rollouts.diagnosis.findings import Finding, Severity
from fused_rl.rollouts.mismatch.gaps import Counts, Gaps
from fused_rl.rollouts.mismatch.rounding import RoundingError

# Of float32, which both sides compute with at best.
LEAST = 1e-4
# What a pattern is not seen in.
FEW = 20
# Tokens that are all but certain to one side may have a log-prob of 0 on the other.
UNCERTAIN = -0.5
RARE = 0.01
ZEROS = 1e-3
# A spread so small beside the mean is that of a constant.
CONSTANT = 0.25
EXPLAINED = 0.3
ONE_SIDED = 0.98
# Standard errors, and variances of d, from which on a mean ratio is not 1.
SURE = 6.0
LARGE = 3.0


def unknown(counts: Counts) -> Finding | None:
    if not counts.unknown:
        return None
    share = f"{counts.unknown} of {counts.tokens} tokens have a NaN"
    if counts.unknown_of_trainer:
        return Finding(
            "unknown log-probs",
            f"{share}, {counts.unknown_of_trainer} of them of the trainer.",
            "The model is broken, or its inputs are: look for inf in logits and hidden states.",
            Severity.GRAVE,
        )
    if counts.unknown_but_certain >= 0.95 * counts.unknown:
        return Finding(
            "unknown log-probs",
            f"{share} of the engine, and the trainer is all but certain of them.",
            "Harmless: engines report so where the log-prob is 0. Such tokens have ratio 1.",
            Severity.NOTE,
        )
    return Finding(
        "unknown log-probs",
        f"{share} of the engine, where the trainer is not certain.",
        "Mask these tokens, or ask the engine why; truncated_weights gives them the weight 1.",
        Severity.NOTE if counts.unknown <= RARE * counts.tokens else Severity.WARNING,
    )


def infinite(counts: Counts) -> Finding | None:
    if not counts.infinite:
        return None
    ours = counts.infinite_of_trainer
    return Finding(
        "infinite log-probs",
        f"{counts.infinite} of {counts.tokens} tokens have a log-prob that is infinite, {ours} of "
        "them of the trainer: what was sampled cannot be.",
        "Look for masked vocabulary entries, a padded vocabulary, and ids of another tokenizer.",
        Severity.GRAVE,
    )


def positive(gaps: Gaps) -> Finding | None:
    ours, theirs = (int((x > 1e-3).sum()) for x in (gaps.logprobs, gaps.rollout))
    if not ours + theirs:
        return None
    return Finding(
        "no log-probs",
        f"{ours} of the trainer's log-probs and {theirs} of the engine's are above 0.",
        "Give log-probs: no probabilities, negated ones or logits.",
        Severity.GRAVE,
    )


def zero_tokens(gaps: Gaps) -> torch.Tensor:
    """[n] bool: one side says 0, and the other is not certain."""
    theirs = (gaps.rollout == 0) & (gaps.logprobs < UNCERTAIN)
    return theirs | ((gaps.logprobs == 0) & (gaps.rollout < UNCERTAIN))


def zeros(gaps: Gaps) -> Finding | None:
    found = zero_tokens(gaps)
    if not found.sum() > ZEROS * len(gaps):
        return None
    theirs = int((gaps.rollout[found] == 0).sum())
    return Finding(
        "zeros",
        f"{theirs} log-probs of the engine and {int(found.sum()) - theirs} of the trainer are 0, "
        "where the other side is not certain.",
        "Take tokens that were not sampled (tools, prompts, padding) out of loss_mask; an engine "
        "that decodes greedily reports 0, too.",
    )


def offset(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    mean, std = gaps.d.mean().item(), gaps.d.std(correction=0).item()
    if not abs(mean) >= LEAST or not std <= CONSTANT * abs(mean):
        return None
    return Finding(
        "offset",
        f"The trainer's log-probs are the engine's {mean:+.3g}, within {std:.1g} nats.",
        "Both sides normalise differently: look for a padded vocabulary, a kept set of constant "
        "mass, and what is added to log-probs on the way.",
    )


def temperature(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    """Another temperature: log p' = a log p + c, with c that of the token's context.

    In expectation d is then small, so that to first order d = (a - 1) (log p + entropy). The slope
    over all tokens is that over a context's, times the share of the variance of log p within
    contexts: a is at least that far from 1. Regressed on the mean of both sides, in which noise of
    either has no part: a slope s says a = (2 + s) / (2 - s).
    """
    d, x = gaps.d - gaps.d.mean(), gaps.logprobs + gaps.rollout
    x = (x - x.mean()) / 2
    together, spread, own = (d * x).mean().item(), (x * x).mean().item(), (d * d).mean().item()
    if gaps.mean_size < LEAST or not spread > 0 or not own > 0:
        return None
    slope, explained = together / spread, together**2 / (spread * own)
    balanced = abs(gaps.d.mean().item()) <= 0.5 * gaps.mean_size
    if not explained >= EXPLAINED or not (balanced or explained > 0.99) or abs(slope) >= 2:
        return None
    factor = (2 + slope) / (2 - slope)
    return Finding(
        "temperature",
        f"The difference follows the log-prob: the trainer's is {factor:.3g} times the engine's, "
        f"or further from 1, which explains {explained:.0%} of the variance.",
        f"Compare temperatures: the engine's is about {factor:.3g} times the trainer's, or its "
        "log-probs are reported before temperature (vLLM: logprobs_mode=processed_logprobs). "
        "2.303: another base of the logarithm.",
    )


def one_sided(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    """Of the tokens that are further apart than float32 explains, or than rounding does, all but
    none lie on one side. Two right answers cannot: E[exp d] is 1.
    """
    for least in (LEAST, max(LEAST, rounding.p99)):
        far = gaps.d[gaps.sizes > least]
        if len(far) < max(FEW, 0.01 * len(gaps)):
            continue
        below = (far < 0).double().mean().item()
        if max(below, 1 - below) >= ONE_SIDED:
            return _sides(below, gaps.d.mean().item())
    return None


def mean_ratio(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    """E[exp d] is the trainer's mass on what can be sampled: 1, or less where a set was kept.

    It is more only where the engine's log-probs are not those that it sampled with, and then off by
    at most about the variance of d if they are those but for rounding.
    """
    ratios, k2 = gaps.d.clamp(-BOUND, BOUND).exp(), gaps.kl(KL.K2)
    mean, error = ratios.mean().item(), ratios.std().item() / math.sqrt(len(gaps))
    if abs(mean - 1) <= max(SURE * error, LARGE * 2 * k2, LEAST):
        return None
    said = f"The mean ratio is {mean:.4g}, with an error of {error:.1g}"
    if mean < 1:
        return Finding(
            "mean ratio",
            f"{said}: {1 - mean:.2%} of the trainer's mass lies where the engine does not sample.",
            "Replay what top-k, top-p or min-p kept (linear_kept_logprobs), or sample without; "
            "look for a padded vocabulary.",
        )
    return Finding(
        "mean ratio",
        f"{said}, and that of two distributions is 1 or less.",
        "The engine reports other log-probs than it sampled with: before temperature, penalties "
        "or kept sets.",
    )


def _sides(below: float, mean: float) -> Finding:
    mass = f"exp of the mean difference is {math.exp(min(mean, BOUND)):.4g}"
    if below > 0.5:
        return Finding(
            "one-sided",
            f"{below:.1%} of the tokens that differ are less likely to the trainer; {mass}.",
            "The engine renormalises over what top-k, top-p or min-p kept and the trainer does "
            "not: linear_kept_logprobs. Or the trainer's vocabulary is padded.",
        )
    return Finding(
        "one-sided",
        f"{1 - below:.1%} of the tokens that differ are more likely to the trainer; {mass}.",
        "The engine reports log-probs before top-k, top-p or min-p, and the trainer renormalises; "
        "or it reports others than it sampled with.",
    )
