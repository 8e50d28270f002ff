"""A run that is asked to stop: Ctrl-C, SIGTERM (a scheduler, `docker stop`) and SIGHUP (a terminal
that was closed) are one thing, a KeyboardInterrupt, and results are saved after each of them.

    with stoppable():
        try:
            work()
        finally:
            stops.held = True  # no signal can come between the two lines
            save()
            stops.release()
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Stopped(KeyboardInterrupt):
    """Raised wherever the main thread is. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass
class Stops:
    """held: signals do not raise, but wait for release. waiting: the last one that does."""

    held: bool = False
    waiting: int | None = None

    def release(self) -> None:
        """Signals raise again; one that came meanwhile does so now."""
        waiting, self.held, self.waiting = self.waiting, False, None
        if waiting is not None:
            raise Stopped(waiting)


# Of the process, as its signal handlers are.
stops = Stops()


def _handle(number: int, frame: FrameType | None) -> None:
    if stops.held:
        stops.waiting = number
        return
    raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, a signal raises Stopped. What the process ignores (`nohup`) it goes on ignoring."""
    stops.held, stops.waiting = False, None
    handled = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, _handle) for number in handled}
    try:
        yield
    finally:
        stops.held, stops.waiting = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The stop that an exception comes from, if any: while one unwinds, a terminal that is gone can
    put an OSError in its place.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status that shells give to a process that a signal has ended."""
    return 128 + getattr(stop, "number", signal.SIGINT)
