"""Which sequences were compared: pairs, or single answers; read on the host and checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl import checks


class Compared(NamedTuple):
    """Who was chosen, who rejected, who only serves the reference point; and whether in pairs."""

    chosen: Tensor
    rejected: Tensor
    mismatched: Tensor
    paired: bool

    @classmethod
    def of(cls, S, device, pairs, desirable, mismatched) -> Compared:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        if desirable is not None:
            checks.require(
                pairs is None,
                lambda: "pairs and desirable are given: sequences are judged in pairs, or alone",
            )
            good = _flags("desirable", desirable, S, device)
            apart = torch.zeros_like(good)
            if mismatched is not None:
                apart = _flags("mismatched", mismatched, S, device)
            parts = (good & ~apart, ~good & ~apart, apart)
            return cls(*(part.nonzero()[:, 0] for part in parts), False)
        checks.require(
            mismatched is None,
            lambda: "mismatched is for an unpaired batch: give desirable too",
        )
        if pairs is None:
            checks.require(
                S % 2 == 0,
                lambda: (
                    f"without pairs or desirable, the first half is chosen over the second, and "
                    f"there are {S} sequences: give pairs=(chosen, rejected) or desirable"
                ),
            )
            rows = torch.arange(S, device=device)
            return cls(rows[: S // 2], rows[S // 2 :], none, True)
        checks.require(
            isinstance(pairs, tuple) and len(pairs) == 2,
            lambda: f"pairs must be (chosen, rejected), got {checks.shown(pairs)}",
        )
        chosen, rejected = (
            _indices(f"{name} of pairs", given, S, device)
            for name, given in zip(("chosen", "rejected"), pairs, strict=True)
        )
        checks.same_shape("rejected of pairs", rejected, "chosen of pairs", chosen)
        same = (chosen == rejected).nonzero()[:, 0].tolist()
        checks.require(
            not same, lambda: f"pair {same[0]} compares sequence {int(chosen[same[0]])} with itself"
        )
        return cls(chosen, rejected, none, True)


def _indices(name: str, given: Tensor, S: int, device: torch.device) -> Tensor:
    checks.is_indices(name, given)
    checks.require(given.dim() == 1, lambda: f"{name} must be [P], got {list(given.shape)}")
    checks.same_device(labels=torch.empty(0, device=device), **{name: given})
    outside = given[(given < 0) | (given >= S)].tolist()
    checks.require(not outside, lambda: f"{name} holds {outside[0]}, outside [0, {S})")
    return given.long()


def _flags(name: str, given: Tensor, S: int, device: torch.device) -> Tensor:
    checks.is_mask(name, given)
    checks.require(given.shape == (S,), lambda: f"{name} must be [{S}], got {list(given.shape)}")
    checks.same_device(labels=torch.empty(0, device=device), **{name: given})
    return given != 0


def mask_of(name: str, given: Tensor, labels: Tensor) -> Tensor:
    """bool, in the shape of labels."""
    checks.is_mask(name, given)
    checks.same_shape(name, given, "labels", labels)
    checks.same_device(labels=labels, **{name: given})
    return given != 0
