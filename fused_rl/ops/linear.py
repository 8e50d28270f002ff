"""Log-probs and entropies from hidden states and a head, in two passes: 2 NHV, and 6 NHV more."""

import torch

from fused_rl.ops.chunks import check_tokens, chunks_of, gradients_like, statistics_like
from fused_rl.ops.formulas import add_gradients, at, live, statistics
from fused_rl.ops.record import (
    Gradients,
    Head,
    Known,
    Limits,
    Needs,
    Operator,
    Statistics,
    Upstream,
)


@Operator
def linear_logprobs(head: Head, limits: Limits) -> Statistics:
    """Nothing of size V is kept.

    Partial vocabularies merge from these four: label logit = logprobs + lse, mean logit =
    lse - entropy, largest logit = top + lse.
    """
    check_tokens(head.labels, head.temperature, head.weight.shape[0], limits.ignore_index)
    out = Statistics(*(t.zero_() for t in statistics_like(head.hidden, head.weight)))
    for rows in chunks_of(head.labels != limits.ignore_index, head, limits.chunk_bytes):
        part = head.at(rows)
        for total, of_part in zip(out, statistics(part.logits(), part.labels), strict=True):
            total[rows] = of_part
    return out


@linear_logprobs.fake
def _(head: Head, limits: Limits) -> Statistics:
    return statistics_like(head.hidden, head.weight)


@Operator
def linear_logprobs_backward(
    upstream: Upstream, head: Head, limits: Limits, known: Known, needs: Needs
) -> Gradients:
    """Tokens whose upstream gradients are both 0 cost nothing."""
    hidden, weight, bias, *_ = head
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape if needs.need_dweight else 0, dtype=head.dtype)
    dbias = weight.new_zeros(weight.shape[0] if needs.need_dbias else 0, dtype=torch.float64)
    chosen = live(upstream, head.labels, limits.ignore_index)
    for rows in chunks_of(chosen, head, limits.chunk_bytes):
        part = head.at(rows)
        of_part = (at(rows, upstream), at(rows, known), part, part.logits())
        dhidden[rows] = add_gradients(*of_part, dweight, dbias).to(hidden.dtype)
    return Gradients(
        dhidden if needs.need_dhidden else hidden.new_empty(0),
        dweight.to(weight.dtype),
        dbias.to(bias.dtype if needs.need_dbias else weight.dtype),
    )


@linear_logprobs_backward.fake
def _(upstream: Upstream, head: Head, limits: Limits, known: Known, needs: Needs) -> Gradients:
    return gradients_like(head, needs)


linear_logprobs.differentiate(linear_logprobs_backward, of="linear_logprobs")
