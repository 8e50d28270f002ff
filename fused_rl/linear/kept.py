"""Log-probabilities of tokens that were sampled under a mask: top-k, top-p, min-p.

    kept_logprobs[n] = z[n, labels[n]] - log sum_{v in kept[n]} exp z[n, v]

A sampler that keeps a part of the vocabulary draws from the distribution renormalised over that
part, so this is the log-probability that the rollout reports and that importance ratios need. The
sets are those of the rollout, replayed: a trainer that chose its own would, wherever the two
differ, divide by the mass of another set.
"""

from typing import NamedTuple

from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.linear.arguments import named, spread_arguments
from fused_rl.linear.head import LMHead
from fused_rl.parallel.kept import kept_statistics
from fused_rl.parallel.spread import Spread
from fused_rl.parallel.states import Hidden
from fused_rl.stats import IGNORE_INDEX


class KeptStats(NamedTuple):
    """Three numbers per token, in the shape of labels; float32, or float64 for float64 inputs."""

    logprobs: Tensor
    entropy: Tensor
    kept_logprobs: Tensor


def linear_kept_logprobs(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
) -> KeptStats:
    """linear_logprobs, and the log-probabilities of labels renormalised over the kept set.

    All three are differentiable with respect to hidden, weight and bias, and come out of one pass
    over the vocabulary, without the [N, V] logits: 2 NHV. A loss of kept_logprobs alone has a
    backward pass that looks at the kept entries only, M H. A gradient of logprobs or of entropy is
    6 NHV more at its tokens, 4 if the head is not trained. exp(logprobs - kept_logprobs) is the
    mass of the kept set.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        labels: [...], int64 or int32, in [0, V) or ignore_index; each in its own kept set.
        kept: [M], int64 or int32: the kept entries of the vocabulary, of one token after another,
            each at most once per token and in any order.
        cu_kept: [N + 1], int64 or int32, rising from 0 to M, with N the number of labels: the set
            of the n-th of the flattened tokens is kept[cu_kept[n] : cu_kept[n + 1]]. A set of -1
            alone is the whole vocabulary: kept_logprobs is logprobs there.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        ignore_index: tokens with this label give 0, 0 and 0, and no gradient; their kept sets,
            which may be empty, are not looked at.
        chunk_bytes: bound on the buffers for logits, where a way needs one; default 256 MiB.

    Returns:
        KeptStats(logprobs, entropy, kept_logprobs), each in the shape of labels, in nats.

    Raises:
        ValueError: as for linear_logprobs; offsets that do not rise from 0 to M; a kept entry
            outside [0, V), or twice in one set; a label that is not in its set. On CUDA, where
            looking would wait for the device, kept_logprobs of such a token is NaN (of every token,
            for wrong offsets).
    """
    head = LMHead.of(head)
    checks.require(
        head.hidden is not Hidden.OWN_TOKENS,
        lambda: (
            "linear_kept_logprobs takes no Hidden.OWN_TOKENS: linear_logprobs, linear_top_logprobs "
            "and linear_policy_loss do"
        ),
    )
    flat, spread = spread_arguments(hidden, head, labels, temperature)
    checks.is_integer("ignore_index", ignore_index)
    checks.chunk_bytes_is_positive(chunk_bytes)
    checks.are_kept_sets(kept, cu_kept, labels)
    limits = ops.Limits(ignore_index, ops.scratch_bytes(hidden.device, chunk_bytes))
    sets = ops.Sets(kept.long(), cu_kept.long())
    stats = named(flat_kept_logprobs, flat, sets, limits, spread, shape=labels.shape)
    return KeptStats(*(x.reshape(labels.shape) for x in stats))


def flat_kept_logprobs(
    head: ops.Head, sets: ops.Sets, limits: ops.Limits, spread: Spread | None = None
) -> KeptStats:
    """linear_kept_logprobs of what spread_arguments returns, [N] each."""
    sets, whole = sets.named(head.labels)
    if spread is None:
        stats = ops.linear_kept_logprobs(ops.KeptHead.of(head, sets), limits)
        logprobs, entropy, kept_logprobs = stats.logprobs, stats.entropy, stats.kept_logprobs
    else:
        logprobs, entropy, kept_logprobs = kept_statistics(head, sets, limits, spread)
    return KeptStats(logprobs, entropy, logprobs.where(whole, kept_logprobs))
