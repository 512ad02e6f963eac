"""Who holds a lock, and waiting for it: a moment in silence, then with a word, and not for ever."""

import getpass
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

from pydantic import BaseModel

from preference_tuning.errors import TransientError

QUIET = 2.0
"""Seconds before somebody is told what is waited for."""
PATIENCE = 1800.0
"""Seconds before waiting ends in an error; a large model takes minutes to be copied."""


class Holder(BaseModel):
    """The process that holds a lock."""

    user: str
    host: str
    pid: int
    since: datetime

    @classmethod
    def this(cls) -> Self:
        """Return this process."""
        return cls(user=user(), host=socket.gethostname(), pid=os.getpid(), since=datetime.now(UTC))

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since:%Y-%m-%d %H:%M:%S} UTC"


def user() -> str:
    """Return who runs this; a container may have no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def wait(attempt: Callable[[], bool], holder: Callable[[], Holder | None], place: str) -> None:
    """Try until it works.

    Args:
        attempt: takes the lock, or returns False.
        holder: returns who has it, if that can be known.
        place: what is locked.

    Raises:
        TransientError: it did not work for too long.
    """
    began, told, pause = time.monotonic(), False, 0.02
    while not attempt():
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise TransientError(
                f"registry: {place} was locked for {waited:.0f} s by {holder() or 'another process'}; "
                "wait for it or end it, then run this again"
            )
        if waited > QUIET and not told:
            print(f"  waiting for {place}: {holder() or 'another process'} is writing there", file=sys.stderr)
            told = True
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
