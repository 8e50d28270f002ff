"""Log-probabilities and entropies per token, from hidden states or from logits.

    logprobs[n] = z[n, labels[n]] - log sum_v exp z[n, v]
    entropy[n]  = -sum_v p[n, v] log p[n, v]
    top[n]      = max_v z[n, v] - log sum_v exp z[n, v]
    z           = softcap(scale * (hidden . weight^T + bias)) / temperature

The cost in multiples of N * H * V multiply-adds, a product counting 2: 2 without gradients; 8 with
them (the backward pass recomputes the logits); 4 where the head is not trained; 6 where adapters on
it are all that is, or the loss is known in the forward pass (`linear_policy_loss`: 4 with both),
and for any loss where chunk_bytes has room for all exponentials (bfloat16, on sm_90; on other GPUs
after `trust_kernels(unproven=True)`; on CPUs without softcap, and 8 again for a gradient of the
entropy).
"""

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.linear.arguments import (
    flat_temperature,
    named,
    own_arguments,
    spread_arguments,
)
from fused_rl.linear.head import LMHead
from fused_rl.parallel import own_tokens, two_passes
from fused_rl.parallel.spread import Spread
from fused_rl.parallel.states import Hidden
from fused_rl.parallel.visits import Journey, told
from fused_rl.reference import acc_dtype
from fused_rl.stats import IGNORE_INDEX, TokenStats, TopStats


def linear_logprobs(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
    grad_filter: float | None = None,
) -> TokenStats:
    """Log-probabilities of labels and entropies, without the [N, V] logits.

    Both are differentiable with respect to hidden, weight and bias. Logits are float32 whatever the
    dtype of the inputs. Tokens that are ignored, or whose upstream gradients are 0, cost nothing in
    the passes that do not need them. A head that is not trained gets no gradient, and the backward
    pass is then a scaling of what the forward pass kept ([N, H], in the dtype of hidden).
    torch.autograd.grad(..., hidden) alone forms the gradient of a trained head too, and drops it:
    torch tells no operator which are asked for. Give a detached head to save it.
    Under torch.autocast the matrix product takes the autocast dtype, as F.linear does. A
    float32 head over bfloat16 hidden, or the reverse, needs no cast: docs/limits.md has its cost.
    torch.func.grad, vjp, jacrev and vmap work; forward mode and second derivatives raise.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        labels: [...], int64 or int32, in [0, V) or ignore_index.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        ignore_index: tokens with this label give 0 and 0, and no gradient.
        chunk_bytes: bound on the buffer for logits, where a way needs one; default 256 MiB, on CUDA
            a 56th of the card's memory and 1 GiB at least. Exponentials, 2 V bytes for each token,
            stay in it until the backward pass where those of all tokens fit.
        grad_filter: an approximation: for each token, the backward pass leaves out those groups of
            512 vocabulary entries that hold neither its label nor an entry of at least this
            probability. It pays for peaked distributions; docs/filtered-gradients.md has the error
            beside the time. Values do not change. Kernels for CPUs only. None: the exact gradient.

    Returns:
        TokenStats(logprobs, entropy), each in the shape of labels, in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a label outside [0, V); a temperature
            that is not positive; a grad_filter outside (0, 1), or on CUDA.
        NotImplementedError: a forward-mode or second derivative.
    """
    stats = linear_top_logprobs(
        *(hidden, head, labels),
        temperature=temperature,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        grad_filter=grad_filter,
    )
    return TokenStats(*stats[:2])


def linear_top_logprobs(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int | None = None,
    grad_filter: float | None = None,
) -> TopStats:
    """linear_logprobs, and the log-probability of the most likely token, at no further cost.

    `stats.logprobs == stats.top_logprobs` says whether the label is that token, the one of greedy
    decoding. Where entries of the vocabulary tie, each of them is the most likely one: those whose
    logits are equal, and those so near the largest that their log-probabilities round to the same
    number. No label's log-probability is above top_logprobs.

    Args:
        hidden: [..., H], float16, bfloat16, float32 or float64: the states that predict labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        labels: [...], int64 or int32, in [0, V) or ignore_index.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        ignore_index: tokens with this label give 0, 0 and 0, and no gradient; the comparison is
            true there and means nothing.
        chunk_bytes, grad_filter: as for linear_logprobs.

    Returns:
        TopStats(logprobs, entropy, top_logprobs), each in the shape of labels, in nats. The first
        two are those of linear_logprobs, bit by bit; top_logprobs has no gradient. A token with a
        NaN among its logits has NaN in all three, and is never the most likely one.

    Raises:
        ValueError: as for linear_logprobs.
    """
    head = LMHead.of(head)
    with told(head.group, head.hidden, head.weight.device):
        # A filter is known where all of the weight is trained.
        arguments = own_arguments if grad_filter is None else spread_arguments
        flat, spread = arguments(hidden, head, labels, temperature)
        checks.is_integer("ignore_index", ignore_index)
        checks.chunk_bytes_is_positive(chunk_bytes)
        checks.grad_filter_is_possible(grad_filter, hidden.device, head.group)
    options = (ignore_index, chunk_bytes, grad_filter, spread)
    stats = named(flat_top_logprobs, flat, *options, shape=labels.shape)
    return TopStats(*(x.reshape(labels.shape) for x in stats))


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """Log-probabilities of labels and entropies from logits that are already there.

    Known elsewhere as selective_log_softmax. Differentiable with respect to logits.

    Args:
        logits: [..., V], any floating dtype; -inf marks tokens that cannot be sampled.
        labels: [...], int64 or int32, in [0, V) or ignore_index.
        temperature: a number, or a tensor that broadcasts to labels; positive. No gradient.
        ignore_index: tokens with this label give 0 and 0, and no gradient.

    Returns:
        TokenStats(logprobs, entropy), each in the shape of labels, in nats.

    Raises:
        ValueError: as for linear_logprobs.
    """
    checks.is_floating("logits", logits)
    checks.is_labels(labels)
    checks.leading_shape("logits", logits, labels)
    checks.same_device(logits=logits, labels=labels)
    checks.is_integer("ignore_index", ignore_index)
    checks.require(
        logits.shape[-1] > 0, lambda: f"logits have no vocabulary, got {list(logits.shape)}"
    )
    flat = logits.reshape(-1, logits.shape[-1])
    t = flat_temperature(temperature, labels, acc_dtype(logits))
    rows = ops.Rows(flat, labels.reshape(-1).long(), t, ignore_index)
    logprobs, entropy, _ = named(ops.logits_logprobs, rows, shape=labels.shape)
    return TokenStats(logprobs.reshape(labels.shape), entropy.reshape(labels.shape))


def flat_top_logprobs(
    head: ops.Head | ops.AdaptedHead,
    ignore_index: int,
    chunk_bytes: int | None,
    grad_filter: float | None,
    spread: Spread | None = None,
) -> TopStats:
    """linear_top_logprobs of what own_arguments returns, [N] each."""
    limits = ops.Limits(ignore_index, ops.scratch_bytes(head.hidden.device, chunk_bytes))
    if isinstance(head, ops.AdaptedHead):
        stats = ops.linear_logprobs_adapted(head, limits)
        return TopStats(stats.logprobs, stats.entropy, stats.top)
    hidden, weight, bias, *_ = head
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if spread is not None and spread.hidden is Hidden.OWN_TOKENS:
        journey = Journey.met(head, ignore_index, spread, chunk_bytes)
        return TopStats(*own_tokens.statistics(head, limits, journey))
    if spread is not None:
        return TopStats(*two_passes.statistics(head, limits, spread))
    op, options = ops.linear_logprobs, ()
    if grad_filter is not None and torch.is_grad_enabled():
        op, options = ops.linear_filtered_logprobs, (ops.Filter(grad_filter),)
    elif torch.is_grad_enabled() and not transformed():
        if hidden.requires_grad and not trained:
            op = ops.linear_logprobs_frozen
        elif trained and keeps_exponentials(head, limits):
            op = ops.linear_logprobs_stored
    stats = op(head, limits, *options)
    return TopStats(stats.logprobs, stats.entropy, stats.top)


def keeps_exponentials(head: ops.Head, limits: ops.Limits) -> bool:
    """Whether what there is of the logits stays for the backward pass."""
    if torch.compiler.is_compiling() or not checks.has_values(head.hidden):
        return False
    return ops.exponentials_fit(head, limits) or ops.fits_in_half(head, limits)
