"""Predicted and measured milliseconds of the ways of a plan, by their names."""

from __future__ import annotations

import torch

from fused_rl.plan import steps
from fused_rl.plan.devices import CARDS
from fused_rl.plan.measured import COMMITS, MEASURED
from fused_rl.plan.memory import Plan, keeps_exponentials, own_bytes
from fused_rl.plan.time import Times, times


def predicted(p: Plan) -> dict[str, Times]:
    """Of each way; nothing without a card, and in other precisions than the half ones."""
    if p.device not in CARDS or p.dtype.itemsize != 2:
        return {}
    card, nhv = CARDS[p.device], 4 if p.frozen else 6
    shape = (p.tokens, p.hidden, p.vocabulary)
    two_passes = steps.two_passes(card, *shape, p.chunk_bytes)
    kept = keeps_exponentials(p.device, p.dtype, p.tokens)
    one_pass = (steps.stored if kept else steps.one_pass)(
        card, p.chunks, *shape[1:], trained=not p.frozen
    )
    if p.frozen:
        any_loss = steps.frozen(card, p.chunks, *shape[1:], stored=kept)
    elif ("linear_logprobs", 6) in ((way.name, way.nhv) for way in p.ways):
        any_loss = steps.stored(card, [p.tokens], *shape[1:], trained=True)
    else:
        any_loss = two_passes
    parts = {
        "eager torch, no gradient": steps.eager(card, *shape, 2),
        "linear_logprobs, no gradient": steps.no_gradient(card, *shape),
        "eager torch": steps.eager(card, *shape, nhv),
        "linear_logprobs": any_loss,
        "linear_policy_loss": two_passes if p.ways[-1].nhv == 8 else one_pass,
    }
    return {name: times(card, way) for name, way in parts.items()}


def measured(p: Plan) -> dict[str, float]:
    """Of the ways that bench/results has, on that card, at these sizes, with the usual chunks."""
    if p.dtype != torch.bfloat16 or p.chunk_bytes != own_bytes(p.device):
        return {}
    return MEASURED.get((p.device, p.tokens, p.hidden, p.vocabulary, p.frozen), {})


def origin(p: Plan) -> str:
    """What was measured: a commit, which need not be the one that is installed."""
    return (
        f"of the code at commit {COMMITS[p.device]} (bench/results/{p.device}-bfloat16.json), "
        "which may have taken other ways than those predicted; a step is GRPO's"
    )
