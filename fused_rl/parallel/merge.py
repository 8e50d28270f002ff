"""The statistics of a token from those of the parts of its vocabulary, in float64.

    log w_r = lse_r - lse
    logprob = logprob_r + log w_r      entropy = sum_r w_r (entropy_r - log w_r)

No term cancels: lse - sum_r w_r E_r[z] would. Sums are in the order of ranks, so that every rank
has the same bits.
"""

import torch
from torch import Tensor

from fused_rl import ops


def of_part(stats: ops.Statistics | None, own: Tensor) -> Tensor:
    """[4, N] float64: lse, entropy, the label's log-prob (-inf where it is another rank's), top.

    Args:
        stats: of the part; None of an empty one.
        own: [N] bool: the tokens whose label lies in the part.
    """
    out = own.new_full((4, len(own)), -torch.inf, dtype=torch.float64)
    if stats is None:
        out[1] = 0.0
        return out
    logprobs, entropy, lse, top = (t.double() for t in stats[:4])
    # Every entry of the part is at -inf: a mass of 0, whose other numbers are NaN.
    empty = lse == -torch.inf
    parts = (
        lse,
        entropy.masked_fill(empty, 0.0),
        logprobs.masked_fill(~own | empty, -torch.inf),
        top.masked_fill(empty, -torch.inf),
    )
    return torch.stack(parts)


def merged(parts: Tensor, valid: Tensor, dtype: torch.dtype) -> ops.Statistics:
    """[N] each, lse in float64, the others in dtype.

    Args:
        parts: [R, 4, N] float64, of_part of every rank.
        valid: [N] bool: the tokens whose label is in the vocabulary; NaN elsewhere.
        dtype: of the results.
    """
    lse_r, entropy_r, label_r, top_r = parts.unbind(1)
    lse = lse_r.logsumexp(0)
    log_w = lse_r - lse
    w = log_w.exp()
    logprobs = (label_r + log_w).amax(0)
    entropy = torch.where(w == 0, 0.0, w * (entropy_r - log_w)).sum(0)
    top = (top_r + log_w).amax(0)
    nowhere = lse.isnan() | (lse == -torch.inf)
    logprobs = logprobs.masked_fill(nowhere | ~valid, torch.nan)
    entropy, top = (t.masked_fill(nowhere, torch.nan) for t in (entropy, top))
    return ops.Statistics(logprobs.to(dtype), entropy.to(dtype), lse, top.to(dtype))
