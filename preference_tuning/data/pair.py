"""What a row becomes: a prompt as messages, and two assistant answers of which one is preferred."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""``role`` (system, user, assistant or tool) and ``content`` (text); where the source has them also ``tool_calls``,
``tool_call_id`` and ``name``, in OpenAI's form."""
Messages = list[Message]

MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name")


class FlawError(ValueError):
    """A row that cannot be used: the name of its problem (a field of ``config.Problems``) and what exactly is wrong."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(detail)
        self.problem, self.detail = problem, detail


@dataclass(slots=True)
class Row:
    """A row as it lies in a source."""

    number: int
    """The line in a source that has lines, else the place, counted from 1."""
    values: dict[str, Any]
    held_out: bool | None = None
    """The side that the source itself puts the row on, if it does."""
    flaw: FlawError | None = None
    """Why there are no values: the row could be found and not read."""


@dataclass(slots=True)
class Pair:
    """A preference pair."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[Any] | None = None
    """Definitions of the tools that the prompt offers, in the form the chat template takes."""
    chosen_score: float | None = None
    rejected_score: float | None = None
    margin: float | None = None
    group: str | None = None
    """The value of the group column; None where the prompt is the group."""
    topic: str | None = None
    source: str | None = None
    held_out: bool | None = None
    """The side that a split column puts the pair on."""


@dataclass(slots=True)
class Unpaired:
    """One answer with a label, to be paired with one of the opposite label."""

    prompt: Messages
    answer: Messages
    good: bool
    tools: list[Any] | None = None
    topic: str | None = None
    source: str | None = None
    group: str | None = None
    held_out: bool | None = None
