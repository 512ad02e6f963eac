"""Failures on the terminal: one message, the exit code, and a last line that says how it goes on."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from preference_tuning import continuing, interruption
from preference_tuning.errors import find


class _Unexplained(logging.Filter):
    """Keeps ZenML from printing the traceback of a failure that is told in one message."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and find(record.exc_info[1]))


_unexplained = _Unexplained()


@contextmanager
def told(by_caller: bool = False, last: bool = True) -> Iterator[None]:
    """Turn an error, or a signal, into a message and its exit code, unless that is the caller's part.

    An error that nobody expected keeps its traceback. Without ``last`` there is no last line: in a step alone.
    """
    interruption.watch()
    for handler in (*logging.getLogger().handlers, *logging.getLogger("zenml").handlers):
        handler.addFilter(_unexplained)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if by_caller:
            raise
        known = find(error)
        if known is None and continuing.noted(error) is None:
            raise
        if known:
            print(f"error: {known}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        if last:
            print(continuing.last_line(error), file=sys.stderr)
        raise SystemExit(known.exit_code if known else 1) from None
