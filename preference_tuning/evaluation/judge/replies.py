"""The judge's replies on disk, a line each, so that none is paid for twice and a stopped evaluation goes on."""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from preference_tuning.evaluation.judge.prompt import Choice

FILE = "replies.jsonl"

ATTEMPTS = 3
"""How often a question is asked whose reply is not the JSON object; then it has no answer."""


class Kept(BaseModel):
    """One reply: what it said, not its words, in which a server might quote what it was sent."""

    key: str
    better: Choice | None
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def cost(self) -> "Cost":
        """What it has cost."""
        return Cost(requests=1, prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)


class Cost(BaseModel):
    """What replies have cost; tokens are None where the server does not count them."""

    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def tokens(self) -> int | None:
        """Tokens read and written."""
        return _sum([self.prompt_tokens, self.completion_tokens])

    @classmethod
    def sum(cls, costs: Iterable["Cost"]) -> "Cost":
        """Return what several have cost together."""
        parts = list(costs)
        return cls(
            requests=sum(part.requests for part in parts),
            prompt_tokens=_sum([part.prompt_tokens for part in parts]),
            completion_tokens=_sum([part.completion_tokens for part in parts]),
        )


NOTHING = Cost(requests=0, prompt_tokens=0, completion_tokens=0)


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


class Replies:
    """The replies in a folder, by question."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a line that a crash cut short is left out, and its question asked again."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._kept: dict[str, list[Kept]] = defaultdict(list)
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            try:
                reply = Kept.model_validate(json.loads(line))
            except (ValueError, ValidationError):
                continue
            self._kept[reply.key].append(reply)

    def add(self, reply: Kept) -> None:
        """Keep a reply; it is on disk when this returns."""
        with self._lock, self._path.open("ab+") as stream:
            whole = stream.tell() == 0 or _ends_a_line(stream.fileno(), stream.tell())
            stream.write(b"" if whole else b"\n")
            stream.write(reply.model_dump_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
            self._kept[reply.key].append(reply)

    def choice(self, key: str) -> Choice | None:
        """Return the answer to a question, None if there is none (yet)."""
        return next((reply.better for reply in self._kept.get(key, ()) if reply.better), None)

    def settled(self, key: str) -> bool:
        """Return whether a question is answered, or was asked as often as it may be."""
        return self.choice(key) is not None or len(self._kept.get(key, ())) >= ATTEMPTS

    def cost(self, keys: Iterable[str]) -> Cost:
        """Return what the replies to these questions have cost, whenever they were asked."""
        return Cost.sum(reply.cost for key in set(keys) for reply in self._kept.get(key, ()))


def _ends_a_line(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
