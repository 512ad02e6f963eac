"""What can go wrong, and the exit code that says so.

    PreferenceTuningError        1   anything else that has a clear message
    |-- ConfigError              2   the run config, or what it points to, is wrong
    |-- DataError                3   the preference data cannot be trained on
    |-- DivergedError            4   training left the healthy range; nothing is kept of it
    |-- OvertakenError           5   another model became champion after the verdict was made; nothing was promoted
    |-- InterruptedJobError     75   stopped from outside; the same command continues
    |-- AlreadyRunningError     75   the same work is being done by another process; the same command works later
    |-- TransientError           1   a network, a service or another process failed; jobs try again
    `-- OutOfMemoryError         1   a batch did not fit; training jobs try again with smaller pieces of it

A message says what is wrong, where, and what to do. It is shown without a traceback. A job's process ends with these
codes too, and with 1 after any other error. ``failures`` says which of all errors are worth another try.
"""

from typing import Any


class PreferenceTuningError(Exception):
    """A failure that the user can act on."""

    exit_code = 1

    def __init__(self, message: str = "", facts: dict[str, Any] | None = None) -> None:
        """Take the message, and facts that belong beside it."""
        super().__init__(message)
        self.facts = facts or {}


class ConfigError(PreferenceTuningError):
    """The run config contradicts itself, or names something that is not there."""

    exit_code = 2


class DataError(PreferenceTuningError):
    """A preference source is missing, unreadable, or has rows that cannot be used."""

    exit_code = 3


class DivergedError(PreferenceTuningError):
    """A loss, gradient, weight or reference check is outside what healthy training shows."""

    exit_code = 4


class OvertakenError(PreferenceTuningError):
    """A verdict was made against a champion that reigns no more; what it was to promote is stored."""

    exit_code = 5


class InterruptedJobError(PreferenceTuningError):
    """A signal stopped a job; what it had done is kept."""

    exit_code = 75


class AlreadyRunningError(PreferenceTuningError):
    """Another process does this work, and must not be disturbed."""

    exit_code = 75


class TransientError(PreferenceTuningError):
    """Something that the job does not own failed, and may work in a moment."""


class OutOfMemoryError(PreferenceTuningError):
    """What was to be held in memory did not fit; its facts are what was measured (``training.memory``)."""


BY_EXIT_CODE: dict[int, type[PreferenceTuningError]] = {
    error.exit_code: error
    for error in (PreferenceTuningError, ConfigError, DataError, DivergedError, OvertakenError, InterruptedJobError)
}


def find(error: BaseException | None) -> PreferenceTuningError | None:
    """Return the first of ours in a chain of causes (ZenML wraps what a step raises); a signal counts as one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PreferenceTuningError):
            return error
        if isinstance(error, KeyboardInterrupt):
            return InterruptedJobError(str(error) or "interrupted; the same command continues it")
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
