"""linear_preference_loss: a preference loss, with its gradients, from hidden states and the head.

A pair's loss is known when both of its sequences are, so that no token's gradient is before all of
their logits were formed once: two passes over the vocabulary, not one. The loss between them is of
numbers per token.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fused_rl import checks
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_logprobs
from fused_rl.losses.policy import LossOutput
from fused_rl.losses.preference.batch import PreferenceBatch, is_preference_batch
from fused_rl.losses.preference.loss import Loss, of_batch
from fused_rl.losses.preference.named import NAMES
from fused_rl.one_pass.policy_loss import linear_policy_loss


def linear_preference_loss(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    batch: PreferenceBatch,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int | None = None,
    grad_filter: float | None = None,
    reference: tuple[Tensor, LMHead | Tensor | nn.Linear] | None = None,
) -> LossOutput:
    """A preference loss straight from hidden states, without the logits of either side.

    Cost in multiples of N H V multiply-adds: 8, or 4 if the head is not trained; 2 without
    gradients. A reference adds 2, the weights of wpo() 2. Tokens that no mask holds cost nothing;
    sequences whose gradient is 0 (mismatched ones, pairs beyond a hinge) only their forward pass.

    Micro-batches of pairs add up to the batch where the loss is given num_pairs of the whole step,
    and num_tokens if it has a likelihood term. Not so where a loss looks at the batch as a whole:
    AOT ranks each micro-batch, KTO and BCO have a reference point of each.

    Args:
        hidden: [*labels.shape, H], labels those that the batch was built from: the states that
            predict them.
        head: LMHead, a weight [V, H], or a torch.nn.Linear; as for linear_policy_loss.
        batch: the sequences.
        loss: one of fused_rl.preference, or any function (TokenStats, PreferenceBatch) ->
            LossOutput.
        temperature: a number, or a tensor that broadcasts to labels; preference losses are meant
            for 1.
        chunk_bytes, grad_filter: as for linear_logprobs.
        reference: (ref_hidden [*labels.shape, H'], ref_head), whose log-probs are formed without
            gradient; or None: the batch has them, or the loss needs none.

    Returns:
        LossOutput(loss, metrics). Without pairs the loss is 0 and gradients are zeros.

    Raises:
        ValueError: as for linear_logprobs, and as the loss raises; a reference for a batch that has
            ref_logprobs; kept sets, which say how answers were sampled.
    """
    is_preference_batch(batch)
    checks.require(
        batch.tokens.kept is None,
        lambda: (
            "the tokens of the batch have kept sets, and preferences compare log-probs over the "
            "whole vocabulary: build the batch without them, or take linear_policy_loss"
        ),
    )
    checks.is_callable("loss", loss, "fused_rl.preference.dpo()")
    checks.require(
        not any(loss is maker for maker in NAMES.values()),
        lambda: f"loss must be a loss, got the function that makes one: give {loss.__name__}(...)",
    )
    head, labels = LMHead.of(head), batch.tokens.labels.reshape(batch.tokens.shape)
    options = {"temperature": temperature, "chunk_bytes": chunk_bytes}
    if reference is not None:
        batch = batch.with_reference(_of_reference(reference, batch, labels, options))
    if getattr(loss, "is_aligned", False) and batch.sharp_logprobs is None:
        batch = replace(batch, sharp_logprobs=_sharp(hidden, head, labels, options))
    formed = of_batch(loss, batch)
    return linear_policy_loss(
        hidden, head, batch.tokens, formed, grad_filter=grad_filter, **options
    )


def _of_reference(
    reference: object, batch: PreferenceBatch, labels: Tensor, options: dict
) -> Tensor:
    """The reference's log-probs, in the shape of labels."""
    checks.require(
        isinstance(reference, tuple) and len(reference) == 2,
        lambda: f"reference must be (ref_hidden, ref_head), got {checks.shown(reference)}",
    )
    checks.require(
        not batch.has_reference,
        lambda: "the batch has ref_logprobs, and a reference is given: give one of them",
    )
    with torch.no_grad():
        try:
            return linear_logprobs(*reference, labels, **options).logprobs
        except ValueError as error:
            raise ValueError(f"of the reference: {error}") from error


@torch.no_grad()
def _sharp(hidden: Tensor, head: LMHead, labels: Tensor, options: dict) -> Tensor:
    """[N]: the policy's log-probs at half the temperature."""
    if not isinstance(options["temperature"], Tensor):
        checks.is_positive("temperature", options["temperature"])
    half = {**options, "temperature": options["temperature"] / 2}
    if not any(adapter.dropout for adapter in head.adapters):
        return linear_logprobs(hidden, head, labels, **half).logprobs.reshape(-1)
    # Adapters draw the same dropout again for the loss.
    with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
        return linear_logprobs(hidden, head, labels, **half).logprobs.reshape(-1)
