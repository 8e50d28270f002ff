"""What the tokens of a loss are known by: the policy alone, or beside a reference.

                          NHV in one pass: logits, gradient      statistics
    Alone                 2, 4                                   TokenStats
    Spread                2, 4 over all ranks                    TokenStats
    BesideReference       4, 4                                   DivergenceStats

Each says how a chunk of tokens is formed and how its gradient is; the rest of the pass is one code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fused_rl import checks, ops
from fused_rl.divergences import Divergence
from fused_rl.linear.divergence import Side, flat_divergence, two_heads
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import flat_top_logprobs, spread_arguments
from fused_rl.one_pass.evaluation import Counted
from fused_rl.parallel import spread
from fused_rl.stats import IGNORE_INDEX, DivergenceStats, TokenStats

Heads = ops.Head | ops.TwoHeads
"""What a pass is formed of. Either begins with the policy's hidden, weight and bias."""

Backward = Callable[[tuple[Tensor, ...], ops.Sums], Tensor]
"""The gradients of a chunk's statistics, in the order of losses/statistics.py's of_policy, and room
for dweight and dbias -> dhidden. It is called once, and holds the logits until it is dropped."""


class Here:
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


@dataclass(frozen=True)
class Alone(Here):
    """The policy's own head."""

    heads: ClassVar = ops.Head
    stats: ClassVar = TokenStats

    def chunk_tokens(self, head: ops.Head, chunk_bytes: int | None) -> int:
        """Tokens whose logits a chunk may hold."""
        return ops.chunk_tokens(head.hidden, head.weight, chunk_bytes)

    def chunk(self, head: ops.Head) -> tuple[TokenStats, Backward]:
        """The statistics of a chunk's tokens [n], and what their gradients go to."""
        logprobs, entropy, lse, _, z = ops.linear_logprobs_chunk(head)
        logits, known = ops.ChunkLogits(z), ops.Known(lse, entropy)

        def backward(gradients: tuple[Tensor, ...], sums: ops.Sums) -> Tensor:
            upstream = ops.Upstream(*gradients)
            return ops.linear_logprobs_chunk_backward(logits, upstream, head, known, sums)

        return TokenStats(logprobs, entropy), backward

    def two_passes(
        self, head: ops.Head, chunk_bytes: int | None, grad_filter: float | None
    ) -> TokenStats:
        """The statistics of all tokens, [N], for any loss."""
        logprobs, entropy, _ = flat_top_logprobs(head, IGNORE_INDEX, chunk_bytes, grad_filter)
        return TokenStats(logprobs, entropy)


@dataclass(frozen=True)
class BesideReference(Here):
    """The policy's head, the reference's, and the divergence between the two."""

    divergence: Divergence
    heads: ClassVar = ops.TwoHeads
    stats: ClassVar = DivergenceStats

    def chunk_tokens(self, heads: ops.TwoHeads, chunk_bytes: int | None) -> int:
        """Tokens whose logits, both heads', a chunk may hold."""
        return ops.pair_rows(heads, ops.scratch_bytes(heads.hidden.device, chunk_bytes))

    def chunk(self, heads: ops.TwoHeads) -> tuple[DivergenceStats, Backward]:
        """As of Alone."""
        of = self.divergence
        measure = ops.Measure(of.kind, of.parameter, of.factor)
        *formed, z = ops.linear_divergence_chunk(heads, measure)
        stats = ops.TwoStatistics(*formed)
        logits, known = ops.ChunkLogits(z), ops.known_of(stats)

        def backward(gradients: tuple[Tensor, ...], sums: ops.Sums) -> Tensor:
            args = (ops.StudentUpstream(*gradients), heads, measure, known, sums)
            return ops.linear_divergence_chunk_backward(logits, *args)

        named = {name: getattr(stats, name) for name in DivergenceStats._fields}
        return DivergenceStats(**named), backward

    def two_passes(
        self, heads: ops.TwoHeads, chunk_bytes: int | None, grad_filter: float | None
    ) -> DivergenceStats:
        """As of Alone."""
        scratch = ops.scratch_bytes(heads.hidden.device, chunk_bytes)
        return flat_divergence(heads, self.divergence, ops.Limits(IGNORE_INDEX, scratch))


@dataclass(frozen=True)
class Spread:
    """The policy's head, its vocabulary spread over ranks that all have the same batch and loss."""

    how: spread.Spread
    heads: ClassVar = ops.Head
    stats: ClassVar = TokenStats

    def chunk_tokens(self, head: ops.Head, chunk_bytes: int | None) -> int:
        """As of Alone; the same on every rank."""
        return self.how.chunk_tokens(head, chunk_bytes)

    def gathered(self, head: ops.Head) -> ops.Head:
        """With the hidden states of all tokens."""
        return self.how.gathered(head)

    def total(self, head: ops.Head, counted: Counted) -> spread.Total:
        """Where dhidden of the chunks is added up over ranks."""
        dtype = ops.waiting_dtype(head.hidden)
        return spread.Total(self.how, head.hidden, counted.tokens, dtype)

    def chunk(self, head: ops.Head) -> tuple[TokenStats, Backward]:
        """As of Alone; dhidden is this rank's summand."""
        stats, of_chunk = spread.chunk(head, self.how)

        def backward(gradients: tuple[Tensor, ...], sums: ops.Sums) -> Tensor:
            return of_chunk(ops.Upstream(*gradients), sums)

        return TokenStats(stats.logprobs, stats.entropy), backward

    def two_passes(
        self, head: ops.Head, chunk_bytes: int | None, grad_filter: float | None
    ) -> TokenStats:
        """As of Alone."""
        options = (IGNORE_INDEX, chunk_bytes, grad_filter, self.how)
        return TokenStats(*flat_top_logprobs(head, *options)[:2])


Policies = Alone | BesideReference | Spread


def flattened(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    temperature: float | Tensor,
    reference: tuple[Tensor, object] | None,
    divergence: Divergence,
) -> tuple[Heads, Policies]:
    """linear_policy_loss's arguments, checked and flat [N, ...]; the reference without gradient."""
    if reference is None:
        flat, how = spread_arguments(hidden, head, labels, temperature)
        return flat, Alone() if how is None else Spread(how)
    head.is_here("linear_policy_loss with a reference")
    checks.require(
        isinstance(reference, tuple) and len(reference) == 2,
        lambda: f"reference must be (ref_hidden, ref_head), got {checks.shown(reference)}",
    )
    ref_hidden, ref_head = reference[0], LMHead.of(reference[1])
    checks.is_floating("ref_hidden", ref_hidden)
    ref_head.is_here("a reference")
    V, of_reference = len(head.weight), len(ref_head.weight)
    checks.require(
        of_reference == V,
        lambda: (
            f"weight has {V} vocabulary entries and ref_weight {of_reference}: give heads of the "
            f"first {min(V, of_reference)} alone if these are the same tokens"
        ),
    )
    bias = None if ref_head.bias is None else ref_head.bias.detach()
    untrained = LMHead(ref_head.weight.detach(), bias, ref_head.scale, ref_head.softcap)
    policy = Side(hidden, head, temperature, "")
    beside = Side(ref_hidden.detach(), untrained, temperature, "ref_")
    return two_heads(policy, beside, labels), BesideReference(divergence)
