"""The one pass: a loss and its gradients, chunk by chunk, and where autograd hears of them."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rl import ops
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.policy import Loss, LossOutput
from fused_rl.one_pass.cuts import Heads
from fused_rl.one_pass.evaluation import Counted, Evaluation
from fused_rl.one_pass.policies import Policies


class HeadGradients(NamedTuple):
    """Of a loss, in the dtype in which they wait for its scale; None where not needed."""

    dhidden: Tensor | None  # [N, H]
    dweight: Tensor | None  # [V, H]
    dbias: Tensor | None  # [V]


class Way(NamedTuple):
    """How a loss and its gradients are formed, apart from what they are formed of."""

    loss: Loss
    policies: Policies
    most: int  # tokens of a chunk

    def sizes(self, tokens: int) -> list[int]:
        """Those of the chunks of so many tokens."""
        return self.policies.sizes(tokens, self.most)

    @torch.no_grad()
    def formed(
        self, heads: Heads, batch: TokenBatch, needs: Sequence[bool]
    ) -> tuple[LossOutput, HeadGradients]:
        """The loss and its gradients, chunk by chunk: the logits, their loss, their gradient.

        The gradient of the logits takes the place of the logits, feeds dhidden and dweight, and the
        buffer is used again. With one chunk every row of dweight is finished in one go; with more,
        dweight accumulates in float32.

        Args:
            heads: flat, detached.
            batch: the tokens.
            needs: which gradients, of hidden, weight and bias.
        """
        whole = self.policies.gathered(heads)
        hidden, weight, bias, *_ = whole
        need_hidden, need_weight, need_bias = needs
        counted = Counted.of(batch.loss_mask, self.sizes)
        evaluation = Evaluation(self.loss, batch, counted)
        of_sum = heads.dtype if len(counted.chunks) > 1 else ops.waiting_dtype(weight)
        total = self.policies.total(heads, counted)
        dweight = ops.empty(weight, *(weight.shape if need_weight else (0,)), dtype=of_sum)
        dbias = ops.empty(weight, weight.shape[0] if need_bias else 0, dtype=of_sum)
        if not counted.chunks:
            dweight.zero_()
            dbias.zero_()
        for i, chunk in enumerate(counted.chunks):
            stats, backward = self.policies.chunk(whole.at(chunk), i)
            sums = ops.Sums(dweight, dbias, i > 0)
            of_chunk = backward(evaluation.gradients(stats, chunk), sums)
            del backward
            if need_hidden:
                total.add(of_chunk, chunk)
        if not counted.chunks:
            none = hidden.new_empty(0, dtype=heads.dtype)
            stats = self.policies.stats
            evaluation.gradients(stats(*[none] * len(stats._fields)), slice(0))
        gradients = HeadGradients(
            total.result() if need_hidden else None,
            dweight.to(ops.waiting_dtype(weight)) if need_weight else None,
            dbias.to(ops.waiting_dtype(bias)) if need_bias else None,
        )
        return evaluation.output(), gradients


def detached(heads: Heads) -> Heads:
    """The same without gradient."""
    return type(heads)(*(t.detach() if isinstance(t, Tensor) else t for t in heads))


class _OnePass(torch.autograd.Function):
    """Attaches a loss to its operands; backward hands over the gradients that it has, scaled.

    They are handed over themselves, not copied: dweight is as large as the head. A second backward
    through a retained graph forms them again.

    Every tensor that outlives the forward pass is saved as torch saves them: it goes with the first
    backward pass, offloading hooks see it, and one that was changed in place meanwhile is an error,
    those of the loss (a beta, say) included.
    """

    @staticmethod
    def forward(ctx, way, batch, loss, gradients, *heads):
        tensors, ctx.of_batch = batch.parts()
        ctx.operands = [None if isinstance(t, Tensor) else t for t in heads]
        operands = [t if isinstance(t, Tensor) else None for t in heads]
        ctx.save_for_backward(*gradients, *operands, *tensors, *_tensors(way.loss))
        ctx.way, ctx.spent = way, False
        return loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_policy_loss has no second derivative: call backward without create_graph"
            )
        saved, of_gradients = ctx.saved_tensors, len(HeadGradients._fields)
        gradients, saved = saved[:of_gradients], saved[of_gradients:]
        operands = saved[: len(ctx.operands)]
        if ctx.spent:
            tensors = saved[len(operands) : len(operands) + len(ctx.of_batch)]
            batch = TokenBatch.of_parts(tensors, ctx.of_batch)
            pairs = zip(operands, ctx.operands, strict=True)
            heads = ctx.way.policies.heads(*(b if a is None else a for a, b in pairs))
            _, gradients = ctx.way.formed(detached(heads), batch, ctx.needs_input_grad[4:7])
        ctx.spent = True
        # Without their version counters: a second backward pass may read what else was saved.
        gradients = [None if g is None else g.data for g in gradients]
        scale_([g for g in gradients if g is not None], dloss)
        pairs = zip(gradients, operands, strict=False)
        handed = (None if g is None else g.to(t.dtype) for g, t in pairs)
        return (*[None] * 4, *handed, *[None] * (len(operands) - of_gradients))


def one_pass(heads: Heads, batch: TokenBatch, way: Way) -> LossOutput:
    """The loss, with the gradients of hidden, weight and bias already formed."""
    output, gradients = way.formed(detached(heads), batch, needs(heads))
    loss = _OnePass.apply(way, batch, output.loss, gradients, *heads)
    return LossOutput(loss, output.metrics)


def needs(heads: Heads) -> list[bool]:
    """Which of hidden, weight and bias have gradients."""
    return [t is not None and t.requires_grad for t in heads[:3]]


def _tensors(part: Any) -> list[Tensor]:
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
