"""The kept sets of tokens, packed: indices that never lead astray, and what is wrong with them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_rl import reference


class Sets(NamedTuple):
    """Those of token n are kept[cu_kept[n] : cu_kept[n + 1]]."""

    kept: Tensor  # [M] int64
    cu_kept: Tensor  # [N + 1] int64

    def named(self, labels: Tensor) -> tuple["Sets", Tensor]:
        """With the label alone where the set is the whole vocabulary, and which those are [N].

        Log-probs over the whole vocabulary are at hand: what the label alone gives, 0 and no
        gradient, is to be replaced by them.
        """
        kept, cu_kept = self
        M = len(kept)
        first = cu_kept[:-1].clamp(0, M)
        # With room at the end for what is not a set of its own, so that nothing waits for a size.
        kept = F.pad(kept, (0, 1))
        whole = (cu_kept.diff() == 1) & (kept[first] == reference.WHOLE_VOCABULARY)
        return Sets(kept.scatter(0, first.where(whole, M), labels)[:M], cu_kept), whole


class Pairs(NamedTuple):
    """The sets as pairs (token, vocabulary entry), safe to index with whatever the sets hold."""

    token: Tensor  # [M], rising
    entry: Tensor  # [M]
    lengths: Tensor  # [N], adding up to M
    broken: Tensor  # [] bool: the offsets do not rise from 0 to M

    @classmethod
    def of(cls, sets: Sets, vocabulary: int) -> "Pairs":
        kept, cu_kept = sets
        N, M = len(cu_kept) - 1, len(kept)
        steps = cu_kept.diff()
        broken = (cu_kept[0] != 0) | (cu_kept[-1] != M) | (steps < 0).any()
        # With broken offsets all pairs go to the last token: no index leads astray.
        last = torch.arange(N, device=kept.device) == N - 1
        lengths = steps.where(~broken, last * M)
        # The size is given, so that nothing waits for the device; without tokens it is 0.
        token = torch.repeat_interleave(lengths, output_size=M if N else 0)
        return cls(token, kept[: len(token)].clamp(0, vocabulary - 1), lengths, broken)

    def over_sets(self, x: Tensor, reduce: str) -> Tensor:
        """[M, ...] -> [N, ...]: "sum" or "max" over the set of each token."""
        return torch.segment_reduce(x, reduce, lengths=self.lengths, unsafe=True)

    def any_in_set(self, flags: Tensor) -> Tensor:
        """[M] -> [N]: whether there is one in the set of the token."""
        return self.over_sets(flags.double(), "sum") > 0


def wrong_tokens(
    labels: Tensor, kept: Tensor, pairs: Pairs, vocabulary: int, ignore_index: int
) -> Tensor:  # [N] bool
    """The counted tokens that have no valid set; on CPU a ValueError says which is the first."""
    counted = labels != ignore_index
    of_counted = counted[pairs.token]
    outside = of_counted & (kept != pairs.entry)
    twice = of_counted & _seen_before(pairs.token * vocabulary + pairs.entry)
    missing = counted & ~pairs.any_in_set(kept == labels[pairs.token])
    if not kept.is_cuda:
        check_sets(labels, kept, vocabulary, pairs, outside, twice, missing)
    return missing | (counted & (pairs.any_in_set(outside | twice) | pairs.broken))


def _seen_before(keys: Tensor) -> Tensor:
    """Which keys stand further left as well."""
    ordered, order = keys.sort(stable=True)
    repeats = torch.zeros_like(keys, dtype=torch.bool)
    repeats[1:] = ordered[1:] == ordered[:-1]
    return torch.empty_like(repeats).index_copy_(0, order, repeats)


def check_kept(labels: Tensor, sets: Sets, vocabulary: int, ignore_index: int) -> None:
    """ValueError at the first counted token without a valid set. Not on CUDA, as check_tokens."""
    if labels.is_cuda or len(labels) == 0:
        return
    check_offsets(sets.cu_kept, len(sets.kept))
    wrong_tokens(labels, sets.kept, Pairs.of(sets, vocabulary), vocabulary, ignore_index)


def check_offsets(cu_kept: Tensor, M: int) -> None:
    """ValueError at offsets that do not rise from 0 to M."""
    if said := reference.wrong_offsets(cu_kept, M):
        raise ValueError(said)


def check_sets(labels, kept, vocabulary, pairs, outside, twice, missing) -> None:
    """ValueError at the first pair that is outside or there twice, or token without its label."""
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(f"kept[{i}] is {int(kept[i])}, outside the vocabulary [0, {vocabulary})")
    if twice.any():
        i = int(twice.nonzero()[0])
        raise ValueError(
            f"kept[{i}] is {int(kept[i])}, twice in the kept set of token {int(pairs.token[i])}"
        )
    if missing.any():
        n = int(missing.nonzero()[0])
        label = int(labels[n])
        if pairs.lengths[n] == 0:
            raise ValueError(f"the kept set of token {n} is empty, and labels[{n}] is {label}")
        raise ValueError(f"labels[{n}] is {label}, which is not in the kept set of token {n}")
