"""Which kernels may run on a GPU: proven ones, each after it has passed a small case there.

A configuration of a kernel is proven once a result in bench/results shows it right and faster than
what it replaces. And every device proves itself: at the first use of a kernel it is compared there
with plain torch in float64, on a case of the caller's dtype and options. Where they differ, or the
kernel fails, the next way down takes its place, with a warning. Under capture of a CUDA graph
nothing is compared, and nothing is remembered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Options(NamedTuple):
    """As trust_kernels has them."""

    unproven: bool = False
    first_use_check: bool = True


class Verdict(NamedTuple):
    """Of the first use of a kernel on a device; error: None where it was right."""

    device: str
    kernel: str
    error: str | None


_options = Options()
# By device and kernel, dtype and options included.
_verdicts: dict[Hashable, Verdict] = {}


def trust_kernels(*, unproven: bool = False, first_use_check: bool = True) -> Options:
    """Says which of the kernels for GPUs this process may use; each call sets both options.

    Args:
        unproven: also those that no GPU has been seen to run right and faster, so far. They are
            compiled for the architecture and proved in Triton's interpreter, or in an emulator.
            What is wrong is caught at its first use; what never ends is not.
        first_use_check: compare each kernel with plain torch at its first use on a device, which
            takes milliseconds beside its compilation. A kernel that is wrong there is replaced by
            the next way down, with a RuntimeWarning; `fused-rl doctor` and `backends` tell.

    Returns:
        Both options, as they are now.
    """
    global _options
    _options = Options(bool(unproven), bool(first_use_check))
    _verdicts.clear()
    return _options


def options() -> Options:
    """What is set."""
    return _options


def verdicts() -> list[Verdict]:
    """Of the kernels that this process has used so far."""
    return list(_verdicts.values())


def passes(
    device: torch.device, kernel: str, kind: Hashable, difference: Callable[[], str | None]
) -> bool:
    """Whether a kernel was right at its first use on a device, which this may be.

    Args:
        device: where.
        kernel: its name, for people.
        kind: what else its code depends on: dtype, options.
        difference: runs the small case; what is wrong, or None.
    """
    if not _options.first_use_check:
        return True
    key = (device, kernel, kind)
    if key not in _verdicts:
        if capturing(device):
            return True
        with _may_wait(device):
            error = _found(difference)
        _verdicts[key] = verdict = Verdict(_name(device), kernel, error)
        if verdict.error is not None:
            _warn(verdict)
    return _verdicts[key].error is None


def capturing(device: torch.device) -> bool:
    """Whether what is done on a device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def _may_wait(device: torch.device) -> Iterator[None]:
    """Whatever set_sync_debug_mode says of the caller's own waits: a comparison must be read."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _found(difference: Callable[[], str | None]) -> str | None:
    try:
        return difference()
    # Whatever a compiler or a driver raises: it is what the check is for.
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line[:200]}"


def _warn(verdict: Verdict) -> None:
    warnings.warn(
        f"the kernel {verdict.kernel} is not used on {verdict.device}, where its first use failed: "
        f"{verdict.error}. The next way down takes its place. Please report this, with what "
        "`fused-rl doctor` says",
        RuntimeWarning,
        stacklevel=2,
    )


@lru_cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def allowed(device: torch.device, config: Any, call: tuple) -> bool:
    """Whether a configuration of the fused forward may run there as far as is known by now.

    Args:
        device: where.
        config: kernels.configs.Config.
        call: hidden, weight, bias, labels, temperature, scale, softcap, rounding.
    """
    if config.proof is None and not _options.unproven:
        return False
    verdict = _verdicts.get((device, title_of(config), kind_of_call(call)))
    return verdict is None or verdict.error is None


def title_of(config: Any) -> str:
    """The name of a configuration among the kernels."""
    return f"linear_logprobs, {config.title}"


def kind_of_call(call: tuple) -> Hashable:
    """What the code of a configuration depends on, of a call of the fused forward."""
    hidden, _, bias, *_, softcap, rounding = call
    return hidden.dtype, bias is None, softcap == 0.0, rounding


def kind_of(records: Iterable[tuple]) -> Hashable:
    """What the code of a kernel depends on, of the records that it is given."""
    return tuple(_kind_of_field(*field) for record in records for field in record._asdict().items())


def _kind_of_field(name: str, value: Any) -> Hashable:
    """A tensor's dtype; which of several kinds; whether there is anything."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if name.endswith(("kind", "rounding")) else value is None or value == 0
