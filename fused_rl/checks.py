"""Errors that name the tensor or option, its shape, dtype and value. Users' mistakes end here."""

import math
import re
from collections.abc import Callable, Sequence
from enum import Enum
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# What torch.export hands over for a size is a symbol.
_REAL = (Real, torch.SymInt, torch.SymFloat)
_INTEGRAL = (Integral, torch.SymInt)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, message: Callable[[], str]) -> None:
    """ValueError with what `message` returns; it is formed only then, as torch.compile demands."""
    if not condition:
        raise ValueError(message())


def shown(value: object) -> str:
    """What was given, short enough for a line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."


def is_real(name: str, value: object) -> None:
    """An int or a float, be it NaN; a bool is one to Python, and a mistake here."""
    require(
        isinstance(value, _REAL) and not isinstance(value, bool),
        lambda: f"{name} must be a number, got {shown(value)}",
    )


def is_bound(name: str, value: object) -> None:
    """A number, infinite where there is to be no bound; not NaN."""
    is_real(name, value)
    require(value == value, lambda: f"{name} must be a number, got {value}")


def is_number(name: str, value: object) -> None:
    is_real(name, value)
    require(-math.inf < value < math.inf, lambda: f"{name} must be finite, got {value}")


def is_positive(name: str, value: object) -> None:
    is_real(name, value)
    require(value > 0, lambda: f"{name} must be positive, got {value}")
    require(value < math.inf, lambda: f"{name} must be finite, got {value}")


def is_not_negative(name: str, value: object) -> None:
    is_number(name, value)
    at_least(name, value, 0)


def is_weight(name: str, value: object) -> None:
    """A number, or a tensor [] whose value may be changed between steps; not negative."""
    if not isinstance(value, Tensor):
        is_not_negative(name, value)
        return
    require(
        value.dim() == 0,
        lambda: f"{name} must be a number or a tensor [], got {list(value.shape)}",
    )
    is_floating(name, value)


def is_integer(name: str, value: object) -> None:
    """One that fits into int64."""
    require(
        isinstance(value, _INTEGRAL) and not isinstance(value, bool) and -(2**63) <= value < 2**63,
        lambda: f"{name} must be a 64-bit integer, got {shown(value)}",
    )


def at_least(name: str, value: float, least: float) -> None:
    require(value >= least, lambda: f"{name} must be at least {least}, got {value}")


def is_one_of(name: str, value: object, kind: type[Enum]) -> None:
    """A member of the Enum `kind`."""
    require(
        isinstance(value, kind),
        lambda: f"{name} must be a {kind.__name__} ({_members(kind)}), got {shown(value)}",
    )


def _members(kind: type[Enum]) -> str:
    return ", ".join(f"{kind.__name__}.{member.name}" for member in kind)


def placed(message: str, shape: Sequence[int], names: str = "labels|temperature") -> str:
    """What an operator says of a flat token, with its place in the caller's shape.

    labels[5] is labels[1, 2] where labels are [2, 3]. names: of the tensors of that shape.
    """

    def place(match: re.Match) -> str:
        name, n = match[1], int(match[2])
        index: list[int] = []
        for size in reversed(shape):
            n, at = divmod(n, size)
            index.insert(0, at)
        return f"{name}{index}" if index else name

    return re.sub(rf"\b({names})\[(\d+)\]", place, message)


def is_callable(name: str, value: object, such_as: str) -> None:
    """A function, or an object that can be called; not the class of such an object."""
    require(
        callable(value) and not isinstance(value, type),
        lambda: f"{name} must be a function or an object like {such_as}, got {shown(value)}",
    )


def is_tensor(name: str, tensor: object) -> None:
    """A torch.Tensor of real numbers, with strides: what every formula here can index."""
    require(
        isinstance(tensor, Tensor),
        lambda: f"{name} must be a torch.Tensor, got {type(tensor).__name__}",
    )
    require(not tensor.is_complex(), lambda: f"{name} must be real, got {tensor.dtype}")
    require(
        tensor.layout == torch.strided and not tensor.is_nested,
        lambda: (
            f"{name} must be strided, got {'nested' if tensor.is_nested else tensor.layout}: give "
            + ("its values, packed, or pad it" if tensor.is_nested else "to_dense() of it")
        ),
    )


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers behind it: not on the device meta, nor under FakeTensorMode."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def is_floating(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    require(
        tensor.dtype in _FLOATING,
        lambda: (
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            + (f": give {name}.float()" if _counts(tensor) else "")
        ),
    )


def _counts(tensor: Tensor) -> bool:
    """Whether float() says the same: integers, such as rewards of 0 and 1, and bool."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def is_indices(name: str, tensor: Tensor) -> None:
    """int64 or int32."""
    given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    require(
        given in (torch.int64, torch.int32),
        lambda: f"{name} must be an int64 or int32 tensor, got {given}",
    )
    is_tensor(name, tensor)


def is_mask(name: str, tensor: Tensor) -> None:
    """bool, or integers that are 0 or 1."""
    is_tensor(name, tensor)
    require(
        tensor.dtype in (torch.bool, torch.int32, torch.int64, torch.uint8),
        lambda: f"{name} must be bool or 0/1 integers, got {tensor.dtype}: give {name}.bool()",
    )


def is_labels(labels: Tensor) -> None:
    is_indices("labels", labels)


def same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    require(
        tensor.shape == other.shape,
        lambda: (
            f"{name} must have the shape of {other_name}, got {name} {list(tensor.shape)} "
            f"and {other_name} {list(other.shape)}"
        ),
    )


def same_device(**tensors: Tensor | None) -> None:
    given = {name: t for name, t in tensors.items() if t is not None}
    if len({t.device for t in given.values()}) > 1:
        places = ", ".join(f"{name} on {t.device}" for name, t in given.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def leading_shape(name: str, tensor: Tensor, labels: Tensor) -> None:
    """tensor is [..., D] where labels is [...]."""
    require(
        tensor.dim() > 0 and tensor.shape[:-1] == labels.shape,
        lambda: (
            f"{name} must be [*labels.shape, D], got {name} {list(tensor.shape)} "
            f"and labels {list(labels.shape)}"
        ),
    )


def are_kept_sets(kept: Tensor, cu_kept: Tensor, labels: Tensor) -> None:
    """[M] and [N + 1] of one device, for N labels; their values are the operators' to check."""
    for name, tensor, shape in (("kept", kept, "[M]"), ("cu_kept", cu_kept, "[N + 1]")):
        is_indices(name, tensor)
        require(
            tensor.dim() == 1,
            lambda name=name, tensor=tensor, shape=shape: (
                f"{name} must be {shape}, got {list(tensor.shape)}"
            ),
        )
    require(
        cu_kept.shape[0] == labels.numel() + 1,
        lambda: (
            f"cu_kept must be [N + 1] = [{labels.numel() + 1}], "
            f"got cu_kept {list(cu_kept.shape)} and labels {list(labels.shape)}"
        ),
    )
    same_device(kept=kept, cu_kept=cu_kept, labels=labels)


def chunk_bytes_is_positive(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None:
        is_integer("chunk_bytes", chunk_bytes)
        is_positive("chunk_bytes", chunk_bytes)


def grad_filter_is_possible(
    grad_filter: float | None, device: torch.device, group: object = None
) -> None:
    """ValueError unless grad_filter is None, or within (0, 1) on a device that has it.

    group: the ranks that the head's vocabulary is spread over.
    """
    if grad_filter is None:
        return
    is_real("grad_filter", grad_filter)
    require(0 < grad_filter < 1, lambda: f"grad_filter must be within (0, 1), got {grad_filter}")
    require(
        device.type != "cuda",
        lambda: f"grad_filter has kernels for CPUs only, got {grad_filter} on {device}",
    )
    require(
        group is None,
        lambda: f"grad_filter is for heads on one rank, got {grad_filter} and a group",
    )
