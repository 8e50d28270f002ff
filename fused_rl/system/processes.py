"""A command in several processes of one torch.distributed group, on this machine.

All of them end together: where one fails the others get GRACE seconds, and a signal is handed on to
all, which then have PATIENCE seconds to save what they have. torch's own variables (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT) say to each which it is, as torchrun's do.
"""

import os
import subprocess
import time
from typing import Any

from torch.distributed import TCPStore

from fused_rl.system import children, signals

GRACE, PATIENCE = 5.0, 60.0
_HERE = "127.0.0.1"


def run(count: int, *arguments: str) -> int:
    """Runs this Python with these arguments, `count` times at once, and waits for all.

    Returns:
        0, or the exit status of the process that failed first, 128 + n where a signal n ended it.
    """
    # They meet at a store of this process, whose port is free because it is taken.
    store = TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": store.port,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    started: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            started.append(_start(arguments, {**common, "RANK": rank, "LOCAL_RANK": rank}))
        return _wait(started)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _start(arguments: tuple[str, ...], variables: dict[str, Any]) -> subprocess.Popen:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    # A session of its own: a terminal's signals come by way of this process alone.
    command = children.python(*arguments)
    return subprocess.Popen(**command, env=environment, start_new_session=True)


def _wait(started: list[subprocess.Popen]) -> int:
    """The first status that is not 0, when all have ended or may wait no longer."""
    status, deadline = 0, float("inf")
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt as stop:
            status = status or signals.status_of(stop)
            for process in started:
                process.send_signal(status - 128)
            deadline = min(deadline, time.monotonic() + PATIENCE)
        if status == 0 and (failed := _failed(started)):
            status, deadline = failed, min(deadline, time.monotonic() + GRACE)
    return status or _failed(started)


def _failed(started: list[subprocess.Popen]) -> int:
    """The exit status of the first that has failed; 0: none has."""
    codes = [process.poll() for process in started]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
