"""Log-probs and entropies of a head of which the last columns alone are trained: 2 NHV, and 4 more.

The two products that form the gradient of the logits' chunk have H columns each; that of the
weight, the third, has but a few. linear/adapted.py has where such a head comes from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunk import (
    ChunkLogits,
    Sums,
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
    tokens_of_chunk,
)
from fused_rl.ops.chunks import counted_rows
from fused_rl.ops.formulas import live
from fused_rl.ops.linear import linear_logprobs
from fused_rl.ops.record import (
    Given,
    Gradients,
    Head,
    Known,
    Limits,
    Operator,
    Statistics,
    Upstream,
)


class AdaptedHead(NamedTuple):
    """Head, whose weight is not trained but for its last k columns.

    `hidden` and `up` have the gradients, in their dtypes. Their values are not looked at: `states`
    and the last columns of weight have them, perhaps with fewer digits.
    """

    hidden: Tensor  # [N, K]
    up: Tensor  # [V, k], k <= K
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N]
    scale: float
    softcap: float
    rounding: int
    states: Tensor  # [N, K]
    weight: Tensor  # [V, K]

    @property
    def dtype(self) -> torch.dtype:
        """What the logits are formed in."""
        return self.head().dtype

    def at(self, rows: Tensor | slice) -> "AdaptedHead":
        """The same for some of the tokens, but for `hidden`."""
        states, labels, temperature = self.states[rows], self.labels[rows], self.temperature[rows]
        return self._replace(states=states, labels=labels, temperature=temperature)

    def head(self) -> Head:
        """The same with a weight that is not trained."""
        return Head(self.states, self.weight, *self[2:8])

    def sums(self, sums: Sums) -> Sums:
        """With dhidden in float32 where hidden has more digits than states."""
        return sums._replace(partial=self.hidden.dtype != self.states.dtype)


class AdaptedNeeds(NamedTuple):
    need_dhidden: bool
    need_dup: bool
    need_dbias: bool


@Operator
def linear_logprobs_adapted(head: AdaptedHead, limits: Limits) -> Statistics:
    """linear_logprobs, whose gradient of the weight is that of its last columns."""
    return linear_logprobs(head.head(), limits)


@linear_logprobs_adapted.fake
def _(head: AdaptedHead, limits: Limits) -> Statistics:
    return linear_logprobs(head.head(), limits)


@Operator
def linear_logprobs_adapted_backward(
    upstream: Upstream,
    head: AdaptedHead,
    limits: Limits,
    given: Given,
    needs: AdaptedNeeds,
) -> Gradients:
    """Tokens whose upstream gradients are both 0 cost nothing. dweight is that of up."""
    whole, (need_dhidden, need_dup, need_dbias) = head.head(), needs
    chosen = live(upstream, head.labels, limits.ignore_index)
    # A chunk has labels of the vocabulary alone.
    whole = whole._replace(labels=whole.labels.where(chosen, 0))
    upstream = Upstream(*(g.where(chosen, 0.0) for g in upstream))
    chunks = counted_rows(chosen, tokens_of_chunk(whole, given, limits.chunk_bytes))
    dtypes = [head.up.dtype, head.weight.dtype if head.bias is None else head.bias.dtype]
    # What is added up is rounded once.
    sums = [whole.dtype] * 2 if len(chunks) > 1 else dtypes
    dup = head.up.new_zeros(head.up.shape if need_dup else 0, dtype=sums[0])
    dbias = head.up.new_zeros(len(head.up) if need_dbias else 0, dtype=sums[1])
    dhidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format)
    for i, rows in enumerate(chunks):
        part = whole.at(rows)
        _, entropy, lse, _, z = linear_logprobs_chunk(part, given)
        of_part = Upstream(*(g[rows] for g in upstream))
        into = (part, Known(lse, entropy), head.sums(Sums(dup, dbias, i > 0)))
        dhidden[rows] = linear_logprobs_chunk_backward(ChunkLogits(z), of_part, *into).to(
            dhidden.dtype
        )
        del z
    return Gradients(
        dhidden if need_dhidden else dhidden.new_empty(0), dup.to(dtypes[0]), dbias.to(dtypes[1])
    )


@linear_logprobs_adapted_backward.fake
def _(
    upstream: Upstream,
    head: AdaptedHead,
    limits: Limits,
    given: Given,
    needs: AdaptedNeeds,
) -> Gradients:
    hidden, up, bias, *_ = head
    return Gradients(
        hidden.new_empty(hidden.shape if needs.need_dhidden else 0),
        up.new_empty(up.shape if needs.need_dup else 0),
        bias.new_empty(bias.shape) if needs.need_dbias else head.weight.new_empty(0),
    )


linear_logprobs_adapted.differentiate(linear_logprobs_adapted_backward, of="linear_logprobs")
