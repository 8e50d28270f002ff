"""Where the tokens that differ stand: beside their neighbours, in few sequences, late."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from fused_rl.rollouts.diagnosis.findings import Finding, Severity
from fused_rl.rollouts.mismatch.gaps import Gaps, effective_share
from fused_rl.rollouts.mismatch.rounding import RoundingError

# How many times what rounding gives is still taken for it: hidden states are rounded, too.
ROUNDING = 3.0
BROKEN = 30.0
# Sequences so many times the middle one are apart, if they are few and hold most of it.
APART = 5.0
MOST_APART = 0.25
SHORTEST = 4
MOST_OF_IT = 0.5
# The effective share of tokens of such a sequence: one that is far off is no matter of sequences.
SPREAD = 0.1
GROWTH = 3.0
FEW_TOKENS = 0.01
SHOWN = 5
WEAK = 0.3


def beyond_rounding(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    times = rounding.times(gaps.mean_size)
    if not times > ROUNDING:
        return None
    return Finding(
        "beyond rounding",
        f"The mean difference, {gaps.mean_size:.3g} nats, is {times:.3g} times what rounding alone "
        f"gives, {rounding.mean:.3g}.",
        "Look at weight sync, temperature, kept sets, masks and chat template, the router, and "
        "quantised weights or caches, in this order; begin with the worst tokens.",
        Severity.GRAVE if times > BROKEN else Severity.WARNING,
    )


def shifted(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    """One side's log-probs are those of the tokens next to the other's."""
    together = (gaps.sequence.diff() == 0) & (gaps.token.diff() == 1)
    if together.sum() < 2 * SHORTEST:
        return None
    aligned = gaps.sizes[1:][together].mean().item()
    later = (gaps.logprobs[1:] - gaps.rollout[:-1])[together].abs().mean().item()
    earlier = (gaps.logprobs[:-1] - gaps.rollout[1:])[together].abs().mean().item()
    least = min(later, earlier)
    if not aligned > max(3 * least, 0.1):
        return None
    place = "after" if later < earlier else "before"
    return Finding(
        "shifted tokens",
        f"The engine's log-probs fit those of the trainer's tokens one place {place} them: the "
        f"mean difference is then {least:.3g} nats, not {aligned:.3g}.",
        "Align them: logits at t are of the token at t + 1.",
        Severity.GRAVE,
    )


def few_sequences(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    if gaps.sequences is None:
        return None
    total, tokens = gaps.sums(gaps.sizes), gaps.lengths
    long = (tokens >= SHORTEST).nonzero().squeeze(-1)
    if len(long) < 1 / MOST_APART:
        return None
    means = total[long] / tokens[long]
    spread = total[long] ** 2 / (tokens[long] * gaps.sums(gaps.sizes**2)[long])
    least = max(APART * means.median().item(), ROUNDING * rounding.mean)
    apart = long[(means > least) & (spread > SPREAD)]
    held = (total[apart].sum() / total.sum()).item()
    if not 0 < len(apart) <= MOST_APART * len(long) or held < MOST_OF_IT:
        return None
    order = apart[(total[apart] / tokens[apart]).argsort(descending=True)].tolist()
    more = ", ..." if len(order) > SHOWN else ""
    return Finding(
        "few sequences",
        f"{len(order)} of {len(tokens)} sequences hold {held:.0%} of the difference: "
        f"{', '.join(map(str, order[:SHOWN]))}{more}.",
        "Look for weights that changed while these were sampled, prompts that one side truncated, "
        "and tokens that were formed again from text.",
    )


def drift(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    """The difference grows with the token's place: four means, over quarters of all tokens."""
    if len(gaps) < 40 or gaps.token.max() < 8:
        return None
    # A few that are far off are no drift.
    sizes = gaps.sizes.clamp(max=gaps.sizes.sort().values[int(0.95 * len(gaps))].item())
    order = gaps.token.argsort(stable=True)
    quarters = [part.mean().item() for part in sizes[order].tensor_split(4)]
    grows = all(a < b for a, b in pairwise(quarters))
    first, last = quarters[0], quarters[-1]
    if not grows or last < GROWTH * first or not last > ROUNDING * rounding.mean:
        return None
    return Finding(
        "drift",
        f"The difference grows along the sequences: {', '.join(f'{q:.2g}' for q in quarters)} nats "
        "in the four quarters of the tokens.",
        "Compare position embeddings (RoPE scaling) and how the engine's KV cache is kept: fp8, "
        "sliding windows, reused prefixes of older weights.",
    )


def few_tokens(gaps: Gaps, rounding: RoundingError) -> Finding | None:
    if len(gaps) < 100:
        return None
    count = math.ceil(FEW_TOKENS * len(gaps))
    worst = gaps.sizes.topk(count).values
    held = (worst.sum() / gaps.sizes.sum()).item()
    if not held >= MOST_OF_IT or not worst.mean().item() > ROUNDING * rounding.max:
        return None
    return Finding(
        "few tokens",
        f"{count} of {len(gaps)} tokens hold {held:.0%} of the difference.",
        "A router that picks other experts does so, and a few ids that are not what was sampled; "
        "masked_weights or truncated_weights bound what they do.",
        Severity.NOTE,
    )


def weak_sequences(log_ratios: torch.Tensor) -> Finding | None:
    if len(log_ratios) < 1 / MOST_APART or not (share := effective_share(log_ratios)) < WEAK:
        return None
    return Finding(
        "few effective sequences",
        f"Weighted by the ratios of whole sequences, {len(log_ratios)} of them count as "
        f"{share * len(log_ratios):.1f}.",
        "Take ratios per token, or their geometric mean (Level.GEOMETRIC), for weights and masks.",
        Severity.NOTE,
    )
