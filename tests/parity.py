"""What the parity tests share: our composition for the options of TRL and of Liger, and a batch.

Both peers name a loss by loss_type and importance_sampling_level, with the same further options.
`counterpart` is the map from these to ours.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_rl
from fused_rl import KLPenalty, Level, PolicyLoss, TokenBatch, TokenStats
from fused_rl.ratios import GeometricRatio, TokenRatio
from fused_rl.surrogates import Clip

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELS = ("token", "sequence")
# The longest completion, and the counted tokens of the step: neither is what the batch has.
LENGTH, ITEMS = 11, 40
LOW, HIGH = 0.2, 0.28


def counterpart(
    loss_type: str,
    level: str = "token",
    *,
    beta: float = 0.0,
    corrected: bool = False,
    low: float = LOW,
    high: float = HIGH,
    delta: float | None = None,
    items: float | None = ITEMS,
) -> PolicyLoss:
    """Our loss for a peer's options.

    Args:
        corrected: use_bias_correction_kl.
        low, high: epsilon (epsilon_low) and epsilon_high; for cispo, high bounds the ratio itself.
        items: num_items_in_batch.
    """
    bounds = {"clip_low": low, "clip_high": high}
    loss = {
        "grpo": lambda: fused_rl.grpo(**bounds),
        "bnpo": lambda: fused_rl.bnpo(**bounds),
        "dr_grpo": lambda: fused_rl.dr_grpo(LENGTH, **bounds),
        "dapo": lambda: fused_rl.dapo(num_tokens=items, **bounds),
        "cispo": lambda: fused_rl.cispo(num_tokens=items, ratio_max=high),
        "sapo": lambda: fused_rl.sapo(),
        "luspo": lambda: fused_rl.luspo(**bounds),
        "vespo": lambda: fused_rl.vespo(num_tokens=items),
    }[loss_type]()
    importance = (Level.TOKEN if level == "token" else Level.GEOMETRIC) if corrected else None
    loss = dataclasses.replace(loss, kl=KLPenalty(beta, importance=importance))
    if loss_type != "vespo":
        # The ratio of VESPO is that of whole sequences, whatever the level.
        ratio = TokenRatio() if level == "token" else GeometricRatio()
        loss = dataclasses.replace(loss, ratio=ratio)
    if delta is not None:
        loss = dataclasses.replace(loss, surrogate=Clip(low, high, delta=delta))
    return loss


def alone(loss: PolicyLoss) -> PolicyLoss:
    """The loss without a KL penalty, as the named losses are."""
    return dataclasses.replace(loss, kl=KLPenalty(0.0))


@dataclass
class Case:
    """Six sequences in seven columns: uneven, an empty one, one token, a hole, zero advantage.

    Ratios lie on both sides of every bound, also those of sequences. Tokens that do not count hold
    numbers that are wrong and finite.
    """

    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    completion: Tensor
    counted: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype = torch.float64, seed: int = 5) -> "Case":
        generator = torch.Generator().manual_seed(seed)

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(6, 7, dtype=dtype, generator=generator)

        completion = torch.arange(7) < torch.tensor([7, 3, 0, 5, 1, 6])[:, None]
        counted = completion.clone()
        counted[0, 2] = False
        logprobs = -noise(2.0).abs() - 0.1
        drift = torch.tensor([0.4, -0.4, 0.0, 0.5, -0.1, 0.2], dtype=dtype)[:, None]
        old, ref = logprobs - drift + noise(0.3), logprobs + noise(0.4)
        advantages = torch.tensor([1.3, -0.8, 0.7, -2.1, 0.9, 0.0], dtype=dtype)
        outside = {"old": -9.0, "ref": 3.0}
        old, ref = (
            t.masked_fill(~counted, outside[name]) for name, t in (("old", old), ("ref", ref))
        )
        entropy = noise(1.0).abs()
        leaves = (logprobs.requires_grad_(), entropy.requires_grad_())
        return cls(*leaves, old, ref, advantages, completion, counted)

    def rows(self, chosen: slice | Tensor) -> "Case":
        parts = {f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)}
        return Case(**parts)

    @property
    def labels(self) -> Tensor:
        return torch.zeros_like(self.counted, dtype=torch.int64)

    @property
    def batch(self) -> TokenBatch:
        return TokenBatch.padded(
            self.labels,
            self.counted,
            self.advantages,
            old_logprobs=self.old,
            ref_logprobs=self.ref,
        )

    @property
    def stats(self) -> TokenStats:
        return TokenStats(self.logprobs, self.entropy)

    def ours(self, loss: PolicyLoss, batch: TokenBatch | None = None) -> Tensor:
        return loss(self.stats, batch or self.batch).loss

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """With respect to log-probs and entropies, where they count; elsewhere they must be 0."""
        leaves = [self.logprobs, self.entropy]
        found = torch.autograd.grad(
            loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for gradient in found:
            assert not gradient[~self.counted].any()
        return list(found)

    def assert_same(self, ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
        """In value and in both gradients."""
        close = {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(ours, theirs, **close)
        for pair in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            torch.testing.assert_close(*pair, **close)
