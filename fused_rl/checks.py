"""Errors that name the tensor, its shape, dtype and value. Users' mistakes end here."""

from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool, message: Callable[[], str]) -> None:
    """ValueError with what `message` returns; it is formed only then, as torch.compile demands."""
    if not condition:
        raise ValueError(message())


def is_floating(name: str, tensor: Tensor) -> None:
    require(
        isinstance(tensor, Tensor),
        lambda: f"{name} must be a torch.Tensor, got {type(tensor).__name__}",
    )
    require(
        tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        lambda: f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}",
    )


def is_labels(labels: Tensor) -> None:
    require(
        isinstance(labels, Tensor) and labels.dtype in (torch.int64, torch.int32),
        lambda: (
            "labels must be an int64 or int32 tensor, got "
            f"{labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}"
        ),
    )


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


def chunk_bytes_is_positive(chunk_bytes: int | None) -> None:
    require(
        chunk_bytes is None or chunk_bytes > 0,
        lambda: f"chunk_bytes must be positive, got {chunk_bytes}",
    )


def grad_filter_is_possible(grad_filter: float | None, device: torch.device) -> None:
    """ValueError unless grad_filter is None, or within (0, 1) on a device that has it."""
    if grad_filter is None:
        return
    require(0 < grad_filter < 1, lambda: f"grad_filter must be within (0, 1), got {grad_filter}")
    require(
        device.type != "cuda",
        lambda: f"grad_filter has kernels for CPUs only, got {grad_filter} on {device}",
    )
