"""Our functions in the place of TRL's, wherever TRL holds them; and everything put back."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fused_rl.integrations.trl import gkd, preference
from fused_rl.integrations.trl.divergence import NAMES as DIVERGENCE
from fused_rl.integrations.trl.divergence import FusedDivergence
from fused_rl.integrations.trl.logprobs import FusedHead, with_theirs

_OPTIONS = ("targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
# What the forward of the function of log-probs takes after ctx and the hidden states: TRL 1.12;
# 1.13 and 1.14; 1.15 and 1.16.
_OF_LOGPROBS = (
    ("weight", *_OPTIONS),
    ("weight", "bias", *_OPTIONS),
    ("weight", "bias", *_OPTIONS, "outputs"),
)

# Methods of experimental trainers that form whole logits: module, class, method, what it takes in
# TRL 1.16, and (class, theirs) -> ours.
_METHODS = (
    ("gkd.gkd_trainer", "GKDTrainer", "compute_loss", gkd.NAMES, gkd.compute_loss_of),
    ("cpo.cpo_trainer", "CPOTrainer", "concatenated_forward", preference.NAMES, preference.cpo_of),
    (
        "orpo.orpo_trainer",
        "ORPOTrainer",
        "concatenated_forward",
        preference.NAMES,
        preference.orpo_of,
    ),
)

StandIn = FusedHead | FusedDivergence

# What stands where TRL's functions stood, while patched.
_active: list[StandIn] = []
# (class, name of a method, TRL's own), while patched.
_guarded: list[tuple[type, str, Callable]] = []


def patch() -> None:
    """Route TRL's fused head and its divergences through ours, until `unpatch`.

    A second call does nothing. Trainers that exist already are routed too.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a TRL whose functions are not called in one of the ways that we know. Nothing
            is changed then.
    """
    if _active:
        return
    _active.extend(_found())
    for ours in _active:
        _swap(ours.original, ours)
    _guard_precomputed()
    if any(isinstance(ours, FusedDivergence) for ours in _active):
        _route_methods()


def unpatch() -> None:
    """Put TRL's own functions back, the very objects, wherever `patch` put ours."""
    for ours in _active:
        _swap(ours, ours.original)
    for owner, name, theirs in _guarded:
        setattr(owner, name, theirs)
    _active.clear()
    _guarded.clear()


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for the length of a block; within a block, or after patch(), it changes nothing."""
    if _active:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()


def _found() -> list[StandIn]:
    """Ours for each of TRL's functions that is there: that of divergences is from 1.16 on."""
    module, name = "trl.trainer.utils", "_ChunkedLogProbFunction"
    original, names = _seam(importlib.import_module(module), name)
    if names is None or names[1:] not in _OF_LOGPROBS:
        raise _moved(module, name, names and names[1:])
    found: list[StandIn] = [FusedHead(original, ("hidden", *names[1:]))]
    module, name = "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction"
    try:
        divergences = importlib.import_module(module)
    except ModuleNotFoundError:
        return found
    original, names = _seam(divergences, name)
    if names != DIVERGENCE:
        raise _moved(module, name, names)
    return [*found, FusedDivergence(original, names)]


def _seam(module: ModuleType, name: str) -> tuple[Any, tuple[str, ...] | None]:
    """An autograd function, and what its forward takes after ctx; None: it is not there."""
    original = getattr(module, name, None)
    forward = getattr(original, "forward", None)
    return original, tuple(inspect.signature(forward).parameters)[1:] if forward else None


def _moved(module: str, name: str, names: tuple[str, ...] | None) -> RuntimeError:
    import trl

    found = "is not there" if names is None else f"takes {', '.join(names)}"
    return RuntimeError(
        f"TRL {trl.__version__} is not one that fused_rl can patch: its {module}.{name} {found}. "
        "Versions 1.12 to 1.16 are known to work; use one of them, or TRL without the patch"
    )


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
            _replace(owner, method, _by_trainer)


def _route_methods() -> None:
    """Where their modules are imported: importing one would be for those alone who use it."""
    for module, name, method, known, ours in _METHODS:
        module = f"trl.experimental.{module}"
        owner = getattr(sys.modules.get(module), name, None)
        if owner is None:
            continue
        takes = tuple(inspect.signature(getattr(owner, method)).parameters)
        if takes != known:
            unpatch()
            raise _moved(module, f"{name}.{method}", takes)
        _replace(owner, method, functools.partial(ours, owner))


def _replace(owner: type, name: str, wrap: Callable[[Callable], Callable]) -> None:
    theirs = getattr(owner, name)
    _guarded.append((owner, name, theirs))
    setattr(owner, name, wrap(theirs))


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
