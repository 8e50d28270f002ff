"""linear_policy_loss: a policy loss, and its gradients, straight from hidden states and the head.

losses/policy.py says what a policy loss is, losses/named.py has those that have a name. This is the
only room that knows the vocabulary and the loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_rl import checks, ops
from fused_rl.derivatives import transformed
from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import flat_arguments, flat_top_logprobs, named
from fused_rl.losses.batch import TokenBatch, is_batch
from fused_rl.losses.named import NAMES
from fused_rl.losses.policy import (
    Loss,
    LossOutput,
    PolicyLoss,
    Terms,
    chosen,
    differentiated,
    placed,
)
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
        chunk_bytes: bound on the buffer for logits; default 256 MiB, on CUDA a 56th of the
            card's memory and 1 GiB at least.
        grad_filter: as for linear_logprobs; it takes the two passes.

    Returns:
        LossOutput(loss, metrics). A batch without counted tokens has loss 0 and gradients of zeros.

    Raises:
        ValueError: as for linear_logprobs, and as the loss raises.
    """
    head = LMHead.of(head)
    _are_arguments(hidden, batch, loss)
    checks.chunk_bytes_is_positive(chunk_bytes)
    checks.grad_filter_is_possible(grad_filter, hidden.device)
    labels = batch.labels.reshape(batch.shape)
    flat = flat_arguments(hidden, head, labels, temperature)
    trained = torch.is_grad_enabled() and any(_needs(flat))
    separable = getattr(loss, "token_separable", False) and not torch.compiler.is_compiling()
    one_pass = trained and separable and grad_filter is None and not transformed()
    if one_pass and checks.has_values(hidden):
        most = ops.chunk_tokens(flat.hidden, flat.weight, chunk_bytes)
        if ops.one_pass_pays(len(flat.hidden), most, hidden.device, head.requires_grad):
            return _one_pass(flat, batch, _Pass(loss, flat.scale, flat.softcap, most))
    options = (IGNORE_INDEX, chunk_bytes, grad_filter)
    logprobs, entropy, _ = _named(flat_top_logprobs, flat, *options, shape=batch.shape)
    return loss(TokenStats(logprobs, entropy), batch)


def _one_pass(head: ops.Head, batch: TokenBatch, way: _Pass) -> LossOutput:
    *operands, _, _ = head
    tokens = (head.labels, head.temperature, len(head.weight), IGNORE_INDEX)
    _named(ops.check_tokens, *tokens, shape=batch.shape)
    output, gradients = way.formed(operands, batch, _needs(operands))
    loss = _OnePass.apply(*operands, batch, way, output.loss, gradients)
    return LossOutput(loss, output.metrics)


def _named(op: Callable, *args: object, shape: torch.Size) -> Any:
    """named(op, ...); a batch has made -1 of what counts and is negative or IGNORE_INDEX."""
    try:
        return named(op, *args, shape=shape)
    except ValueError as error:
        said = re.sub(
            r" is -1, (outside the vocabulary \[0, \d+\)).*",
            r" counts by loss_mask and is negative, \1",
            str(error),
        )
        raise ValueError(said) from error


def _needs(operands: Sequence[Tensor | None]) -> list[bool]:
    """Which of hidden, weight and bias have gradients."""
    return [t is not None and t.requires_grad for t in operands[:3]]


def _are_arguments(hidden: Tensor, batch: TokenBatch, loss: Loss) -> None:
    checks.is_floating("hidden", hidden)
    is_batch(batch)
    checks.is_callable("loss", loss, "fused_rl.grpo()")
    checks.require(
        not any(loss is maker for maker in NAMES.values()),
        lambda: f"loss must be a loss, got the function that makes one: give {loss.__name__}(...)",
    )


class HeadGradients(NamedTuple):
    """Of a loss, in the dtype in which they wait for its scale; None where not needed."""

    dhidden: Tensor | None  # [N, H]
    dweight: Tensor | None  # [V, H]
    dbias: Tensor | None  # [V]


class _Counted(NamedTuple):
    """The tokens that count, in chunks: where all do, views take the place of copies."""

    tokens: int  # of the batch, N
    rows: Tensor | None  # [n] int64: those that count; None: all
    chunks: list[slice] | list[Tensor]

    @classmethod
    def of(cls, loss_mask: Tensor, most: int) -> _Counted:
        rows = loss_mask.nonzero()[:, 0]
        sizes = ops.chunk_sizes(len(rows), most)
        if len(rows) < len(loss_mask):
            return cls(len(loss_mask), rows, list(rows.split(sizes)) if sizes else [])
        bounds = pairwise(accumulate(sizes, initial=0))
        return cls(len(loss_mask), None, [slice(*pair) for pair in bounds])

    def add(self, total: Tensor | None, part: Tensor, chunk: slice | Tensor) -> Tensor:
        """total [N, H], None at first, with part [n, H] at the tokens of a chunk."""
        if len(part) == self.tokens:
            return part
        if total is None:
            room = part.new_empty if self.rows is None else part.new_zeros
            total = room(self.tokens, *part.shape[1:])
        total[chunk] = part
        return total


class _Part(NamedTuple):
    """What one evaluation of a loss gave."""

    stats: TokenStats  # [n] each, of all tokens or of a chunk's
    value: Tensor  # []
    rest: Terms | dict | None
    gradients: tuple[Tensor, Tensor]  # dlogprobs and dentropy, [n]


class _Evaluation:
    """A loss evaluated once: at all tokens where one chunk holds them, else chunk by chunk."""

    def __init__(self, loss: Loss, batch: TokenBatch, counted: _Counted) -> None:
        self.loss, self.batch, self.counted = loss, batch, counted
        self.several = len(counted.chunks) > 1
        # Of a subclass, as of any other function, only what it returns is known.
        self.by_token = type(loss) is PolicyLoss
        self.parts: list[_Part] = []

    def gradients(self, stats: TokenStats, chunk: slice | Tensor) -> tuple[Tensor, ...]:
        """dlogprobs and dentropy [n] of a chunk's tokens, from their statistics [n]."""
        batch = self.batch.select(chunk) if self.several else self.batch
        if not self.several:
            stats = TokenStats(*map(self._placed, stats))
        part = _Part(stats, *differentiated(self._evaluate, stats, batch))
        self.parts.append(part)
        return part.gradients if self.several else chosen(self.counted.rows, *part.gradients)

    def output(self) -> LossOutput:
        """The loss and its metrics, when every chunk has its gradients."""
        if self.by_token:
            terms = Terms(*map(self._joined, zip(*(p.rest for p in self.parts), strict=True)))
            gradients = map(self._joined, zip(*(p.gradients for p in self.parts), strict=True))
            value = terms.losses.sum() if self.several else self.parts[0].value
            return LossOutput(value, self.loss.metrics(terms, self.batch, tuple(gradients)))
        if self.several:
            stats = map(self._joined, zip(*(p.stats for p in self.parts), strict=True))
            return self.loss(TokenStats(*stats), self.batch)
        (part,) = self.parts
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in part.rest.items()}
        return LossOutput(part.value, detached)

    def _evaluate(self, stats: TokenStats, batch: TokenBatch) -> tuple[Tensor, object]:
        if self.by_token:
            return self.loss.evaluate(stats, batch)
        return tuple(self.loss(stats, batch))

    def _joined(self, column: Sequence[Tensor | None]) -> Tensor | None:
        """[N] of what each chunk has of its tokens."""
        if not self.several or column[0] is None:
            return column[0]
        return self._placed(torch.cat(column))

    def _placed(self, values: Tensor) -> Tensor:
        return placed(values, self.counted.rows, self.counted.tokens)


class _Pass(NamedTuple):
    """How a loss and its gradients are formed, apart from the tensors that they are formed of."""

    loss: Loss
    scale: float
    softcap: float
    most: int  # tokens of a chunk

    @torch.no_grad()
    def formed(
        self, operands: Sequence[Tensor | None], batch: TokenBatch, needs: Sequence[bool]
    ) -> tuple[LossOutput, HeadGradients]:
        """The loss and its gradients, chunk by chunk: the logits, their loss, their gradient.

        The gradient of the logits takes the place of the logits, feeds dhidden and dweight, and the
        buffer is used again. With one chunk every row of dweight is finished in one go; with more,
        dweight accumulates in float32.

        Args:
            operands: hidden, weight, bias, labels, temperature, as flat_arguments has them.
            batch: the tokens.
            needs: which gradients, of hidden, weight and bias.
        """
        detached = (None if t is None else t.detach() for t in operands)
        head = ops.Head(*detached, self.scale, self.softcap)
        hidden, weight, bias, *_ = head
        need_hidden, need_weight, need_bias = needs
        counted = _Counted.of(batch.loss_mask, self.most)
        evaluation = _Evaluation(self.loss, batch, counted)
        of_sum = head.dtype if len(counted.chunks) > 1 else ops.waiting_dtype(weight)
        allocate = weight.new_empty if counted.chunks else weight.new_zeros
        dhidden = None
        dweight = allocate(weight.shape if need_weight else 0, dtype=of_sum)
        dbias = allocate(weight.shape[0] if need_bias else 0, dtype=of_sum)
        for i, chunk in enumerate(counted.chunks):
            part = head.at(chunk)
            logprobs, entropy, lse, _, z = ops.linear_logprobs_chunk(part)
            upstream = ops.Upstream(*evaluation.gradients(TokenStats(logprobs, entropy), chunk))
            known, sums = ops.Known(lse, entropy), ops.Sums(dweight, dbias, i > 0)
            of_chunk = ops.linear_logprobs_chunk_backward(
                ops.ChunkLogits(z), upstream, part, known, sums
            )
            del z
            dhidden = counted.add(dhidden, of_chunk, chunk) if need_hidden else None
        if not counted.chunks:
            none = hidden.new_empty(0, dtype=head.dtype)
            evaluation.gradients(TokenStats(none, none), slice(0))
            dhidden = hidden.new_zeros(hidden.shape, dtype=ops.waiting_dtype(hidden))
        gradients = HeadGradients(
            dhidden if need_hidden else None,
            dweight.to(ops.waiting_dtype(weight)) if need_weight else None,
            dbias.to(ops.waiting_dtype(bias)) if need_bias else None,
        )
        return evaluation.output(), gradients


class _OnePass(torch.autograd.Function):
    """Attaches a loss to its operands; backward hands over the gradients that it has, scaled.

    They are handed over themselves, not copied: dweight is as large as the head. A second backward
    through a retained graph forms them again.

    Every tensor that outlives the forward pass is saved as torch saves them: it goes with the first
    backward pass, offloading hooks see it, and one that was changed in place meanwhile is an error,
    those of the loss (a beta, say) included.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, batch, way, loss, gradients):
        operands = (hidden, weight, bias, labels, temperature)
        tensors, ctx.of_batch = batch.parts()
        ctx.save_for_backward(*operands, *gradients, *tensors, *_tensors(way.loss))
        ctx.way, ctx.spent = way, False
        return loss.detach()

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
            _, gradients = ctx.way.formed(operands, batch, ctx.needs_input_grad[:3])
        ctx.spent = True
        # Without their version counters: a second backward pass may read what else was saved.
        gradients = [None if g is None else g.data for g in gradients]
        scale_([g for g in gradients if g is not None], dloss)
        pairs = zip(gradients, operands, strict=False)
        return (*(None if g is None else g.to(t.dtype) for g, t in pairs), *(None,) * 6)


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
