"""Means: what each token's loss is divided by. A mean is its weights, one per token, [N].

    loss = sum_n weight[n] * token_loss[n]

Weights depend on masks and counts alone, never on the losses: so a loss whose tokens do not depend
on each other can be formed chunk by chunk. Counts given as arguments replace those of the batch;
with the counts of the whole step, micro-batches add up to the gradient of the step exactly.
"""

from dataclasses import dataclass

from torch import Tensor

from fused_rl.batch import TokenBatch


@dataclass(frozen=True)
class TokenMean:
    """1 / num_tokens: every counted token weighs the same (DAPO, arXiv 2503.14476).

    num_tokens: counted tokens of the whole step, over all its micro-batches; None: of the batch.
    """

    num_tokens: int | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        count = batch.num_tokens if self.num_tokens is None else self.num_tokens
        return batch.loss_mask / _at_least_one(count, batch)


@dataclass(frozen=True)
class SequenceMean:
    """1 / (num_sequences * tokens of the sequence): GRPO as published (arXiv 2402.03300).

    num_sequences: sequences of the whole step; None: of the batch.
    """

    num_sequences: int | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        count = batch.num_sequences if self.num_sequences is None else self.num_sequences
        per_sequence = batch.sequence_tokens.clamp(min=1).to(batch.advantages.dtype)
        return batch.loss_mask / (per_sequence * max(count, 1))


@dataclass(frozen=True)
class FixedLengthMean:
    """1 / (num_sequences * length): no bias towards short answers (Dr. GRPO, arXiv 2503.20783).

    length: a constant, the longest completion that can be sampled.
    num_sequences: sequences of the whole step; None: of the batch.
    """

    length: int
    num_sequences: int | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        count = batch.num_sequences if self.num_sequences is None else self.num_sequences
        return batch.loss_mask / batch.advantages.new_tensor(max(count, 1) * self.length)


def _at_least_one(count: int | Tensor, batch: TokenBatch) -> Tensor:
    """A batch without counted tokens has loss 0, not 0 / 0."""
    if isinstance(count, Tensor):
        return count.clamp(min=1).to(batch.advantages.dtype)
    return batch.advantages.new_tensor(max(count, 1))
