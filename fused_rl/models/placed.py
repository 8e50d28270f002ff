"""DTensors of a tensor-parallel plan: the part that is here, and where it lies."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fused_rl.checks import require


def is_placed(tensor: object) -> bool:
    """Whether it is a DTensor. torch.distributed.tensor need not be imported to know."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """A DTensor's numbers, all of them; anything else as it is. For few tokens, not for weights."""
    return tensor.full_tensor() if is_placed(tensor) else tensor


def placed_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has alike, as a DTensor that lies as `like` does, if that is one."""
    if not is_placed(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    here = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return here.redistribute(placements=like.placements)


class Rows(NamedTuple):
    """This rank's rows of a weight [V, H] or bias [V], which pass their gradient on to it."""

    local: Tensor
    group: Any
    start: int
    size: int


def rows_of(name: str, tensor: Any) -> Rows:
    """Of a DTensor that is cut along the vocabulary, on a mesh of one dimension.

    Raises:
        ValueError: another mesh, another placement.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    require(
        len(placements) == 1 and placements[0] == Shard(0),
        lambda: (
            f"{name} is a DTensor on {mesh.ndim}-dimensional {mesh} with {placements}; a "
            "vocabulary-parallel head needs (Shard(dim=0),) on the mesh of its group: under FSDP2 "
            "together with tensor parallelism call it between unshard() and reshard(), or by "
            "model_policy_loss"
        ),
    )
    group, V = mesh.get_group(), tensor.shape[0]
    # As torch cuts: shards of ceil(V / R) rows, the last ones shorter, perhaps empty.
    start = min(V, -(-V // mesh.size()) * mesh.get_local_rank())
    return Rows(tensor.to_local(), group, start, V)


class States(NamedTuple):
    """This rank's hidden states; cut: the dimension along which they are, None: they are whole."""

    local: Tensor
    cut: int | None


def states_of(hidden: Any, group: Any) -> States:
    """Of hidden states that are a DTensor on the mesh of the head's group.

    Raises:
        ValueError: another mesh, a placement that says nothing of tokens, uneven parts.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = hidden.device_mesh, hidden.placements
    require(
        len(placements) == 1 and mesh.get_group() == group,
        lambda: f"hidden is a DTensor on {mesh}, which is not the mesh of the head's group",
    )
    at = placements[0]
    if at == Replicate():
        return States(hidden.to_local(), None)
    cut = at.dim % hidden.dim() if isinstance(at, Shard) else hidden.dim() - 1
    require(
        cut < hidden.dim() - 1 and hidden.shape[cut] % mesh.size() == 0,
        lambda: (
            f"hidden is a DTensor {list(hidden.shape)} with {placements}: it must be replicated, "
            "or cut along its tokens into equal parts"
        ),
    )
    return States(hidden.to_local(), cut)
