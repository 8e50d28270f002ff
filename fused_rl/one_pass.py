"""linear_policy_loss: a policy loss, and its gradients, straight from hidden states and the head.

What a policy loss is stands in policy.py, the losses that have a name in named.py.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.head import LMHead
from fused_rl.logprobs import (
    HeadGradients,
    chunked_gradients,
    chunks,
    flat_arguments,
    linear_logprobs,
)
from fused_rl.losses.batch import TokenBatch, is_batch
from fused_rl.losses.named import NAMES
from fused_rl.losses.policy import Loss, LossOutput, token_gradients
from fused_rl.stats import IGNORE_INDEX, TokenStats


def linear_policy_loss(
    hidden: Tensor,
    head: LMHead | Tensor | nn.Linear,
    batch: TokenBatch,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int | None = None,
    grad_filter: float | None = None,
) -> LossOutput:
    """A policy loss straight from hidden states, with the gradients of hidden, weight and bias.

    Where the loss is token-separable, one pass forms it with its gradients, chunk by chunk: 6 NHV,
    or 4 NHV if the head is not trained; tokens outside loss_mask cost nothing, those whose gradient
    is 0 (clipped, zero advantage) only their logits. Otherwise it takes two passes through
    linear_logprobs, 8 NHV, with the same values and gradients: for a loss that is not separable,
    inside torch.compile or torch.func, without values (the device meta, FakeTensorMode), and where
    a trained head would need several chunks whose dweight costs more to add up than the logits to
    form again (on CPUs: more than one chunk).

    Until its backward pass a loss of one pass keeps its gradients, dhidden and dweight; afterwards
    nothing, as any loss. What it was formed of must not be changed in place in between.

    Args:
        hidden: [*batch.shape, H]: the states that predict the batch's labels.
        head: LMHead, a weight [V, H], or a torch.nn.Linear.
        batch: the tokens.
        loss: a PolicyLoss, or any function (TokenStats, TokenBatch) -> LossOutput of flat tensors;
            with an attribute `token_separable = True` it takes the one pass, and must then be a sum
            over tokens whose normalisers come from the batch's counts.
        temperature: a number, or a tensor that broadcasts to batch.shape: what the tokens were
            sampled at.
        chunk_bytes: bound on the buffer for logits; default 256 MiB, on CUDA 1 GiB.
        grad_filter: as for linear_logprobs; it takes the two passes.

    Returns:
        LossOutput(loss, metrics). A batch without counted tokens has loss 0 and gradients of zeros.

    Raises:
        ValueError: as for linear_logprobs, and as the loss raises.
    """
    head = LMHead.of(head)
    _are_arguments(hidden, batch, loss)
    labels = batch.labels.reshape(batch.shape)
    checks.chunk_bytes_is_positive(chunk_bytes)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    separable = getattr(loss, "token_separable", False) and not torch.compiler.is_compiling()
    one_pass = trained and separable and grad_filter is None and not transformed()
    one_pass = one_pass and checks.has_values(hidden)
    if not (one_pass and _one_pass_pays(hidden, head, batch, chunk_bytes)):
        options = {"chunk_bytes": chunk_bytes, "grad_filter": grad_filter}
        stats = linear_logprobs(hidden, head, labels, temperature=temperature, **options)
        return loss(TokenStats(*(t.reshape(-1) for t in stats)), batch)
    *operands, scale, softcap = flat_arguments(hidden, head, labels, temperature)
    metrics: dict[str, Tensor] = {}
    formed = _Formed(loss, scale, softcap, chunk_bytes)
    return LossOutput(_OnePass.apply(*operands, batch, formed, metrics), metrics)


def _are_arguments(hidden: Tensor, batch: TokenBatch, loss: Loss) -> None:
    checks.is_floating("hidden", hidden)
    is_batch(batch)
    checks.is_callable("loss", loss, "fused_rl.grpo()")
    checks.require(
        not any(loss is maker for maker in NAMES.values()),
        lambda: f"loss must be a loss, got the function that makes one: give {loss.__name__}(...)",
    )


def _one_pass_pays(
    hidden: Tensor, head: LMHead, batch: TokenBatch, chunk_bytes: int | None
) -> bool:
    """Few chunks, or chunks that are large enough, or no dweight to accumulate over them."""
    sizes = chunks(batch.labels.numel(), hidden, head.weight, chunk_bytes)
    enough = ops.one_pass_tokens(hidden.device)
    return len(sizes) <= 1 or sizes[0] >= enough or not head.requires_grad


class _Formed(NamedTuple):
    """How a loss and its gradients are formed, apart from the tensors that they are formed of."""

    loss: Loss
    scale: float
    softcap: float
    chunk_bytes: int | None

    def gradients(
        self, operands: Sequence[Tensor | None], batch: TokenBatch, needs: tuple[bool, ...]
    ) -> HeadGradients:
        """Of the operands hidden, weight, bias, labels and temperature."""

        def upstream(stats: TokenStats, rows: Tensor) -> tuple[Tensor, Tensor]:
            return token_gradients(self.loss, stats, batch.select(rows))

        detached = (None if t is None else t.detach() for t in operands)
        args = (*detached, self.scale, self.softcap)
        return chunked_gradients(args, batch.loss_mask, upstream, needs, self.chunk_bytes)


class _OnePass(torch.autograd.Function):
    """The loss, with its gradients already formed; backward hands them over, scaled.

    They are handed over themselves, not copies: dweight is as large as the head. A second backward
    through a retained graph forms them again.

    Every tensor that outlives the forward pass is saved as torch saves them: it goes with the first
    backward pass, offloading hooks see it, and one that was changed in place meanwhile is an error,
    those of the loss (a beta, say) included.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, batch, formed, metrics):
        ops.check_tokens(labels, temperature, weight.shape[0], IGNORE_INDEX)
        operands = (hidden, weight, bias, labels, temperature)
        stats, *gradients = formed.gradients(operands, batch, ctx.needs_input_grad[:3])
        tensors, ctx.of_batch = batch.parts()
        ctx.save_for_backward(*operands, *gradients, *tensors, *_tensors(formed.loss))
        ctx.formed, ctx.spent = formed, False
        output = formed.loss(stats, batch)
        metrics.update(output.metrics)
        return output.loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_policy_loss has no second derivative: call backward without create_graph"
            )
        saved = ctx.saved_tensors
        operands, gradients = saved[:5], saved[5:8]
        if ctx.spent:
            batch = TokenBatch.of_parts(saved[8 : 8 + len(ctx.of_batch)], ctx.of_batch)
            _, *gradients = ctx.formed.gradients(operands, batch, ctx.needs_input_grad[:3])
        ctx.spent = True
        # Without their version counters: a second backward pass may read what else was saved.
        gradients = [None if g is None else g.data for g in gradients]
        scale_([g for g in gradients if g is not None], dloss)
        pairs = zip(gradients, operands, strict=False)
        return (*(None if g is None else g.to(t.dtype) for g, t in pairs), *(None,) * 5)


def _tensors(part: object) -> list[Tensor]:
    """Those that a loss is made with."""
    if isinstance(part, Tensor):
        return [part]
    if not is_dataclass(part):
        return []
    return [t for f in fields(part) for t in _tensors(getattr(part, f.name))]


def scale_(gradients: list[Tensor], dloss: Tensor) -> None:
    """Multiplies each by dloss [], in place; by 1, which changes no bit, only off the CPU."""
    # There, to ask would be to wait for the device; not to ask is 0.6 ms of 42 at 1.2 GB of dweight
    # on an H200, and a caller's next kernels are queued meanwhile.
    if dloss.device.type == "cpu" and dloss == 1:
        return
    for gradient in gradients:
        gradient.mul_(dloss)
