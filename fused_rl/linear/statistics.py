"""More numbers per token out of one pass over the vocabulary, asked for by name.

    lse[n]        = log sum_v exp z[n, v]
    collision[n]  = sum_v p[n, v]^2
    mean_logit[n] = 1/V sum_v z[n, v]
    top_ids[n]    = the entries with the largest logits, and their log-probs
    z             = softcap(scale * (hidden . weight^T + bias)) / temperature

lse^2 is the z-loss (PaLM, arXiv 2204.02311, section 5). The collision probability is exp of minus
the Renyi entropy of order 2; WPO (arXiv 2406.11827) weighs tokens by it, and the variance of a
baseline that minimises the gradient's takes it.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.linear.arguments import flat_arguments, named
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import keeps_exponentials
from fused_rl.stats import IGNORE_INDEX

MOST_TOP = 32


class Statistic(Enum):
    """What linear_statistics forms where it is asked to."""

    COLLISION = "collision"
    MEAN_LOGIT = "mean_logit"


class LogitStats(NamedTuple):
    """Of each token's distribution; float32, or float64 for float64 inputs.

    In the shape of labels, but for the last two, which have `top` entries more; None for what was
    not asked for. logprobs, entropy and lse have gradients, the others have none.
    """

    logprobs: Tensor  # of labels, in nats
    entropy: Tensor  # in nats
    lse: Tensor
    collision: Tensor | None  # sum of the squared probabilities, in (0, 1]
    mean_logit: Tensor | None  # over the vocabulary, after temperature
    top_ids: Tensor | None  # [..., top] int64, from the most likely on
    top_logprobs: Tensor | None  # [..., top], in nats


def linear_statistics(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    of: Statistic | Sequence[Statistic] = (),
    *,
    top: int = 0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
) -> LogitStats:
    """linear_logprobs, with lse, and more statistics of the same logits, without the [N, V] logits.

    All of it comes out of one pass, 2 NHV; what is asked for costs its arithmetic, and on CUDA,
    whatever it is, the way by tiles of logits, which keeps no exponentials. The backward pass is
    that of linear_logprobs: 6 NHV, or 4 on CPUs where its exponentials fit into chunk_bytes; but
    for a gradient of lse that of linear_logprobs_at, 6. On CPUs a head that is not trained takes 4
    NHV for both passes, unless an entropy has a gradient. Dtypes, torch.autocast, torch.compile
    and torch.func are as for linear_logprobs.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        labels: [...], int64 or int32, in [0, V) or ignore_index.
        of: Statistic.COLLISION, Statistic.MEAN_LOGIT, or both.
        top: how many of the most likely entries, 0 to 32 and at most V. Of entries that tie the
            first of the vocabulary comes first; on CUDA any.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        ignore_index: tokens with this label give 0 everywhere, and no gradient.
        chunk_bytes: as for linear_logprobs; on CUDA a bound on the buffer for logits alone.

    Returns:
        LogitStats(logprobs, entropy, lse, collision, mean_logit, top_ids, top_logprobs).
        `stats.top_ids[..., 0] == labels` says whether the label is the most likely token. A token
        with a NaN among its logits has NaN in all but its top_ids, which mean nothing then.

    Raises:
        ValueError: as for linear_logprobs; anything else in `of`; a `top` out of its bounds; a head
            whose vocabulary is spread over ranks.
        NotImplementedError: a forward-mode or second derivative.
    """
    head = LMHead.of(head)
    head.is_here("linear_statistics")
    asked = _asked(of, top, head)
    flat = flat_arguments(hidden, head, labels, temperature)
    checks.is_integer("ignore_index", ignore_index)
    checks.chunk_bytes_is_positive(chunk_bytes)
    limits = ops.Limits(ignore_index, ops.scratch_bytes(hidden.device, chunk_bytes))
    op = _operator(flat, limits, trained=head.requires_grad)
    stats = named(op, flat, asked, limits, shape=labels.shape)
    lse = stats.lse.to(stats.logprobs.dtype)
    each, many = labels.shape, (*labels.shape, top)
    return LogitStats(
        *(t.reshape(each) for t in (stats.logprobs, stats.entropy, lse)),
        stats.collision.reshape(each) if asked.with_collision else None,
        stats.mean_logit.reshape(each) if asked.with_mean_logit else None,
        *((t.reshape(many) if top else None) for t in (stats.top_ids, stats.top_logprobs)),
    )


def _asked(of: Statistic | Sequence[Statistic], top: int, head: LMHead) -> ops.Asked:
    names = (of,) if isinstance(of, Statistic) else of
    checks.require(
        isinstance(names, (tuple, list)) and all(isinstance(name, Statistic) for name in names),
        lambda: f"of must be a Statistic or several of them, got {checks.shown(of)}",
    )
    checks.is_integer("top", top)
    most = min(MOST_TOP, len(head.weight))
    checks.require(
        0 <= top <= most,
        lambda: f"top must be from 0 to {most} for {len(head.weight)} entries, got {top}",
    )
    return ops.Asked(Statistic.COLLISION in names, Statistic.MEAN_LOGIT in names, top)


def _operator(head: ops.Head, limits: ops.Limits, *, trained: bool) -> Callable:
    """What keeps for the backward pass what spares it the logits, where there is such a thing."""
    on_cpu = head.hidden.device.type == "cpu"
    if not on_cpu or not torch.is_grad_enabled() or transformed():
        return ops.linear_statistics
    if trained:
        keeps = keeps_exponentials(head, limits)
        return ops.linear_statistics_stored if keeps else ops.linear_statistics
    # The gradient of the log-probs, formed with them, for the backward pass to scale.
    return ops.linear_statistics_frozen if head.hidden.requires_grad else ops.linear_statistics
