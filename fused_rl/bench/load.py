"""Load: processes that compete for the cores while something is measured.

Each spins on one core and touches no memory to speak of. It lives no longer than whoever started
it: its input is a pipe, and it ends once nobody holds the other end.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from fused_rl.system import children

READY = b"spinning\n"
_COMPETITOR = """
import os, sys, threading
def spin():
    while True:
        pass
threading.Thread(target=spin, daemon=True).start()
print("spinning", flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def competing(count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes spin within, from the first line to the last, and are gone after it.

    Raises:
        RuntimeError: one of them did not begin, or ended early: there was less load than was said.
    """
    started: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            started.append(_start())
        if not all(process.stdout.readline() == READY for process in started):
            raise RuntimeError("a competing process did not begin")
        yield started
        if any(process.poll() is not None for process in started):
            raise RuntimeError("a competing process ended before the measurement")
    finally:
        for process in started:
            process.kill()
        for process in started:
            # Closes its pipes, and waits for it.
            with process:
                pass


def _start() -> subprocess.Popen:
    # A session of its own: the terminal's Ctrl-C is for whoever measures, who ends all.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(**children.python("-c", _COMPETITOR), **pipes, start_new_session=True)
