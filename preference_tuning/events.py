"""What happened to a job beside its work: resumed, retried, out of memory. One line of JSON each, in its folder."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

FILE = "events.jsonl"

Kind = Literal["resumed", "checkpoint_rejected", "started_over", "forced_resume", "out_of_memory", "retried"]


class Event(BaseModel):
    """Something that a reader of the result should know of."""

    time: datetime
    kind: Kind
    message: str
    facts: dict[str, Any] = {}


def add(folder: Path, kind: Kind, message: str, **facts: Any) -> None:
    """Append an event to those of the job in ``folder``; it is on disk when this returns."""
    event = Event(time=datetime.now(UTC), kind=kind, message=message, facts=facts)
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(event.model_dump_json() + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Path) -> list[Event]:
    """Return the events of a job, the oldest first; a last line cut short by a crash is left out."""
    path = folder / FILE
    if not path.is_file():
        return []
    # Messages may hold what Python takes for the end of a line as well, such as U+2028.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [Event.model_validate(json.loads(line)) for line in whole.split("\n")] if whole else []
