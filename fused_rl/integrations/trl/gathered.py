"""Weights that TRL has gathered from an FSDP2 shard, with the gradient of all ranks.

TRL reads the head's weight without calling the head. Where the head is an FSDP2 unit of its own,
nothing has gathered it, and TRL takes weight.full_tensor(). The backward pass of that is a slice:

    dshard[r] = dweight[r][rows of r]            what a rank's own tokens say of its own rows
    dshard[r] = mean_q dweight[q][rows of r]     what FSDP2 forms of a head that it gathers itself

The first is right where all ranks have the same tokens, as in tensor parallelism; the second then
says the same. So the gradient is the second: a reduce-scatter, as FSDP2's own.
"""

from typing import Any

import torch
from torch import Tensor

# What lies between a gathered weight and its shard; a cast may come before and after.
_CAST, _GATHER, _PLAIN = "ToCopyBackward0", "RedistributeBackward", "_ToTorchTensorBackward"


def averaged(weight: Tensor | None) -> Tensor | None:
    """The same values, [V, H] or [V]; the gradient of what full_tensor() made of a trained shard is
    averaged over the ranks of its mesh.

    Other weights are returned themselves: those that FSDP2 has gathered, those that are not
    trained, and those of which it was said what their gradient is. LMHead refuses some of them.
    """
    if weight is None or weight.grad_fn is None or not torch.distributed.is_available():
        return weight
    shard = _shard_behind(weight) if torch.distributed.is_initialized() else None
    return weight if shard is None else _Gathered.apply(shard, weight.detach())


def _shard_behind(weight: Tensor) -> Any:
    """The trained DTensor of which a weight is the full_tensor(), or None."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    node, plain = weight.grad_fn, None
    while type(node).__name__ in (_CAST, _GATHER, _PLAIN):
        plain = node if type(node).__name__ == _PLAIN else plain
        node = node.next_functions[0][0]
    shard = getattr(node, "variable", None)
    if plain is None or plain.grad_placements is not None or not isinstance(shard, DTensor):
        return None
    # The rows of two dimensions of a mesh, in strides, are those of tensor parallelism too.
    plainly = all(type(placement) in (Shard, Replicate) for placement in shard.placements)
    return shard if plainly and shard.shape == weight.shape else None


class _Gathered(torch.autograd.Function):
    """The whole weight of a shard; backward is the mean over ranks of the gradients, sharded."""

    @staticmethod
    def forward(ctx, shard, whole):
        ctx.mesh, ctx.placements, ctx.dtype = shard.device_mesh, shard.placements, shard.dtype
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, dweight):
        from torch.distributed.tensor import DTensor, Partial

        of_ranks = [Partial("avg")] * ctx.mesh.ndim
        parts = DTensor.from_local(dweight.to(ctx.dtype), ctx.mesh, of_ranks, run_check=False)
        return parts.redistribute(placements=ctx.placements), None
