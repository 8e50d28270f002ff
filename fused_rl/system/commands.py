"""What every command does in the end: its exit status, and one line on stderr where it does not
run.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from fused_rl.system import outputs, signals

FAILURE, USAGE_ERROR = 1, 2
# What a shell reports of a process that wrote to a pipe that nobody reads any more.
BROKEN_PIPE = 141


def status_of(run: Callable[[], int]) -> int:
    """The exit status of a command, which is run.

    1 after a result that could not be written, 2 after a mistake in the options; 130, 143 or 129
    after Ctrl-C, SIGTERM or SIGHUP; 141 where stdout was closed (`fused-rl doctor | head -1`).
    """
    with signals.stoppable():
        try:
            return _flushed(run)
        except BrokenPipeError:
            return BROKEN_PIPE
        except outputs.Unwritable as error:
            return complain("", str(error), FAILURE)
        except BaseException as error:
            if stop := signals.stop_behind(error):
                return signals.status_of(stop)
            # What rich makes of a broken pipe.
            if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
                return BROKEN_PIPE
            raise


def _flushed(run: Callable[[], int]) -> int:
    """What status_of does if nothing comes in between."""
    try:
        return run()
    finally:
        outputs.flush()


def missing_of(names: Sequence[str]) -> str:
    """Those that are not installed."""
    return ", ".join(name for name in names if find_spec(name) is None)


def usage_error(command: str, message: str) -> int:
    """Says on stderr why a command does not run."""
    return complain(command, message, USAGE_ERROR)


def complain(command: str, message: str, status: int) -> int:
    """Says one line on stderr and returns the status."""
    print(f"{f'fused-rl {command}'.strip()}: {outputs.one_line(message)}", file=sys.stderr)
    return status
