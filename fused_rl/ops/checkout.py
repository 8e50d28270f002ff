"""`fused_rl.kernels` in a checkout without an installation: kernels/ lies beside the package."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# Of this package, which has another name where it is exported to.
NAME = __package__.rpartition(".")[0] + ".kernels"
# Hugging Face's package is called kernels too, and lies beside an installed fused_rl.
MARK = "linear_logprobs.py"


def find_kernels() -> None:
    """Lets the kernels be imported from beside the package, where they are not inside it."""
    folder = Path(__file__).parents[2] / "kernels"
    if find_spec(NAME) is None and (folder / MARK).exists():
        module = ModuleType(NAME)
        module.__path__ = [str(folder)]
        sys.modules[NAME] = module
