"""What became of every run: ``<output_dir>/history.jsonl``, to which lines are only ever added.

A line is a JSON object with the ``id`` of a run and some of its fields; a run is its lines taken together, the later
ones winning. A run that trains has a line when it starts and one when it ends; a start that did not train has one. So a
run that was killed is one without an end whose process is gone.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from preference_tuning import continuing
from preference_tuning.errors import ConfigError, InterruptedJobError, find
from preference_tuning.jobs import starter
from preference_tuning.retraining.fingerprints import Fingerprints

FILE = "history.jsonl"

Outcome = Literal["running", "submitted", "promoted", "held", "failed", "interrupted", "killed", "skipped", "locked"]
Clock = Callable[[], datetime]

COMPLETED = ("promoted", "held")
QUIET = ("skipped", "locked")
"""Starts that did not train."""


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class Result(BaseModel):
    """What a completed run left in the registry."""

    version: str
    promoted: bool
    decision: str
    reason: str
    champion: str
    run: str = ""
    """The name of the run in ZenML."""
    links: dict[str, str] = {}
    """Where else it can be seen."""


class Run(BaseModel):
    """A run, or a start that did not come to one."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    name: str
    """Of the model in the registry."""
    trigger: str
    started: datetime
    process: str = Field(default_factory=starter.mark)
    locked: bool = False
    """Whether its process holds the lock of retraining."""
    reason: str = ""
    """Why it was started, or why nothing was trained."""
    fingerprints: Fingerprints | None = None
    new_rows: int | None = None
    """Pairs that the last completed run did not have."""
    ended: datetime | None = None
    outcome: Outcome = "running"
    exit_code: int | None = None
    result: Result | None = None
    error: str | None = None
    then: str | None = None
    """Of a run that failed: what it was in, and the command that continues it."""

    @property
    def lives(self) -> bool:
        """Whether it is going on on this host; nothing can be known of another one's processes."""
        here = self.process.split()[0] == socket.gethostname()
        return here and self.outcome == "running" and not starter.is_gone(self.process)


class History:
    """The runs of one ``output_dir``."""

    def __init__(self, output_dir: Path) -> None:
        """Open it; nothing is written before there is something to write."""
        self.path = output_dir.expanduser() / FILE

    def runs(self, name: str | None = None) -> list[Run]:
        """Return the runs of a name, or of all, the oldest first; one whose process is gone is ``killed``."""
        return [_as_is(run) for run in self._written() if name in (None, run.name)]

    def add(self, run: Run, only: set[str] | None = None) -> Run:
        """Write down a run as it is now, or what is ``only`` new of it, and return it."""
        self._append(run.model_dump(mode="json", exclude_none=True, include=only and only | {"id"}))
        return run

    def settle(self, name: str) -> None:
        """Write down as killed what has no end and can have none; called while the lock of the name is held.

        Whoever held the lock before is gone, on whatever host it was.
        """
        for run in self._written():
            if run.name == name and run.outcome == "running" and (run.locked or starter.is_gone(run.process)):
                self.add(run.model_copy(update={"outcome": "killed"}), only={"outcome"})

    def _written(self) -> list[Run]:
        lines: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if "id" in line:
                lines[line["id"]] = lines.get(line["id"], {}) | line
        return [Run.model_validate(fields) for fields in lines.values() if "name" in fields]

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        for line in content.split(b"\n"):
            with contextlib.suppress(ValueError):  # cut short, by a crash or a full disk
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value

    def _append(self, fields: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        line = json.dumps(fields, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                stream.write((b"" if _ends_well(stream) else b"\n") + line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write {self.path.absolute()}: {error.strerror}") from None


def _ends_well(stream: Any) -> bool:
    """Return whether the last line is whole, so that the next one does not become part of it."""
    if stream.seek(0, os.SEEK_END) == 0:
        return True
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")


def _as_is(run: Run) -> Run:
    gone = run.outcome == "running" and starter.is_gone(run.process)
    return run.model_copy(update={"outcome": "killed"}) if gone else run


class Record:
    """A run that is going on, as the history is told of it."""

    def __init__(self, history: History, run: Run, clock: Clock = now) -> None:
        """Write down that it starts."""
        self.history, self.clock, self.run = history, clock, history.add(run)

    def complete(self, result: Result) -> None:
        """Write down what it left in the registry."""
        self._end("promoted" if result.promoted else "held", exit_code=0, result=result)

    def hand_over(self) -> None:
        """Write down that another machine goes on with it."""
        self._end("submitted", exit_code=0)

    def fail(self, error: BaseException) -> None:
        """Write down what ended it."""
        try:
            self._end(**facts_of(error))
        except ConfigError as problem:  # a full disk: what happened before is what matters
            sys.stderr.write(f"warning: {problem}\n")

    def _end(self, outcome: Outcome, **facts: Any) -> None:
        self.run = self.run.model_copy(update={"outcome": outcome, "ended": self.clock(), **facts})
        self.history.add(self.run, only={"outcome", "ended", *facts})


@contextlib.contextmanager
def recorded(history: History, run: Run, clock: Clock = now) -> Iterator[Record]:
    """Keep the record of a run that happens inside; what ends it by an error is written down and raised on."""
    record = Record(history, run, clock)
    try:
        yield record
    except BaseException as error:
        record.fail(error)
        raise


def facts_of(error: BaseException) -> dict[str, Any]:
    """Return the fields of a run that an error ended."""
    known = find(error)
    code = known.exit_code if known else 1
    interrupted = isinstance(known, InterruptedJobError)
    return {
        "outcome": "interrupted" if interrupted else "failed",
        "exit_code": code,
        "error": str(known) if known else f"{type(error).__name__}: {error}",
        "then": continuing.last_line(error).removeprefix(continuing.HEAD),
    }
