"""Groups: the samples of one prompt, which are compared with each other.

Where all are of one size and stand next to each other, group_size = G says it. Otherwise a tensor
in its place says which group each sample is of: any integers, in any order. verl's index, an array
of names, becomes one by torch.from_numpy(numpy.unique(index, return_inverse=True)[1]), and sizes
[P] of groups one after another do by torch.arange(P).repeat_interleave(sizes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rl import checks


@dataclass(frozen=True, eq=False)
class Groups:
    """Values [B] as rows [P, G]: one of each group, filled up where it is smaller than the largest.

    P groups of at most G samples, G at least 1. The rows of groups of one size are the same numbers
    whichever way they are given.
    """

    row: Tensor  # [B] int64: each sample's group
    column: Tensor  # [B] int64: its place there, in the order of the samples
    shape: tuple[int, int]

    @classmethod
    def of(cls, name: str, values: Tensor, group_size: int | Tensor) -> "Groups":
        """The groups of values [B], which errors call by name."""
        if isinstance(group_size, Tensor):
            return cls._of_ids(name, values, group_size)
        checks.is_integer("group_size", group_size)
        checks.require(
            values.dim() == 1 and group_size > 0 and len(values) % group_size == 0,
            lambda: (
                f"{name} must be [B] with B a multiple of group_size = {group_size}, "
                f"got {list(values.shape)}"
            ),
        )
        at = torch.arange(len(values), device=values.device)
        return cls(at // group_size, at % group_size, (len(values) // group_size, group_size))

    @classmethod
    def _of_ids(cls, name: str, values: Tensor, ids: Tensor) -> "Groups":
        checks.require(
            values.dim() == 1 and ids.shape == values.shape,
            lambda: (
                "group_size must be a 64-bit integer, or [B] integers that say which group each of "
                f"{name} {list(values.shape)} is of, got {checks.shown(ids)}"
            ),
        )
        checks.is_indices("group_size", ids)
        checks.same_device(**{name: values, "group_size": ids})
        _, row, sizes = ids.unique(return_inverse=True, return_counts=True)
        order = row.argsort(stable=True)
        starts = sizes.cumsum(0) - sizes
        column = torch.empty_like(row)
        column[order] = torch.arange(len(ids), device=ids.device) - starts[row[order]]
        return cls(row, column, (len(sizes), max([1, *sizes.tolist()])))

    def rows(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[P, G] of values [B]."""
        return values.new_full(self.shape, fill).index_put((self.row, self.column), values)

    def samples(self, rows: Tensor) -> Tensor:
        """[B] of rows [P, G] or [P, 1]."""
        return rows.expand(self.shape)[self.row, self.column]

    @property
    def counted(self) -> Tensor:
        """[P, G] bool: what is not filled up."""
        return self.rows(torch.ones_like(self.row, dtype=torch.bool))

    @property
    def sizes(self) -> Tensor:
        """[P, 1] int64."""
        return self.counted.sum(-1, keepdim=True)
