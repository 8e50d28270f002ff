"""How the tokens of a pass are cut into chunks, and put together again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_rl import ops
from fused_rl.one_pass.evaluation import Counted
from fused_rl.stats import IGNORE_INDEX

Heads = ops.Head | ops.AdaptedHead | ops.KeptHead | ops.TwoHeads
"""What a pass is formed of. Either begins with the policy's hidden, weight and bias."""

Backward = Callable[[tuple[Tensor, ...], ops.Sums], Tensor]
"""The gradients of a chunk's statistics, in the order of losses/statistics.py's of_policy, and room
for dweight and dbias -> dhidden. It is called once, and holds the logits until it is dropped."""


class Cut:
    """How chunks are cut where a rank has all the tokens that a pass is of."""

    def agreed(self, heads: Heads, chunk_bytes: int | None) -> Any:
        """What ranks must know of each other before the first chunk: nothing."""
        return self

    def check(self, heads: Heads, vocabulary: int) -> None:
        """ValueError at the first token that an operator of the pass would not look at."""
        ops.check_tokens(heads.labels, heads.temperature, vocabulary, IGNORE_INDEX)

    def tokens(self, heads: Heads) -> int:
        """How many tokens' logits are formed here, at most."""
        return len(heads.labels)

    def sizes(self, tokens: int, most: int) -> list[int]:
        """Of the chunks of so many tokens."""
        return ops.chunk_sizes(tokens, most)


class Here(Cut):
    """What all of one rank do alike."""

    def gathered(self, heads: Heads) -> Heads:
        """With the hidden states of all tokens: they are here."""
        return heads

    def total(self, heads: Heads, counted: Counted) -> "Placed":
        """Where dhidden of the chunks is put together."""
        return Placed(heads.hidden, counted)


class Placed:
    """dhidden of all tokens, from that of the chunks."""

    def __init__(self, like: Tensor, counted: Counted) -> None:
        self.like, self.counted, self.dhidden = like, counted, None

    def add(self, part: Tensor, chunk: slice | Tensor) -> None:
        self.dhidden = self.counted.add(self.dhidden, part, chunk)

    def result(self) -> Tensor:
        """[N, H]; zeros where no token counts."""
        if self.dhidden is not None:
            return self.dhidden
        return self.like.new_zeros(self.like.shape, dtype=ops.waiting_dtype(self.like))
