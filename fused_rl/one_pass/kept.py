"""The policy by what was sampled: its log-probs over the kept sets of a batch.

                            NHV, and M H        how
    no gradient             2
    none of the entropy     2                   two passes: theirs looks at the kept entries only
    of the entropy          6, frozen head 4    one pass
    of any other loss       8, frozen head 6    two passes

The entropy is that of the whole distribution. A token whose set is the whole vocabulary has the
gradients of any other log-prob: 6 NHV more in two passes, 4 in one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fused_rl import ops
from fused_rl.linear.kept import flat_kept_logprobs
from fused_rl.one_pass.cuts import Backward, Here
from fused_rl.parallel.spread import Spread
from fused_rl.stats import IGNORE_INDEX, TokenStats


@dataclass(frozen=True)
class Kept(Here):
    """The policy's head, beside kept sets; with two passes alone where its vocabulary is spread."""

    how: Spread | None
    limits: ops.Limits | None = None
    heads: ClassVar = ops.KeptHead
    stats: ClassVar = TokenStats

    def agreed(self, heads: ops.KeptHead, chunk_bytes: int | None) -> "Kept":
        """With the bound on the room for what the kept entries need."""
        scratch = ops.scratch_bytes(heads.hidden.device, chunk_bytes)
        return replace(self, limits=ops.Limits(IGNORE_INDEX, scratch))

    def check(self, heads: ops.KeptHead, vocabulary: int) -> None:
        """As of the others, and of the sets."""
        super().check(heads, vocabulary)
        head, sets = heads.parts()
        ops.check_kept(head.labels, sets.named(head.labels)[0], vocabulary, IGNORE_INDEX)

    def chunk_tokens(self, heads: ops.KeptHead, chunk_bytes: int | None) -> int:
        """Tokens whose logits a chunk may hold."""
        return ops.tokens_of_chunk(heads.parts()[0], ops.Given(True), chunk_bytes)

    def chunk(self, heads: ops.KeptHead, _: int) -> tuple[TokenStats, Backward]:
        """The statistics of a chunk's tokens [n], and what their gradients go to."""
        head, sets = heads.parts()
        sets, whole = sets.named(head.labels)
        logprobs, entropy, lse, _, z = ops.linear_logprobs_chunk(head, ops.Given(True))
        kept_logprobs, slope = ops.renormalised(head, sets, self.limits)
        logits, known = ops.ChunkLogits(z), ops.Known(lse, entropy)

        def backward(gradients: tuple[Tensor, ...], sums: ops.Sums) -> Tensor:
            dlogprobs, dentropy = gradients
            upstream = ops.Upstream(dlogprobs.where(whole, 0.0), dentropy)
            # A summand, and the rest of it: their sum is rounded once.
            part = sums._replace(partial=True)
            dhidden = ops.linear_logprobs_chunk_backward(logits, upstream, head, known, part)
            of_sets = dlogprobs.masked_fill(whole, 0.0)
            ops.add_to_chunk(dhidden, sums, of_sets, head, sets, slope, self.limits)
            return dhidden.to(ops.waiting_dtype(head.hidden))

        return TokenStats(logprobs.where(whole, kept_logprobs), entropy), backward

    def two_passes(
        self, heads: ops.KeptHead, chunk_bytes: int | None, grad_filter: float | None
    ) -> TokenStats:
        """The statistics of all tokens, [N], for any loss."""
        stats = flat_kept_logprobs(*heads.parts(), self.limits, self.how)
        return TokenStats(stats.kept_logprobs, stats.entropy)
