"""Our functions in the place of TRL's, wherever TRL holds them; and everything put back."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fused_rl.integrations.trl.logprobs import FusedHead, with_theirs

_SEAM = "_ChunkedLogProbFunction"
_OPTIONS = ("targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
# What its forward takes after ctx and the hidden states: TRL 1.12; 1.13 and 1.14; 1.15 and 1.16.
_KNOWN = (
    ("weight", *_OPTIONS),
    ("weight", "bias", *_OPTIONS),
    ("weight", "bias", *_OPTIONS, "outputs"),
)

_active: FusedHead | None = None
# (class, name of a method, TRL's own), while patched.
_guarded: list[tuple[type, str, Callable]] = []


def patch() -> None:
    """Route TRL's fused head through linear_logprobs, until `unpatch`. A second call does nothing.

    Trainers that exist already are routed too.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a TRL whose head is not called in one of the ways that we know.
    """
    global _active
    if _active is None:
        _active = _find_seam()
        _swap(_active.original, _active)
        _guard_precomputed()


def unpatch() -> None:
    """Put TRL's own function back, the very object, wherever `patch` put ours."""
    global _active
    if _active is not None:
        _swap(_active, _active.original)
        _active = None
        for owner, name, theirs in _guarded:
            setattr(owner, name, theirs)
        _guarded.clear()


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for the length of a block; within a block, or after patch(), it changes nothing."""
    if _active is not None:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()


def _find_seam() -> FusedHead:
    import trl

    original = getattr(importlib.import_module("trl.trainer.utils"), _SEAM, None)
    forward = getattr(original, "forward", None)
    names = tuple(inspect.signature(forward).parameters)[2:] if forward else None
    if names not in _KNOWN:
        found = "is not there" if names is None else f"takes {', '.join(names)}"
        raise RuntimeError(
            f"TRL {trl.__version__} is not one that fused_rl can patch: its trl.trainer.utils."
            f"{_SEAM} {found}. Versions 1.12 to 1.16 are known to work; use one of them, or TRL "
            "without the patch"
        )
    return FusedHead(original, ("hidden", *names))


def _swap(old: object, new: object) -> None:
    """Every name in TRL's modules that is bound to `old` becomes one of `new`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trl" and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _guard_precomputed() -> None:
    """Trainers that compare with log-probs from a file do so with the head that made the file."""
    import trl

    for name in ("DPOTrainer", "KTOTrainer"):
        owner = getattr(trl, name, None)
        if not hasattr(owner, "_precompute_ref_logps"):
            continue
        for method in ("_precompute_ref_logps", "_compute_loss"):
            theirs = getattr(owner, method)
            _guarded.append((owner, method, theirs))
            setattr(owner, method, _by_trainer(theirs))


def _by_trainer(method: Callable) -> Callable:
    """The method, with TRL's own head throughout where the trainer's reference is precomputed."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        reset = with_theirs.set(self.precompute_ref_logps)
        try:
            return method(self, *args, **kwargs)
        finally:
            with_theirs.reset(reset)

    return call
