"""What the tokens of a loss are known by: the policy alone, or beside a reference.

                          NHV in one pass: logits, gradient      statistics
    Alone                 2, 4                                   TokenStats
    Adapted               2, 2                                   TokenStats
    Spread                2, 4 over all ranks                    TokenStats
    OwnTokens             2, 4, N the mean over ranks            TokenStats
    BesideReference       4, 4                                   DivergenceStats
    Kept                  kept.py                                TokenStats, renormalised

A frozen head alone on a CPU goes another way, 4 NHV for any loss: ops/frozen.py.

Each says how a chunk of tokens is formed and how its gradient is; the rest of the pass is one code.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fused_rl import checks, ops
from fused_rl.kl.divergences import Divergence
from fused_rl.linear.arguments import own_arguments, spread_arguments
from fused_rl.linear.divergence import Side, flat_divergence, two_heads
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import flat_top_logprobs
from fused_rl.losses.batch import TokenBatch
from fused_rl.one_pass.cuts import Backward, Cut, Heads, Here
from fused_rl.one_pass.evaluation import Counted
from fused_rl.one_pass.kept import Kept
from fused_rl.parallel import own_tokens, spread, visits
from fused_rl.parallel.collectives import ranks_of
from fused_rl.parallel.states import Hidden
from fused_rl.stats import IGNORE_INDEX, DivergenceStats, TokenStats


@dataclass(frozen=True)
class Alone(Here):
    """The policy's own head, and what of its statistics a loss depends on."""

    given: ops.Given
    heads: ClassVar = ops.Head
    stats: ClassVar = TokenStats

    def chunk_tokens(self, head: ops.Head, chunk_bytes: int | None) -> int:
        """Tokens whose logits a chunk may hold."""
        return ops.tokens_of_chunk(head, self.given, chunk_bytes)

    def chunk(self, head: ops.Head, _: int) -> tuple[TokenStats, Backward]:
        """The statistics of a chunk's tokens [n], and what their gradients go to; and its number,
        which only ranks with tokens of their own need.
        """
        logprobs, entropy, lse, _, z = ops.linear_logprobs_chunk(head, self.given)
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
class Adapted(Alone):
    """A policy's head of which adapters alone are trained: dweight is of their columns."""

    heads: ClassVar = ops.AdaptedHead

    def chunk_tokens(self, head: ops.AdaptedHead, chunk_bytes: int | None) -> int:
        """As of Alone."""
        return super().chunk_tokens(head.head(), chunk_bytes)

    def chunk(self, head: ops.AdaptedHead, i: int) -> tuple[TokenStats, Backward]:
        """As of Alone."""
        stats, backward = super().chunk(head.head(), i)
        return stats, lambda gradients, sums: backward(gradients, head.sums(sums))


@dataclass(frozen=True)
class BesideReference(Here):
    """The policy's head, the reference's, and the divergence between the two."""

    divergence: Divergence
    heads: ClassVar = ops.TwoHeads
    stats: ClassVar = DivergenceStats

    def chunk_tokens(self, heads: ops.TwoHeads, chunk_bytes: int | None) -> int:
        """Tokens whose logits, both heads', a chunk may hold."""
        return ops.pair_rows(heads, ops.scratch_bytes(heads.hidden.device, chunk_bytes))

    def chunk(self, heads: ops.TwoHeads, _: int) -> tuple[DivergenceStats, Backward]:
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
class Spread(Cut):
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

    def chunk(self, head: ops.Head, _: int) -> tuple[TokenStats, Backward]:
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


@dataclass(frozen=True)
class OwnTokens:
    """The policy's head, its vocabulary spread over ranks that have a batch and a loss each."""

    how: spread.Spread
    journey: visits.Journey | None = None
    heads: ClassVar = ops.Head
    stats: ClassVar = TokenStats

    def agreed(self, head: ops.Head, chunk_bytes: int | None) -> "OwnTokens":
        """With the numbers of tokens of all ranks."""
        return OwnTokens(self.how, visits.Journey.met(head, IGNORE_INDEX, self.how, chunk_bytes))

    check = Cut.check

    def tokens(self, head: ops.Head) -> int:
        """The same on every rank."""
        return max(self.journey.counts) * ranks_of(self.how.group)

    def chunk_tokens(self, head: ops.Head, chunk_bytes: int | None) -> int:
        """As of Alone, everybody's."""
        return self.journey.most * ranks_of(self.how.group)

    def sizes(self, tokens: int, _: int) -> list[int]:
        """As many on every rank; the last ones may be of no token."""
        return self.journey.shares(tokens)

    def gathered(self, head: ops.Head) -> ops.Head:
        """This rank's own, until their turn comes."""
        return head

    def total(self, head: ops.Head, counted: Counted) -> visits.DHidden:
        """Where dhidden of this rank's tokens is added up."""
        like, dtype = head.hidden, ops.waiting_dtype(head.hidden)
        return visits.DHidden(self.how, like.new_zeros(like.shape, dtype=dtype))

    def chunk(self, head: ops.Head, i: int) -> tuple[TokenStats, Backward]:
        """As of Alone; dhidden is this rank's summands for everybody."""
        stats, of_chunk = visits.chunk(head, self.journey.turn(i, head.labels.device))

        def backward(gradients: tuple[Tensor, ...], sums: ops.Sums) -> Tensor:
            return of_chunk(ops.Upstream(*gradients), sums)

        return TokenStats(stats.logprobs, stats.entropy), backward

    def two_passes(
        self, head: ops.Head, chunk_bytes: int | None, grad_filter: float | None
    ) -> TokenStats:
        """As of Alone."""
        limits = ops.Limits(IGNORE_INDEX, ops.scratch_bytes(head.hidden.device, chunk_bytes))
        return TokenStats(*own_tokens.statistics(head, limits, self.journey)[:2])


def has_entropy(loss: object) -> bool:
    """Whether a loss may depend on the entropy: one that does not say so may."""
    return bool(getattr(loss, "entropy_coef", True))


Policies = Alone | Adapted | BesideReference | Kept | Spread | OwnTokens


def flattened(
    hidden: Tensor,
    head: LMHead,
    batch: TokenBatch,
    temperature: float | Tensor,
    reference: tuple[Tensor, object] | None,
    loss: object,
    grad_filter: float | None,
) -> tuple[Heads, Policies]:
    """linear_policy_loss's arguments, checked and flat [N, ...]; the reference without gradient."""
    labels = batch.labels.reshape(batch.shape)
    if batch.kept is not None:
        flat, how = spread_arguments(hidden, head, labels, temperature)
        return ops.KeptHead.of(flat, ops.Sets(batch.kept, batch.cu_kept)), Kept(how)
    if reference is None:
        # A filter is known where all of the weight is trained.
        arguments = own_arguments if grad_filter is None else spread_arguments
        flat, how = arguments(hidden, head, labels, temperature)
        if how is None:
            kind = Adapted if isinstance(flat, ops.AdaptedHead) else Alone
            return flat, kind(ops.Given(has_entropy(loss)))
        return flat, OwnTokens(how) if how.hidden is Hidden.OWN_TOKENS else Spread(how)
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
    policy = Side(hidden, head, temperature, "")
    beside = Side(ref_hidden.detach(), ref_head.detached(), temperature, "ref_")
    divergence = getattr(loss, "divergence", Divergence.REVERSE)
    return two_heads(policy, beside, labels), BesideReference(divergence)
