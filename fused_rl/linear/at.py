"""Log-probabilities of several vocabulary entries per token: a teacher's top-k, soft targets.

    logprobs[n, k] = z[n, ids[n, k]] - lse[n]        lse[n] = log sum_v exp z[n, v]
    z              = softcap(scale * (hidden . weight^T + bias)) / temperature

One pass over the vocabulary serves any number of entries: 2 NHV, and 6 NHV in the backward pass.
Where lse cancels, as in a softmax over the entries alone, the logits at the entries are enough, and
those are N K H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.linear.arguments import flat_arguments, named
from fused_rl.linear.head import LMHead
from fused_rl.stats import IGNORE_INDEX


class AtStats(NamedTuple):
    """logprobs [..., K] at the ids; lse and entropy [...] of each token's whole distribution.

    float32, or float64 for float64 inputs, in nats.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor


def linear_logprobs_at(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
) -> AtStats:
    """Log-probabilities of K entries per token, lse and entropy, without the [N, V] logits.

    All three are differentiable with respect to hidden, weight and bias. They come out of one pass
    over the vocabulary, whatever K is. A loss whose gradients with respect to a token's logprobs
    add up to exactly 0, with none of lse and entropy (a difference of two of them), has a backward
    pass that looks at the ids only. Dtypes, torch.autocast, torch.compile and torch.func are as for
    linear_logprobs.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict the token.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        ids: [..., K], int64 or int32, in [0, V) or ignore_index, in any order; an entry may stand
            there twice.
        temperature: a number, or a tensor that broadcasts to one number per token; positive. No
            gradient.
        ignore_index: ids with this value give a log-probability of 0 and no gradient: they pad
            lists of different lengths. A token with no other ids gives 0 everywhere, and costs
            nothing.
        chunk_bytes: bound on the buffers for logits, where a way needs one; default 256 MiB.

    Returns:
        AtStats(logprobs [..., K], lse [...], entropy [...]), in nats. For K = 1 on CPUs, logprobs
        and entropy are those of linear_logprobs, bit by bit, and so are their gradients where it
        keeps no exponentials.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an id outside [0, V); a temperature
            that is not positive. On CUDA, where looking would wait for the device, such an id has
            a log-probability of NaN.
        NotImplementedError: a forward-mode or second derivative.
    """
    stats = _called(
        ops.linear_logprobs_at, hidden, head, ids, temperature, ignore_index, chunk_bytes
    )
    tokens = ids.shape[:-1]
    lse = stats.lse.to(stats.logprobs.dtype)
    return AtStats(
        stats.logprobs.reshape(ids.shape), lse.reshape(tokens), stats.entropy.reshape(tokens)
    )


def linear_logits_at(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The logits of K entries per token alone: N K H, and no pass over the vocabulary.

    They are log-probabilities but for a number per token, and enough for what does not know that
    number: a softmax over the ids, a difference of two of them. The gradients of weight and bias
    are 0 outside the ids; they are whole tensors all the same.

    Args:
        hidden, head, ids, temperature, chunk_bytes: as for linear_logprobs_at.
        ignore_index: ids with this value give a logit of 0 and no gradient.

    Returns:
        [..., K], float32, or float64 for float64 inputs.

    Raises:
        ValueError: as for linear_logprobs_at.
        NotImplementedError: a forward-mode or second derivative.
    """
    stats = _called(ops.linear_logits_at, hidden, head, ids, temperature, ignore_index, chunk_bytes)
    return stats.logits.reshape(ids.shape)


def _called(
    op: Callable,
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    ids: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    chunk_bytes: int | None,
) -> Any:
    """op of checked arguments, flattened to [N, ...]; its errors name places in ids."""
    head = LMHead.of(head)
    checks.is_floating("hidden", hidden)
    checks.is_indices("ids", ids)
    checks.require(
        ids.dim() > 0 and ids.shape[-1] > 0 and hidden.shape[:-1] == ids.shape[:-1],
        lambda: (
            "ids must be [*hidden.shape[:-1], K] with K >= 1, "
            f"got ids {list(ids.shape)} and hidden {list(hidden.shape)}"
        ),
    )
    checks.same_device(hidden=hidden, weight=head.weight, ids=ids)
    flat = flat_arguments(hidden, head, ids[..., 0], temperature)
    checks.is_integer("ignore_index", ignore_index)
    checks.chunk_bytes_is_positive(chunk_bytes)
    limits = ops.Limits(ignore_index, ops.scratch_bytes(hidden.device, chunk_bytes))
    arguments = ops.AtHead.of(flat, ids.reshape(-1, ids.shape[-1]).long())
    try:
        return named(op, arguments, limits, shape=ids.shape[:-1])
    except ValueError as error:
        raise ValueError(checks.placed(str(error), ids.shape, "ids")) from error
