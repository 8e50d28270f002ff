"""docs/images/mismatch.svg, for docs/losses.md: `make docs` runs this.

A rollout whose engine keeps its logits in bfloat16 and samples by top-p at 0.9, beside a trainer
that does neither: `fused-rl mismatch --picture` of it, with rounding simulated at the head.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

import fused_rl
from fused_rl.linear import rounding_differences
from fused_rl.mismatch import MismatchReport, mismatch_report
from fused_rl.study.mismatch import picture

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "mismatch.svg"
B, T, H, V = 16, 60, 128, 2000
TOP_P = 0.9


def rollout() -> tuple[Tensor, ...]:
    """hidden [B, T, H], weight [V, H], labels and the engine's log-probs [B, T]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator).bfloat16()
    # Some tokens are all but certain, others are not.
    sharp = 3 + 5 * torch.rand(B, T, 1, generator=generator)
    hidden = torch.randn(B, T, H, generator=generator) * sharp / math.sqrt(H)
    hidden = hidden.bfloat16()
    logits = fused_rl.LMHead(weight).logits(hidden).bfloat16().float()
    ranked = logits.softmax(-1).sort(-1, descending=True)
    kept = ranked.values.cumsum(-1) - ranked.values < TOP_P
    kept = torch.zeros_like(kept).scatter(-1, ranked.indices, kept)
    engine = logits.masked_fill(~kept, -math.inf).log_softmax(-1)
    labels = torch.multinomial(engine.exp().reshape(-1, V), 1, generator=generator).reshape(B, T)
    return hidden, weight, labels, engine.gather(-1, labels[..., None]).squeeze(-1)


def report() -> MismatchReport:
    """What is said of it."""
    hidden, weight, labels, rollout_logprobs = rollout()
    logprobs = fused_rl.linear_logprobs(hidden, weight, labels).logprobs
    errors = rounding_differences(hidden, weight, labels)
    return mismatch_report(logprobs, rollout_logprobs, rounding=errors)


if __name__ == "__main__":
    found = report()
    print(found)
    picture.write(PICTURE, found)
