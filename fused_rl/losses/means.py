"""Means: what each token's loss is divided by. A mean is its weights, one per token, [N].

    loss = sum_n weight[n] * token_loss[n]

                          weight of a counted token               known elsewhere as
    TokenMean             1 / num_tokens                          TRL dapo, bnpo; verl token-mean
    TokenSum              1                                       verl token-sum
    SequenceMean          1 / (num_sequences tokens)              TRL grpo; verl seq-mean-token-mean
    SequenceSumMean       1 / num_sequences                       verl seq-mean-token-sum; LUSPO
    FixedLengthMean       1 / (num_sequences length)              TRL dr_grpo
    LengthWeightedMean    tokens / (num_sequences length)         Liger luspo, unpadded
    RolloutMean           1 / (num_rollouts tokens of rollout)    slime

where tokens are the counted ones of the token's sequence. Weights depend on masks and counts alone,
never on the losses: so a loss whose tokens do not depend on each other can be formed chunk by
chunk.

Counts given as arguments replace those of the batch. With the counts of the whole step, its
micro-batches add up to the gradient of the step exactly. Where ranks each hold a part of the step
and their gradients are averaged, as DDP and FSDP do, counts.across gives a batch its share; a count
that is given is to be divided by the number of ranks likewise, RolloutMean's too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import checks
from fused_rl.losses.batch import TokenBatch, divisor

__all__ = [
    "FixedLengthMean",
    "LengthWeightedMean",
    "RolloutMean",
    "SequenceMean",
    "SequenceSumMean",
    "TokenMean",
    "TokenSum",
]

Count = int | float | Tensor


@dataclass(frozen=True)
class TokenMean:
    """1 / num_tokens: every counted token weighs the same (DAPO, arXiv 2503.14476).

    num_tokens: counted tokens of the whole step, over all its micro-batches; None: of the batch.
    """

    num_tokens: Count | None = None

    def __post_init__(self) -> None:
        is_count("num_tokens", self.num_tokens)

    def __call__(self, batch: TokenBatch) -> Tensor:
        return batch.loss_mask / _count(self.num_tokens, batch.num_tokens, batch)


@dataclass(frozen=True)
class TokenSum:
    """1: the loss is a sum, which grows with the batch. The caller divides."""

    def __call__(self, batch: TokenBatch) -> Tensor:
        return batch.loss_mask.to(batch.advantages.dtype)


@dataclass(frozen=True)
class SequenceMean:
    """1 / (num_sequences * tokens of the sequence): GRPO as published (arXiv 2402.03300).

    num_sequences: sequences of the whole step; None: of the batch.
    """

    num_sequences: Count | None = None

    def __post_init__(self) -> None:
        is_count("num_sequences", self.num_sequences)

    def __call__(self, batch: TokenBatch) -> Tensor:
        per_sequence = batch.sequence_tokens.clamp(min=1).to(batch.advantages.dtype)
        return batch.loss_mask / (per_sequence * _sequences(self.num_sequences, batch))


@dataclass(frozen=True)
class SequenceSumMean:
    """1 / num_sequences: sums over tokens, the mean over sequences.

    With GeometricRatio it is LUSPO (arXiv 2602.05261): a sequence weighs as many tokens as it has.

    num_sequences: sequences of the whole step; None: of the batch.
    """

    num_sequences: Count | None = None

    def __post_init__(self) -> None:
        is_count("num_sequences", self.num_sequences)

    def __call__(self, batch: TokenBatch) -> Tensor:
        return batch.loss_mask / _sequences(self.num_sequences, batch)


@dataclass(frozen=True)
class FixedLengthMean:
    """1 / (num_sequences * length): no bias towards short answers (Dr. GRPO, arXiv 2503.20783).

    length: a constant, the longest completion that can be sampled.
    num_sequences: sequences of the whole step; None: of the batch.
    """

    length: float
    num_sequences: Count | None = None

    def __post_init__(self) -> None:
        checks.is_number("length", self.length)
        checks.at_least("length", self.length, 1)
        is_count("num_sequences", self.num_sequences)

    def __call__(self, batch: TokenBatch) -> Tensor:
        return batch.loss_mask / (_sequences(self.num_sequences, batch) * self.length)


@dataclass(frozen=True)
class LengthWeightedMean:
    """tokens of the sequence / (num_sequences * length): long answers weigh more, squared.

    length: what TRL's mean over columns divides by: the padded width of the batch.
    num_sequences: sequences of the whole step; None: of the batch.
    """

    length: float
    num_sequences: Count | None = None

    def __post_init__(self) -> None:
        checks.is_number("length", self.length)
        checks.at_least("length", self.length, 1)
        is_count("num_sequences", self.num_sequences)

    def __call__(self, batch: TokenBatch) -> Tensor:
        tokens = batch.sequence_tokens.where(batch.loss_mask, 0)
        return tokens / (_sequences(self.num_sequences, batch) * self.length)


@dataclass(frozen=True, eq=False)
class RolloutMean:
    """1 / (num_rollouts * tokens of the rollout): a rollout cut into sequences counts once.

    rollout_tokens: [num_sequences] int: for each sequence of the batch, how many tokens of its
        rollout count, over all sequences of that rollout.
    num_rollouts: rollouts of the whole step.
    """

    rollout_tokens: Tensor
    num_rollouts: Count

    def __post_init__(self) -> None:
        checks.is_indices("rollout_tokens", self.rollout_tokens)
        checks.require(
            self.num_rollouts is not None, lambda: "num_rollouts must be a number, got None"
        )
        is_count("num_rollouts", self.num_rollouts)

    def __call__(self, batch: TokenBatch) -> Tensor:
        per_rollout = self.rollout_tokens.clamp(min=1).to(batch.advantages.dtype)[batch.sequence]
        return batch.loss_mask / (per_rollout * _count(self.num_rollouts, 1, batch))


def is_count(name: str, count: Count | None) -> None:
    """A number, or a tensor of one, whose value is not looked at; 0 where nothing counts.

    Less than one is no count, not even of a rank: it is a beta or a rate in the wrong place.
    """
    if count is None:
        return
    if isinstance(count, Tensor):
        checks.is_tensor(name, count)
        checks.require(
            count.numel() == 1 and count.dtype != torch.bool,
            lambda: f"{name} must be a number or a tensor of one, got {checks.shown(count)}",
        )
        return
    checks.is_not_negative(name, count)
    checks.require(
        count == 0 or count >= 1,
        lambda: (
            f"{name} must be 0, or 1 or more, got {count}: it is the count of the whole step; a "
            f"weight of the KL goes by its name, beta={count}"
        ),
    )


def _sequences(given: Count | None, batch: TokenBatch) -> Tensor:
    return _count(given, batch.num_sequences, batch)


def _count(given: Count | None, own: Count, batch: TokenBatch) -> Tensor:
    """What to divide by, a tensor in the dtype of weights."""
    count = own if given is None else given
    if not isinstance(count, Tensor):
        # Filled on the device: to copy a number there would end the capture of a graph.
        count = batch.advantages.new_full((), count)
    return divisor(count).to(batch.advantages.dtype)
