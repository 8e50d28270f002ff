"""Weights that TRL has gathered from an FSDP2 shard, with the gradient of all ranks.

TRL reads the head's weight without calling the head. Where the head is an FSDP2 unit of its own,
nothing has gathered it, and TRL takes weight.full_tensor(). The backward pass of that is a slice:

    dshard[r] = dweight[r][rows of r]        what a rank's own tokens say of its own rows
    dshard[r] = mean_q dweight[q][rows of r]     what FSDP2 forms of a head that it gathers itself

The first is right where all ranks have the same tokens, as in tensor parallelism; the second then
says the same. So the gradient is averaged before it reaches the slice.
"""

import torch
from torch import Tensor


def averaged(weight: Tensor | None) -> Tensor | None:
    """The same values, [V, H] or [V]; a gradient that goes on to a DTensor is averaged over the
    ranks of its mesh, by an all-reduce in the backward pass.

    A weight that FSDP2 has gathered itself, and one that is not trained, are returned themselves.
    """
    if weight is None or not torch.distributed.is_available():
        return weight
    if not torch.distributed.is_initialized() or (mesh := _mesh_behind(weight)) is None:
        return weight
    return _Averaged.apply(weight, mesh)


def _mesh_behind(weight: Tensor) -> object | None:
    """The device mesh of the DTensor that the weight was formed from, if it was of one tensor.

    full_tensor() and casts have one input each; what forms a weight of several tensors (an adapter
    that is merged) does not come by way of TRL's gather.
    """
    node = weight.grad_fn
    while node is not None and not hasattr(node, "variable"):
        inputs = [before for before, _ in node.next_functions if before is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return None if node is None else getattr(node.variable, "device_mesh", None)


class _Averaged(torch.autograd.Function):
    """The identity, whose gradient is the mean of those of all ranks of a device mesh."""

    @staticmethod
    def forward(ctx, weight, mesh):
        ctx.mesh = mesh
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        parts = DTensor.from_local(dweight, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
        return parts.full_tensor(), None
