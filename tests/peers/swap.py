"""Putting one function in the place of another, wherever a package holds it."""

import sys
from types import ModuleType


def swap(package: str, old: object, new: object) -> None:
    """Every name in the package's modules that is bound to `old` becomes one of `new`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
