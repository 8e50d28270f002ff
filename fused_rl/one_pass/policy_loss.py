"""linear_policy_loss: a policy loss, and its gradients, straight from hidden states and the head.

losses/policy.py says what a policy loss is, losses/named.py has those that have a name, and
losses/distillation.py those that learn from a teacher.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.linear.arguments import named
from fused_rl.linear.head import LMHead
from fused_rl.losses import distillation
from fused_rl.losses.batch import TokenBatch, is_batch
from fused_rl.losses.named import NAMES
from fused_rl.losses.policy import Loss, LossOutput
from fused_rl.losses.statistics import with_reference
from fused_rl.one_pass.chunks import Way, needs, one_pass
from fused_rl.one_pass.cuts import Heads
from fused_rl.one_pass.kept import Kept
from fused_rl.one_pass.policies import Adapted, Alone, Policies, flattened, has_entropy
from fused_rl.parallel.states import Hidden
from fused_rl.parallel.visits import told

_MAKERS = (*NAMES.values(), *(getattr(distillation, name) for name in distillation.__all__))


def linear_policy_loss(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    batch: TokenBatch,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int | None = None,
    grad_filter: float | None = None,
    reference: tuple[Tensor, LMHead | Tensor | nn.Linear] | None = None,
) -> LossOutput:
    """A policy loss straight from hidden states, with the gradients of hidden, weight and bias.

    Where the loss is token-separable, one pass forms it with its gradients, chunk by chunk: 6 NHV,
    or 4 NHV if the head is not trained, or its adapters alone are; tokens outside loss_mask cost
    nothing, those whose gradient is 0 (clipped, zero advantage) only their logits. Otherwise it
    takes two passes through linear_logprobs, 8 NHV, with the same values and gradients: for a loss
    that is not separable, inside torch.compile or torch.func, without values (the device meta,
    FakeTensorMode), and where a trained head would need several chunks whose dweight costs more to
    add up than the logits to form again (on CPUs: several chunks of fewer than 1024 tokens).

    A batch with kept sets (TokenBatch.with_kept) has the loss of log-probs renormalised over them,
    beside the entropy of the whole distribution: 2 NHV and a backward pass that looks at the kept
    entries only; with an entropy bonus 6 NHV in one pass, 4 if the head is not trained.

    With a reference, or a teacher, the loss gets the exact divergence of the policy from it at each
    token: 8 NHV in one pass, 12 in the two of linear_divergence, 6 if the head is not trained.

    Until its backward pass a loss of one pass keeps its gradients, dhidden and dweight; afterwards
    nothing, as any loss. What it was formed of must not be changed in place in between.

    Args:
        hidden: [*batch.shape, H]: the states that predict the batch's labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear. Of one whose vocabulary is spread over
            the ranks of a group every rank makes the call, with the same batch and loss unless
            head.hidden is Hidden.OWN_TOKENS.
        batch: the tokens. With kept sets its old, reference and rollout log-probs are renormalised
            over the same sets.
        loss: a PolicyLoss, one of fused_rl.distillation, or any function (TokenStats, TokenBatch)
            -> LossOutput of flat tensors; with an attribute `token_separable = True` it takes the
            one pass, and must then be a sum over tokens whose normalisers come from the batch's
            counts. With a reference it is given DivergenceStats: its attribute `divergence` says
            which, Divergence.REVERSE where it has none.
        temperature: a number, or a tensor that broadcasts to batch.shape: what the tokens were
            sampled at.
        chunk_bytes: bound on the buffer for logits; default 256 MiB, on CUDA a 56th of the
            card's memory and 1 GiB at least.
        grad_filter: as for linear_logprobs; it takes the two passes, and no reference.
        reference: (ref_hidden [*batch.shape, H'], ref_head), the reference's or the teacher's
            states for the same tokens and its head over the same vocabulary, at the policy's
            temperature. They get no gradient. The loss finds the log-probs of the labels under it
            as batch.ref_logprobs.

    Returns:
        LossOutput(loss, metrics). A batch without counted tokens has loss 0 and gradients of zeros.

    Raises:
        ValueError: as for linear_logprobs, and as the loss raises; vocabularies of different sizes;
            a reference for a batch that has ref_logprobs: one of them would be ignored; kept sets
            as for linear_kept_logprobs, or with a reference, a grad_filter or Hidden.OWN_TOKENS.
    """
    head = LMHead.of(head)
    # What is wrong on one rank is said on every rank that waits for it.
    with told(head.group, head.hidden, head.weight.device):
        _are_arguments(hidden, batch, loss)
        checks.chunk_bytes_is_positive(chunk_bytes)
        checks.grad_filter_is_possible(grad_filter, hidden.device, head.group)
        _can_have(reference, batch, grad_filter)
        _can_have_sets(head, batch, grad_filter, reference)
        heads, policies = flattened(hidden, head, batch, temperature, reference, loss, grad_filter)
    policies = _named(policies.agreed, heads, chunk_bytes, shape=batch.shape)
    trained = torch.is_grad_enabled() and any(needs(heads))
    separable = getattr(loss, "token_separable", False) and not torch.compiler.is_compiling()
    in_one = trained and separable and grad_filter is None and not transformed()
    if in_one and checks.has_values(hidden) and not _takes_two(policies, heads, loss):
        most = policies.chunk_tokens(heads, chunk_bytes)
        formed = policies.tokens(heads)
        # The sums of adapters' columns are small.
        adds_up = head.requires_grad and not isinstance(policies, Adapted)
        if ops.one_pass_pays(formed, most, hidden.device, adds_up):
            V = len(heads.weight) if head.vocabulary is None else head.vocabulary
            _named(policies.check, heads, V, shape=batch.shape)
            return one_pass(heads, batch, Way(loss, policies, most))
    stats = _named(policies.two_passes, heads, chunk_bytes, grad_filter, shape=batch.shape)
    return loss(stats, with_reference(batch, stats))


def _takes_two(policies: Policies, heads: Heads, loss: object) -> bool:
    """Whether two passes cost no more than one, and hold no logits in between.

    So it is where the gradient of the log-probs is formed with them, and is all that the loss asks
    of the head: then any loss takes 4 NHV. And where it looks at kept entries alone.
    """
    if isinstance(policies, Kept):
        return policies.how is not None or not has_entropy(loss)
    alone = isinstance(policies, Alone) and not any(needs(heads)[1:])
    return alone and ops.walks_once(heads.hidden.device) and not getattr(loss, "entropy_coef", 0)


def _named(op: Callable, *args: object, shape: torch.Size) -> Any:
    """named(op, ...); a batch has made -1 of what counts and is negative or IGNORE_INDEX."""
    try:
        return named(op, *args, shape=shape)
    except ValueError as error:
        said = re.sub(
            r"\b(labels(?:\[[\d, ]*\])?) is -1, (outside the vocabulary \[0, \d+\)).*",
            r"\1 counts by loss_mask and is negative, \2",
            str(error),
        )
        raise ValueError(said) from error


def _are_arguments(hidden: Tensor, batch: TokenBatch, loss: Loss) -> None:
    checks.is_floating("hidden", hidden)
    is_batch(batch)
    checks.is_callable("loss", loss, "fused_rl.grpo()")
    checks.require(
        not any(loss is maker for maker in _MAKERS),
        lambda: f"loss must be a loss, got the function that makes one: give {loss.__name__}(...)",
    )


def _can_have_sets(
    head: LMHead, batch: TokenBatch, grad_filter: float | None, reference: object
) -> None:
    if batch.kept is None:
        return
    checks.require(
        reference is None,
        lambda: (
            "the batch has kept sets, and a reference is given, whose divergence is over the whole "
            "vocabulary: give ref_logprobs over the same sets (linear_kept_logprobs) instead, or "
            "the batch without kept sets"
        ),
    )
    checks.require(
        grad_filter is None,
        lambda: (
            f"grad_filter is for log-probs over the whole vocabulary, got {grad_filter} and a "
            "batch with kept sets: leave it out, their gradient looks at the kept entries alone"
        ),
    )
    checks.require(
        head.hidden is not Hidden.OWN_TOKENS,
        lambda: (
            "a batch with kept sets takes no Hidden.OWN_TOKENS: give the ranks of the group the "
            "same tokens, Hidden.REPLICATED or Hidden.SEQUENCE_SHARDED"
        ),
    )


def _can_have(reference: object, batch: TokenBatch, grad_filter: float | None) -> None:
    checks.require(
        reference is None or batch.ref_logprobs is None,
        lambda: (
            "the batch has ref_logprobs, and a reference is given, which has its own: give one of "
            "them, the reference if its exact divergence is wanted"
        ),
    )
    checks.require(
        reference is None or grad_filter is None,
        lambda: f"grad_filter is for a policy without a reference, got {grad_filter} and both",
    )
