"""Processes in which Triton interprets: TRITON_INTERPRET must be set before anyone imports it."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """What Python makes of the arguments, on one thread and with no setting of Triton's but these.

    Everything here is small: more threads would only wait for each other.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE,
    )


def assert_passes(file: str, cache: Path, *options: str) -> None:
    """Every chosen test of a file beside this one passes, interpreted; and none is skipped."""
    command = ["-c", PYTEST, "-q", "-p", "no:cacheprovider", *options, str(HERE / file)]
    done = child(*command, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
