"""Child processes: this Python once more, without what happens to lie in the current folder.

`python -c` and `python -m` look for modules in the current folder before all others. A torch.py or
a random.py there would run in the place of the real one (CWE-427), and in the root of another clone
of this project a child would measure that clone.
"""

import os
import sys
from typing import Any

# `python -P` came with 3.11.
HAS_SAFE_PATH = sys.version_info >= (3, 11)


def python(*arguments: str) -> dict[str, Any]:
    """args and cwd, for subprocess.run and Popen, of this interpreter with these arguments.

    Paths in the arguments must be absolute: before Python 3.11 the child stands in the folder of
    the standard library, whose modules it would find anyway.
    """
    if HAS_SAFE_PATH:
        return {"args": [sys.executable, "-P", *arguments]}
    return {"args": [sys.executable, *arguments], "cwd": os.path.dirname(os.__file__)}
