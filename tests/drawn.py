"""Batches that hypothesis draws, and what the library and naive.py make of them."""

import hypothesis.strategies as st
import naive
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from fused_rl import PolicyLoss, TokenBatch, TokenStats

# Sums of these are exact, so that ties are ties in whatever order one adds.
RATIOS = (0.0, 0.0, 0.125, -0.125, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0)
ADVANTAGES = (1.0, -1.0, 0.0, 0.5, -2.5, 3.0)


def examples(count: int) -> settings:
    """The same ones in every run, however slow the machine."""
    # How fast examples are made says nothing of us on a machine that others use.
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)


@st.composite
def batches(draw: st.DrawFn, per_token: bool = True) -> naive.Tokens:
    """Uneven lengths, empty sequences, holes; garbage where nothing counts."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def drawn(values: st.SearchStrategy) -> Tensor:
        flat = draw(st.lists(values, min_size=B * T, max_size=B * T))
        return torch.tensor(flat, dtype=torch.float64).reshape(B, T)

    lengths = torch.tensor(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    mask = torch.arange(T) < lengths[:, None]
    mask &= drawn(st.sampled_from((1.0, 1.0, 1.0, 0.0))).bool()
    larger, log_ratio = drawn(st.integers(1, 48)) / -8, drawn(st.sampled_from(RATIOS))
    logprobs, old = larger + log_ratio.clamp(max=0), larger - log_ratio.clamp(min=0)
    logprobs = logprobs.masked_fill(~mask, 150.0)
    old = old.masked_fill(~mask, draw(st.sampled_from((-50.0, 50.0, float("nan")))))
    advantages = drawn(st.sampled_from(ADVANTAGES))
    if not (per_token and draw(st.booleans())):
        advantages = advantages[:, :1].expand(B, T).clone()
    return naive.Tokens(logprobs.requires_grad_(), old, advantages, mask)


def padded(tokens: naive.Tokens) -> TokenBatch:
    labels = torch.zeros(tokens.mask.shape, dtype=torch.int64)
    return TokenBatch.padded(labels, tokens.mask, tokens.advantages, old_logprobs=tokens.old)


def packed(tokens: naive.Tokens) -> tuple[TokenStats, TokenBatch]:
    """Only the counted tokens, one sequence after another."""
    mask = tokens.mask
    cu_seqlens = torch.cat([torch.zeros(1).long(), mask.sum(-1).cumsum(0)])
    labels = torch.zeros(int(mask.sum()), dtype=torch.int64)
    batch = TokenBatch.packed(
        labels, cu_seqlens, tokens.advantages[mask], old_logprobs=tokens.old[mask]
    )
    return stats(tokens.logprobs[mask]), batch


def stats(logprobs: Tensor) -> TokenStats:
    return TokenStats(logprobs, torch.zeros_like(logprobs))


def ours(loss: PolicyLoss, tokens: naive.Tokens) -> Tensor:
    return loss.objective(stats(tokens.logprobs), padded(tokens))


def assert_same(value: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """In value and in gradient, in float64."""
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    if not expected.requires_grad:
        expected = expected + 0 * leaf.sum()
    gradients = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)
