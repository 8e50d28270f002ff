"""Log-probs and entropies from logits that are there: one read of them, and one more."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rl.ops.chunks import check_tokens, statistics_like
from fused_rl.ops.formulas import at, live, softmax_gradient, statistics
from fused_rl.ops.record import Known, Operator, Upstream


class Rows(NamedTuple):
    logits: Tensor  # [N, V]
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N]
    ignore_index: int


class RowStatistics(NamedTuple):
    """[N] each, as in Statistics."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


@Operator
def logits_logprobs(given: Rows) -> RowStatistics:
    """z = logits / temperature."""
    logits, labels, temperature, ignore_index = given
    check_tokens(labels, temperature, logits.shape[1], ignore_index)
    out = [t.zero_() for t in statistics_like(logits, logits)[:3]]
    rows = (labels != ignore_index).nonzero()[:, 0]
    z = logits[rows].to(out[0].dtype) / temperature[rows, None]
    for total, part in zip(out, statistics(z, labels[rows]), strict=False):
        total[rows] = part
    return RowStatistics(*out)


@logits_logprobs.fake
def _(given: Rows) -> RowStatistics:
    return RowStatistics(*statistics_like(given.logits, given.logits)[:3])


@Operator
def logits_logprobs_backward(upstream: Upstream, given: Rows, known: Known) -> Tensor:
    """dlogits [N, V], in the dtype of logits."""
    logits, labels, temperature, ignore_index = given
    dlogits = logits.new_zeros(logits.shape)
    rows = live(upstream, labels, ignore_index).nonzero()[:, 0]
    t = temperature[rows, None]
    logp = torch.log_softmax(logits[rows].to(t.dtype) / t, -1)
    dz = softmax_gradient(at(rows, upstream), known.entropy[rows], logp, labels[rows])
    dlogits[rows] = (dz / t).to(logits.dtype)
    return dlogits


@logits_logprobs_backward.fake
def _(upstream: Upstream, given: Rows, known: Known) -> Tensor:
    return given.logits.new_empty(given.logits.shape)


logits_logprobs.differentiate(logits_logprobs_backward, of="logprobs_from_logits")
