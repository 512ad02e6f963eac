"""The last line of a run that failed: what failed, why, and the command that continues it.

It travels with the error as one of its notes (PEP 678), so that it also ends the traceback of an error nobody expected.
"""

import shlex

from preference_tuning.errors import (
    AlreadyRunningError,
    DivergedError,
    InterruptedJobError,
    OvertakenError,
    find,
)

HEAD = "failed     "
LONGEST = 160
"""Characters of the reason, which was told in full before."""


def note(error: BaseException, run: str, step: str | None) -> None:
    """Leave the last line with an error that ended a run, or one of its steps."""
    error.add_note(f"{HEAD}{step + ' of ' if step else ''}{run}: {_reason(error)}. {_after(error, run)}")


def noted(error: BaseException) -> str | None:
    """Return the last line that was left with an error, without its head."""
    notes = [text for text in getattr(error, "__notes__", []) if text.startswith(HEAD)]
    return notes[-1].removeprefix(HEAD) if notes else None


def last_line(error: BaseException) -> str:
    """Return the last line about an error; of one that came before there was a run, the same command is the next."""
    return HEAD + (noted(error) or f"before the run began: {_reason(error)}. {_after(error, None)}")


def _reason(error: BaseException) -> str:
    known = find(error)
    lines = str(known if known else error).splitlines()
    said = (lines[0] if lines else "").rstrip(":. ")
    if known is None:
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def _after(error: BaseException, run: str | None) -> str:
    """Return what to do now."""
    known = find(error)
    resume = f"python run.py resume {shlex.quote(run)}" if run else ""
    either = f"the same command again, or {resume}" if run else "the same command again"
    if isinstance(known, AlreadyRunningError):
        return "Later: the same command again"
    if isinstance(known, DivergedError):
        return "Change what it names in the config, then: python run.py train CONFIG"
    if isinstance(known, InterruptedJobError | OvertakenError):
        return f"Continue: {either}"
    return f"Mend it, then: {resume or either}"
