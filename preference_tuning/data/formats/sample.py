"""The first rows of a source, and what their columns are called and look like."""

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from preference_tuning.config import Columns
from preference_tuning.data.formats.messages import is_turn
from preference_tuning.data.formats.values import is_blank
from preference_tuning.errors import DataError

MAX_LISTED = 30
Test = Callable[[Any], bool]


class Sample:
    """Sample rows, with the roles that the config gives to columns."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]], columns: Columns) -> None:
        self.name = name
        self.columns = list(dict.fromkeys(column for row in rows for column in row))
        self.encoded = tuple(column for column in self.columns if _holds_encoded_turns(row.get(column) for row in rows))
        self.rows = [decoded_row(row, self.encoded) for row in rows]
        self.mapped: dict[str, str] = columns.model_dump(exclude_none=True)
        for role, column in self.mapped.items():
            if column not in self.columns:
                raise self.error(f"there is no column {column!r} (data.columns.{role}); {self.listed()}")

    def values(self, column: str | None) -> list[Any]:
        """Return what is not null in a column."""
        return [value for row in self.rows if (value := row.get(column or "")) is not None]

    def mostly(self, column: str | None, test: Test) -> bool:
        """Say whether most values of a column pass a test; null and blank ones have no say."""
        values = [value for value in self.values(column) if type(value) is not str or not is_blank(value)]
        return sum(map(test, values)) * 2 > len(values)

    def free(self, column: str, role: str) -> bool:
        """Say whether a column is there, and the config gives it no other role."""
        return column in self.columns and all(r == role for r, c in self.mapped.items() if c == column)

    def find(self, role: str, names: Iterable[str], taken: Collection[str] = ()) -> str | None:
        """Return the column that the config gives a role, else one with one of the names, best one with values."""
        if role in self.mapped:
            return self.mapped[role]
        candidates = [name for name in names if self.free(name, role) and name not in taken]
        # An optional column can be null in all of the sample and have values later.
        return next((name for name in candidates if self.values(name)), candidates[0] if candidates else None)

    def listed(self) -> str:
        """Return the sentence that lists the columns."""
        if not self.columns:
            return "its rows have no columns"
        more = f" and {len(self.columns) - MAX_LISTED} more" if len(self.columns) > MAX_LISTED else ""
        names = (repr(column if len(column) <= 60 else column[:57] + "...") for column in self.columns[:MAX_LISTED])
        return f"the columns are {', '.join(names)}{more}"

    def did_you_mean(self, known: Iterable[str]) -> str:
        """Return a hint for columns whose names are nearly known ones; '' if there are none."""
        names = list(dict.fromkeys(known))
        hints = []
        for column in self.columns[:MAX_LISTED]:
            close = difflib.get_close_matches(column[:60].lower(), names, n=1, cutoff=0.8)
            if close and column not in names:
                hints.append(f"{column!r} is nearly {close[0]!r}")
        return f"; {', '.join(hints)}: rename it or map it with data.columns" if hints else ""

    def error(self, message: str) -> DataError:
        """Return an error that begins with the name of the source."""
        return DataError(f"{self.name}: {message}")


def decoded_row(row: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """Return a row with the turns that some columns hold as JSON; what cannot be decoded becomes no text."""
    decoded = {column: _decoded(row[column]) for column in columns if type(row.get(column)) is str}
    return row | decoded if decoded else row


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # A list of one non-turn: refused where it is read, never trained on as text.
        return [text]


def _holds_encoded_turns(values: Iterable[Any]) -> bool:
    # CSV has no lists, so conversations lie there as JSON.
    texts = [value for value in values if type(value) is str and not is_blank(value)]
    return bool(texts) and all(_is_encoded_turns(text) for text in texts)


def _is_encoded_turns(text: str) -> bool:
    if not text.lstrip().startswith("[{"):
        return False
    decoded = _decoded(text)
    return type(decoded) is list and all(is_turn(turn) for turn in decoded)
