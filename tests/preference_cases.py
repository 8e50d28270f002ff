"""Preference losses, each beside its naive formula, and a batch with gaps, short and long ones."""

from __future__ import annotations

import naive_preference as naive
import torch
from naive_preference import TORCH, Sequence
from torch import Tensor

from fused_rl import LMHead, TokenStats, linear_preference_loss, preference, scores
from fused_rl.preference import PreferenceBatch

P, T, H, V = 4, 6, 5, 11
TEMPERATURE = 0.7
MASK = torch.tensor(
    [
        *([1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
        *([1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0]),
    ]
).bool()

# name -> the loss, and the formula. Those of WPO need what only hidden states tell.
PAIRED = {
    "dpo": (preference.dpo(0.3), naive.mean(naive.dpo, beta=0.3)),
    "dpo, smoothed": (
        preference.dpo(0.3, smoothing=0.2),
        naive.mean(naive.dpo, beta=0.3, smoothing=0.2),
    ),
    "robust": (
        preference.robust(beta=0.3, smoothing=0.2),
        naive.mean(naive.robust, beta=0.3, smoothing=0.2),
    ),
    "hinge": (preference.hinge(beta=0.3), naive.mean(naive.hinge, beta=0.3)),
    "ipo": (preference.ipo(beta=0.3), naive.mean(naive.ipo, beta=0.3)),
    "exo": (
        preference.exo(beta=0.3, smoothing=0.1),
        naive.mean(naive.exo, beta=0.3, smoothing=0.1),
    ),
    "nca": (preference.nca(beta=0.3), naive.mean(naive.nca, beta=0.3)),
    "bco_pair": (preference.bco_pair(beta=0.3), naive.mean(naive.bco_pair, beta=0.3)),
    "bco_pair, shifted": (
        preference.bco_pair(beta=0.3, shift=0.4),
        naive.mean(naive.bco_pair, beta=0.3, shift=0.4),
    ),
    "sppo": (preference.sppo(beta=0.3), naive.mean(naive.sppo, beta=0.3)),
    "aot": (preference.aot(beta=0.3, smoothing=0.1), naive.aot(beta=0.3, smoothing=0.1)),
    "aot_unpaired": (
        preference.aot_unpaired(beta=0.3, smoothing=0.1),
        naive.aot_unpaired(beta=0.3, smoothing=0.1),
    ),
    "apo_zero": (preference.apo_zero(beta=0.3), naive.mean(naive.apo_zero, beta=0.3)),
    "apo_down": (preference.apo_down(beta=0.3), naive.mean(naive.apo_down, beta=0.3)),
    "discopop": (preference.discopop(beta=0.03), naive.mean(naive.discopop, beta=0.03)),
    "dpo_norm": (preference.dpo_norm(beta=0.3), naive.mean(naive.dpo_norm, beta=0.3)),
    "sft": (preference.sft(), naive.likelihood),
    "f_dpo, forward KL": (
        preference.f_dpo(scores.ForwardKL(), beta=0.3),
        naive.mean(naive.f_dpo, slope=naive.forward_slope, beta=0.3),
    ),
    "f_dpo, Jensen-Shannon": (
        preference.f_dpo(scores.JensenShannon(), beta=0.3),
        naive.mean(naive.f_dpo, slope=naive.jensen_shannon_slope, beta=0.3),
    ),
    "f_dpo, alpha": (
        preference.f_dpo(scores.Alpha(0.4), beta=0.3),
        naive.mean(naive.f_dpo, slope=naive.alpha_slope(0.4), beta=0.3),
    ),
    "ld_dpo": (
        preference.ld_dpo(alpha=0.4, beta=0.3),
        naive.mean(naive.ld_dpo, alpha=0.4, beta=0.3),
    ),
    "simpo": (
        preference.simpo(beta=2.0, gamma=0.5),
        naive.mean(naive.simpo, beta=2.0, gamma=0.5),
    ),
    "cpo": (
        preference.cpo(beta=0.1, likelihood=0.5),
        naive.total((1.0, naive.mean(naive.cpo, beta=0.1)), (0.5, naive.likelihood)),
    ),
    "alphapo": (
        preference.alphapo(beta=2.0, alpha=0.3, gamma=0.5),
        naive.mean(naive.alphapo, beta=2.0, alpha=0.3, gamma=0.5),
    ),
    "orpo": (
        preference.orpo(beta=0.2),
        naive.total((1.0, naive.likelihood), (1.0, naive.mean(naive.odds, beta=0.2))),
    ),
    "rpo": (
        preference.rpo(beta=0.3, likelihood=0.7),
        naive.total((1.0, naive.mean(naive.dpo, beta=0.3)), (0.7, naive.likelihood)),
    ),
    "mixture": (
        preference.mixture(
            [(0.8, preference.dpo(0.3)), (0.2, preference.bco_pair(0.3)), (1.5, preference.sft())]
        ),
        naive.total(
            (0.8, naive.mean(naive.dpo, beta=0.3)),
            (0.2, naive.mean(naive.bco_pair, beta=0.3)),
            (1.5, naive.likelihood),
        ),
    ),
}
WPO = {"wpo": (preference.wpo(beta=0.3), naive.mean(naive.wpo, beta=0.3))}

# The last two sequences of the batch of unpaired ones are mismatched.
DESIRABLE = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
MISMATCHED = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).bool()
UNPAIRED = {
    "kto": (
        preference.kto(0.3, desirable=1.2, undesirable=0.7),
        lambda judged, others: naive.kto(
            *(judged, others, TORCH), beta=0.3, desirable=1.2, undesirable=0.7
        ),
    ),
    "bco": (
        preference.bco(beta=0.3, shift=0.4),
        lambda judged, _: naive.bco(judged, TORCH, beta=0.3, shift=0.4),
    ),
    "apo_zero_unpaired": (
        preference.apo_zero_unpaired(beta=0.3),
        lambda judged, _: naive.apo_zero_unpaired(judged, TORCH, beta=0.3),
    ),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sequences(logprobs: Tensor, ref: Tensor, mask: Tensor, collisions=None) -> list[Sequence]:
    """The counted tokens of [S, T], number by number."""
    return [
        Sequence(
            list(logprobs[s][mask[s]]),
            list(ref[s][mask[s]]),
            None if collisions is None else list(collisions[s][mask[s]]),
        )
        for s in range(len(mask))
    ]


def halves(of: list[Sequence]) -> list[naive.Pair]:
    return list(zip(of[: len(of) // 2], of[len(of) // 2 :], strict=True))


class Given:
    """Hidden states, a head, labels and the log-probs of a reference; 2 P sequences."""

    def __init__(self, mask: Tensor = MASK, seed: int = 0) -> None:
        S, T = mask.shape
        self.mask = mask
        self.hidden = normal(S, T, H, seed=seed).requires_grad_()
        self.weight = normal(V, H, seed=seed + 1).requires_grad_()
        self.bias = normal(V, seed=seed + 2).requires_grad_()
        generator = torch.Generator().manual_seed(seed + 3)
        self.labels = torch.randint(V, (S, T), generator=generator)
        self.ref = self.logprobs().detach() + normal(S, T, seed=seed + 4)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias)

    def batch(self, **options) -> PreferenceBatch:
        options = {"ref_logprobs": self.ref, **options}
        return PreferenceBatch.padded(self.labels, self.mask, **options)

    def logits(self) -> Tensor:
        return (self.hidden @ self.weight.T + self.bias) / TEMPERATURE

    def logprobs(self) -> Tensor:
        """[S, T]: of the labels, by a log_softmax."""
        return self.logits().log_softmax(-1).gather(-1, self.labels[..., None])[..., 0]

    def collisions(self) -> Tensor:
        """[S, T]: log sum_v p^2."""
        return self.logits().softmax(-1).square().sum(-1).log()

    def naive(self, collisions: bool = False) -> list[Sequence]:
        of = self.collisions() if collisions else None
        return sequences(self.logprobs(), self.ref, self.mask, of)

    def ours(self, loss, batch=None, **options):
        """LossOutput, from hidden states."""
        batch = self.batch() if batch is None else batch
        hidden = options.pop("hidden", self.hidden)
        return linear_preference_loss(
            *(hidden, self.head, batch, loss), temperature=TEMPERATURE, **options
        )


def stats(logprobs: Tensor) -> TokenStats:
    return TokenStats(logprobs, torch.zeros_like(logprobs))


def unpaired(of: list[Sequence]) -> tuple[list[naive.Judged], list[Sequence]]:
    """(those that are judged, the mismatched ones)"""
    judged = [
        (s, bool(good))
        for s, good, other in zip(of, DESIRABLE, MISMATCHED, strict=True)
        if not other
    ]
    return judged, [s for s, other in zip(of, MISMATCHED, strict=True) if other]
