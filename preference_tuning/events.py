"""What happened to a job beside its work: resumed, retried, out of memory. One line of JSON each, in its folder."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning.config.place import portable_text

FILE = "events.jsonl"

Kind = Literal["resumed", "checkpoint_rejected", "started_over", "forced_resume", "out_of_memory", "retried"]


class Event(BaseModel):
    """Something that a reader of the result should know of."""

    time: datetime
    kind: Kind
    message: str
    facts: dict[str, Any] = {}


def add(folder: Path, kind: Kind, message: str, **facts: Any) -> None:
    """Append an event to those of the job in ``folder``; it is on disk when this returns.

    Events are published with the job's record, and messages are often those of other libraries: what they tell of this
    machine stays here.
    """
    message, facts = _portable(message, folder), _portable(facts, folder)
    event = Event(time=datetime.now(UTC), kind=kind, message=message, facts=facts)
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(event.model_dump_json() + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _portable(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        # First what is known to be a path: one with spaces in it is not found in a text.
        return portable_text(value.replace(f"{folder.absolute().parent}{os.sep}", ""))
    if isinstance(value, dict):
        return {name: _portable(inner, folder) for name, inner in value.items()}
    return [_portable(inner, folder) for inner in value] if isinstance(value, list) else value


def read(folder: Path) -> list[Event]:
    """Return the events of a job, the oldest first; a last line cut short by a crash is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    # Messages may hold what Python takes for the end of a line as well, such as U+2028.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [Event.model_validate(json.loads(line)) for line in whole.split("\n")] if whole else []
