"""A policy loss by the model that has the head, whoever shards its weights.

Engines gather a layer's weight by what runs around the layer's own call, and reduce its gradient by
what that leaves on what goes in and comes out. `through` calls a layer, and runs another function
in the place of its forward: inside, the weight is whole, in the backward pass as well.

    FSDP1, FSDP2, ZeRO-3    the head's own call, or that of the module that gathers it
    DDP                     the wrapper's own call, so that it expects gradients
    tensor parallelism      none: the rows of each rank are a vocabulary-parallel head's
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_rl.linear.head import LMHead
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.policy import Loss, LossOutput
from fused_rl.models import asked, parts, sharded
from fused_rl.one_pass.policy_loss import linear_policy_loss

Result = TypeVar("Result")


def model_policy_loss(
    model: Any,
    hidden: Tensor,
    batch: TokenBatch,
    loss: Loss,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int | None = None,
    ask: bool = True,
    logits_dtype: torch.dtype | None = None,
) -> LossOutput:
    """linear_policy_loss with the head of a model, however its weights lie on the ranks.

    Under FSDP1, FSDP2, ZeRO and DistributedDataParallel every rank calls it with tokens of its own,
    be it one without counted tokens, with the counts of `across`; gradients are then those of the
    step, as far as the engine averages them. Under tensor parallelism the ranks of a group call it
    with the same tokens. It runs inside the model's forward, or after it. A plain model is taken
    too.

    Args:
        model: a causal language model of transformers, as LMHead.from_model takes it, or the
            wrapper or engine around it. Where the module that is sharded contains the model, call
            this inside its forward.
        hidden: [*batch.shape, H]: the states that the model's output embeddings would receive, and
            that predict the batch's labels.
        batch: the tokens of this rank.
        loss: as for linear_policy_loss.
        temperature, chunk_bytes: as for linear_policy_loss.
        ask: as for LMHead.from_model. What is asked is the model's own forward, which gathers its
            weights: the first call is made by every rank.
        logits_dtype: as for LMHead.from_model.

    Returns:
        LossOutput(loss, metrics).

    Raises:
        ValueError: as LMHead.from_model and linear_policy_loss; a weight in shards that nothing in
            `model` gathers: on every rank.
    """
    inner = parts.unwrap(sharded.inside(model))
    layer, linear = inner.get_output_embeddings(), parts.output_linear(inner)
    calls = sharded.around(model, layer)
    recipe, outputs = asked.answer(model, ask=ask).recipe, []

    def formed(states: Tensor) -> Tensor:
        parts.is_gathered(inner, linear)
        options = {"temperature": temperature, "chunk_bytes": chunk_bytes}
        head = LMHead.of_layer(recipe, linear, logits_dtype)
        outputs.append(linear_policy_loss(states, head, batch, loss, **options))
        return outputs[0].loss

    def of_layer(states: Tensor) -> Tensor:
        if sharded.gathers(layer):
            return through(layer, lambda _, states: formed(states), states)
        return formed(states)

    value = _nested(calls, of_layer, hidden)
    return LossOutput(exact(value, outputs[0].loss), outputs[0].metrics)


def through(layer: nn.Module, run: Callable[[nn.Module, Tensor], Result], hidden: Tensor) -> Result:
    """run(layer, hidden) in the place of the layer's forward, inside the layer's own call.

    So that whatever engine shards the layer gathers its weight for `run`, and does so again, and
    reduces the gradient, in the backward pass.

    Args:
        layer: a torch.nn.Linear, as FSDP2 and ZeRO-3 have made it, or in FSDP1's wrapper.
        run: is given the linear layer, its weight whole, and the states as the engine hands them on
            (cast by its mixed precision). What it returns are tensors, or tuples and dicts of them;
            what needs gradients is no view.
        hidden: what the layer would be called with.
    """
    linear = sharded.linear_of(layer)
    if sharded.is_called_out_of_turn(layer):
        layer.unshard()
        result = run(linear, hidden)
        if not torch.is_grad_enabled():
            layer.reshard()
        return result
    with in_place_of_forward(linear, lambda states: run(linear, states)):
        # As it is, not as it may have been compiled.
        return layer._call_impl(hidden)


def _nested(calls: Sequence[nn.Module], run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """run(hidden) inside the calls of modules, from the outside in."""
    if not calls:
        return run(hidden)
    outer, rest = calls[0], calls[1:]
    target = outer if sharded.is_fsdp2(outer) else outer.module
    with in_place_of_forward(target, lambda states: _nested(rest, run, states)):
        return outer._call_impl(hidden)


@contextmanager
def in_place_of_forward(module: nn.Module, run: Callable) -> Iterator[None]:
    """Calls of the module run `run`, inside what hooks and wrappers do around its forward."""
    own = vars(module).get("forward")
    module.forward = run
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def exact(value: Tensor, exact: Tensor) -> Tensor:
    """value, which hooks may have rounded to the dtype of a model's outputs, with its gradient."""
    if value.dtype == exact.dtype:
        return value
    wide = value.to(exact.dtype)
    return wide + (exact - wide).detach()
