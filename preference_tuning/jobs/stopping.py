"""SIGTERM and SIGINT in a job's process: they end the work where it stands, and never what must be whole.

The training loop takes the signals over while it runs (``training.callbacks.Stop``) and ends at a checkpoint instead.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preference_tuning.errors import InterruptedJobError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

AGAIN_SECONDS = 3.0
"""A signal within this time of one before is its echo: Ctrl-C reaches a job from the terminal and from its starter."""


class _Stopped(BaseException):
    """Not an Exception, so that no library takes it for a failure of its own and goes on."""


class _Handler:
    """What the process does about a signal."""

    def __init__(self) -> None:
        self.name = ""
        self.held = False
        self._last = 0.0

    def __call__(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        echo = bool(self.name) and now - self._last < AGAIN_SECONDS
        self.name, self._last = signal.Signals(number).name, now
        if not (echo or self.held):
            raise _Stopped


_handler = _Handler()


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn a signal within the block into an error.

    Raises:
        InterruptedJobError: at the place where the signal came.
    """
    _handler.name, _handler.held = "", False
    for number in SIGNALS:
        signal.signal(number, _handler)
    try:
        yield
    except _Stopped:
        raise InterruptedJobError(
            f"the job was stopped by {_handler.name} before its work was done; the same command continues it"
        ) from None
    finally:
        # What is written now is the job's account of its end.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def finish() -> None:
    """Heed no signal from here on: the work is done, and only its result is still to be written."""
    _handler.held = True
