"""Trying again what fails for a moment, and giving up in a bounded time."""

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from preference_tuning import failures
from preference_tuning.errors import TransientError, find

RETRY_AFTER = "retry_after"
"""The fact of a ``TransientError`` that says for how many seconds the other side asked to be left alone."""
LONGEST_WAIT = 60.0
TOLD_FROM = 5.0

Answer = TypeVar("Answer")


class Patience:
    """What a push may lose on failures that pass: so many attempts for each call, and so many seconds of waiting."""

    def __init__(self, attempts: int = 6, seconds: float = 300.0) -> None:
        self.attempts = attempts
        self.left = seconds

    def call(self, do: Callable[[], Answer]) -> Answer:
        """Return what ``do`` returns, called again after failures that pass; longer waits each time.

        ``do`` must be such that doing it twice is doing it once: its answer may be what was lost.

        Raises:
            TransientError: it failed too often or for too long, or it is asked to wait longer than may be waited.
            Exception: of ``do``, if it is final.
        """
        attempt = 1
        while True:
            try:
                return do()
            except Exception as error:
                trouble = _trouble(error)
                if trouble is None:
                    raise
                self._wait(trouble, attempt)
            attempt += 1

    def _wait(self, trouble: TransientError, attempt: int) -> None:
        asked = float(trouble.facts.get(RETRY_AFTER, 0))
        seconds = max(asked, min(LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1))  # noqa: S311
        if attempt >= self.attempts:
            raise TransientError(f"{trouble} ({attempt} attempts)")
        if seconds > self.left:
            wish = f", it asks for {asked:.0f} s" if asked else ""
            raise TransientError(f"{trouble} ({attempt} attempts; waited long enough{wish})")
        self.left -= seconds
        if seconds >= TOLD_FROM:
            print(f"  {trouble}; attempt {attempt + 1} in {seconds:.0f} s", file=sys.stderr)
        pause(seconds)


def pause(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


def _trouble(error: Exception) -> TransientError | None:
    """Return the failure that passes which an error is or comes from, or None."""
    known = find(error)
    if isinstance(known, TransientError):
        return known
    if known is None and failures.kind_of(error) == "transient":
        text = str(error).splitlines()
        return TransientError(text[0] if text else type(error).__name__)
    return None
