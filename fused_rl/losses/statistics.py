"""What losses do with the statistics of their tokens: flatten them, and differentiate by them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fused_rl import checks
from fused_rl.losses.batch import TokenBatch, outside_inference
from fused_rl.reference import promoted
from fused_rl.stats import DivergenceStats, TokenStats

Stats = TokenStats | DivergenceStats

# What a loss trains; the rest of the statistics is a reference's, and has no gradient here.
_OF_POLICY = ("divergence", "logprobs", "entropy")


def of_policy(stats: Stats) -> tuple[Tensor, ...]:
    """The statistics that belong to the policy, in the order of its gradients."""
    return tuple(getattr(stats, name) for name in _OF_POLICY if hasattr(stats, name))


def flattened(stats: Stats, batch: TokenBatch) -> Stats:
    """[N], with zeros outside loss_mask: whatever is there cannot reach an exp. Half precision
    becomes float32 here, once.

    Raises:
        ValueError: stats that do not fit the batch; DivergenceStats without labels.
    """
    kind = DivergenceStats if isinstance(stats, DivergenceStats) else TokenStats
    checks.require(
        all(t is not None for t in stats),
        lambda: "stats have no logprobs: give linear_divergence the labels of the batch",
    )
    if any(t.numel() != batch.labels.numel() for t in stats):
        raise ValueError(
            "stats must have one entry per token of the batch, got "
            f"{[list(t.shape) for t in stats]} for {list(batch.shape)}"
        )
    return kind(*(t.reshape(-1).where(batch.loss_mask, 0.0) for t in promoted(*stats)))


def with_reference(batch: TokenBatch, flat: Stats) -> TokenBatch:
    """The batch, where it has no ref_logprobs with those of the reference that is in flat [N]."""
    if batch.ref_logprobs is not None or not isinstance(flat, DivergenceStats):
        return batch
    return replace(batch, ref_logprobs=flat.teacher_logprobs.detach())


def chosen(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each at those rows; None: all of them."""
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def placed(part: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """part [..., n] at its rows in [..., N], 0 elsewhere."""
    if rows is None:
        return part
    return part.new_zeros(*part.shape[:-1], N).index_copy(-1, rows, part)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def differentiated(
    evaluate: Callable, stats: Stats, batch: TokenBatch
) -> tuple[Tensor, object, tuple[Tensor, ...]]:
    """A loss evaluated once: its value, what else `evaluate` returns, and its gradients with
    respect to of_policy(stats).

    On a graph of its own, under torch.inference_mode too.

    Args:
        evaluate: (stats, batch) -> (scalar, anything).
        stats: [N] each.
        batch: the tokens.
    """
    # What is saved in here is used in here: hooks that offload or recompute have no part in it.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
        stats = type(stats)(*(outside_inference(t.detach()) for t in stats))
        leaves = [t.requires_grad_() for t in of_policy(stats)]
        tensors, others = batch.parts()
        batch = TokenBatch.of_parts([outside_inference(t) for t in tensors], others)
        value, rest = evaluate(stats, batch)
        return value.detach(), rest, _gradients(value, leaves)


def _gradients(value: Tensor, of: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in of)
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True, **options)


def gradients_at(flat: Stats, loss: Tensor) -> tuple[Tensor, ...] | None:
    """Those with respect to of_policy(flat), from the graph that the caller's own gradients come
    from; None where it does not reach them all, or where hooks would have to give back what the
    graph has saved.
    """
    policys = of_policy(flat)
    if not all(t.requires_grad for t in policys):
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    return _gradients(loss, policys, retain_graph=True)
