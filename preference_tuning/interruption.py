"""SIGTERM and SIGINT in the process of a command: from its start to its end they are one message and exit code 75."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(KeyboardInterrupt):
    """A signal asked the command to stop. No ``Exception``, so that nothing on its way takes it for a failure."""


class _Watch:
    """The first signal stops the command; later ones find it stopping, and must not disturb that."""

    def __init__(self) -> None:
        self.stopped_by: str | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        again = self.stopped_by is not None
        for known in SIGNALS:
            signal.signal(known, self)  # inside of a ZenML step the handlers are ZenML's
        if not again:
            self.stopped_by = signal.Signals(number).name
            self.check()

    def check(self) -> None:
        if self.stopped_by:
            raise Interruption(f"stopped by {self.stopped_by}; the same command continues it")


_watch = _Watch()


def watch() -> None:
    """Turn the first SIGTERM or SIGINT into an ``Interruption``; outside of the main thread nothing can be done."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _watch)


def check() -> None:
    """Raise the interruption that came but was lost, as in a callback whose errors are only printed.

    Raises:
        Interruption: a signal has come.
    """
    _watch.check()
