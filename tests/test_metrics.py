"""What a loss reports of its tokens: by hand, and the same wherever the loss is made."""

import pytest
import torch

import fused_rl
from fused_rl import PolicyLoss, TokenBatch, TokenStats
from fused_rl.surrogates import Clip
from fused_rl.trust_regions import ClipCov


def packed(ratios: list[float], advantages: list[float], cu_seqlens: list[int]):
    """Statistics and batch of tokens with these ratios, all of which count."""
    old = torch.linspace(-2.0, -1.0, len(ratios), dtype=torch.float64)
    batch = TokenBatch.packed(
        torch.zeros(len(ratios), dtype=torch.int64),
        torch.tensor(cu_seqlens),
        torch.tensor(advantages, dtype=torch.float64),
        old_logprobs=old,
        ref_logprobs=old - 0.1,
    )
    logprobs = old + torch.tensor(ratios, dtype=torch.float64).log()
    return TokenStats(logprobs, torch.ones_like(old)), batch


def fractions(loss, stats, batch) -> dict[str, float]:
    metrics = loss(stats, batch).metrics
    return {side: metrics[f"clip_fraction_{side}"].item() for side in ("low", "high", "dual")}


# Ratios 0.5, 0.9, 1.1, 1.5, 2.5, 4 with A = 1, then with A = -1.
RATIOS = [0.5, 0.9, 1.1, 1.5, 2.5, 4.0] * 2
ADVANTAGES = [1.0] * 6 + [-1.0] * 6


@pytest.mark.parametrize(
    ("surrogate", "low", "high", "dual"),
    [
        (Clip(), 1, 3, 0),
        (Clip(dual=3.0), 1, 4, 1),
        (Clip(dual=2.0), 1, 5, 2),
        (Clip(delta=2.0), 1, 5, 2),
        (Clip(0.2, 0.9, delta=1.4), 1, 5, 2),
        (ClipCov(Clip(dual=3.0), cov_low=1e9, cov_high=2e9), 1, 4, 1),
        (fused_rl.surrogates.Unclipped(), 0, 0, 0),
        pytest.param(lambda log_ratio, logprobs, A: -log_ratio.exp() * A, 0, 0, 0, id="a function"),
    ],
    ids=str,
)
def test_clipped_tokens_by_hand(surrogate, low, high, dual):
    found = fractions(PolicyLoss(surrogate), *packed(RATIOS, ADVANTAGES, [0, 4, 12]))
    assert found == pytest.approx({"low": low / 12, "high": high / 12, "dual": dual / 12})


def test_dual_clipping_is_told_apart_as_ppo_with_a_critic_in_verl_counts_it():
    """Tokens whose clipped loss exceeds the other one, and tokens that dual clipping then bounds;
    see verl's compute_policy_loss_vanilla."""
    stats, batch = packed(RATIOS, ADVANTAGES, [0, 12])
    A, ratio = batch.advantages, (stats.logprobs - batch.old_logprobs).exp()
    plain, clipped = -A * ratio, -A * ratio.clamp(0.8, 1.2)
    once = (clipped > plain).double().mean()
    twice = ((torch.maximum(plain, clipped) > -3.0 * A) & (A < 0)).double().mean()
    found = fractions(fused_rl.ppo(dual=3.0), stats, batch)
    assert found["low"] + found["high"] - found["dual"] == pytest.approx(once.item())
    assert found["dual"] == pytest.approx(twice.item())
    assert once > 0 and twice > 0


def test_gmpo_counts_what_it_clips_inside_the_ratio():
    """Of log-ratios -0.69, -0.11, 0.10, 0.41, 0.92, 1.39: beyond 0.4, on the side of A alone."""
    stats, batch = packed(RATIOS, ADVANTAGES, [0, 4, 12])
    assert fractions(fused_rl.gmpo(), stats, batch) == pytest.approx(
        {"low": 1 / 12, "high": 3 / 12, "dual": 0}
    )
    wide = fractions(fused_rl.gmpo(clip_low=0.1, clip_high=1.0), stats, batch)
    assert wide == pytest.approx({"low": 2 / 12, "high": 1 / 12, "dual": 0})
    # And those are the tokens without a gradient.
    leaf = stats.logprobs.clone().requires_grad_()
    loss = fused_rl.gmpo()
    (slope,) = torch.autograd.grad(loss.objective(stats._replace(logprobs=leaf), batch), leaf)
    idle = loss(stats, batch).metrics["zero_gradient_fraction"].item()
    assert (slope == 0).double().mean().item() == pytest.approx(4 / 12) == pytest.approx(idle)
