"""Rows of a JSON file: a list of objects, at the top or under a key, read as a stream.

Each row is decoded as a line of JSON Lines is, so both formats take and refuse the same; only the lists and objects
around the rows are read here.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from preference_tuning.data.pair import Row
from preference_tuning.data.sources.files import (
    CHUNK,
    DECODER,
    MAX_DEPTH,
    MAX_PIECE,
    NAMES,
    File,
    deep,
    reason_of,
    too_large,
)
from preference_tuning.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")
NEAR_THE_END = 20
"""Characters: more than any token but a text has, so an error further from the end is no matter of reading on."""


class Text:
    """The text of a file, held from the value that is being read on."""

    def __init__(self, file: File, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.row = 0
        """Of the list that is being read; 0 outside of lists."""
        self.size = 0
        """Characters of the last value."""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def error(self, reason: str, at: int | None = None) -> DataError:
        """Return the error that something is wrong here, or at a place in the buffer."""
        line = self._line + self._buffer.count("\n", 0, self._at if at is None else at)
        return self.file.broken(reason, f"line {line}, row {self.row}" if self.row else f"line {line}")

    def peek(self) -> str:
        """Return the next character that is no white space; nothing at the end."""
        while True:
            self._at = SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Go over the next character, which must be one of ``expected``."""
        found = self.peek()
        if not found:
            raise self.error("not JSON: the file ends too early; is it cut off?")
        if found not in expected:
            raise self.error(f"not JSON: expecting {' or '.join(expected)}, not {found!r}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Read a whole value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
                # A number may go on behind the buffer: `1.` is read as 1 so far.
                if end < len(self._buffer) - NEAR_THE_END or not self._more():
                    break
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - NEAR_THE_END
                if not (goes_on and self._more()):
                    hint = "; is the file cut off?" if goes_on else ""
                    raise self.error(reason_of(error) + hint, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.error(reason_of(error)) from None
        brackets = self._buffer.count("[", self._at, end) + self._buffer.count("{", self._at, end)
        if brackets > MAX_DEPTH and deep(value):
            raise self.error(reason_of(RecursionError()))
        self.size, self._at = end - self._at, end
        return value

    def _more(self) -> bool:
        """Read on and say whether that may help; what is done with is dropped."""
        held = len(self._buffer) - self._at
        if self._ended:
            return False
        if held > MAX_PIECE:
            raise self.error(f"one value of more than {MAX_PIECE:,} characters")
        data = self.stream.read(max(CHUNK, held))
        self._ended = not data
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = self._buffer[self._at :], 0
        try:
            self._buffer += self._decoder.decode(data, self._ended)
        except UnicodeDecodeError as error:
            self._buffer += error.object[: error.start].decode()
            raise self.error("not UTF-8 text; save it as UTF-8", len(self._buffer)) from None
        return True


class Outline(NamedTuple):
    """What is in a JSON file, as far as lists go."""

    keys: list[str]
    """Of the object at the top."""
    lists: dict[str, tuple[int, int]]
    """Path of each outermost list, with the number of its items, and of those that are objects."""

    def of_objects(self) -> list[str]:
        """Return the paths of the lists that hold rows."""
        return [path for path, (_, objects) in self.lists.items() if objects]

    def columnar(self) -> bool:
        """Whether it is an object of equally long columns."""
        lengths = {length for length, _ in self.lists.values()}
        return len(self.keys) == len(self.lists) > max(1, len(self.of_objects())) and len(lengths) == 1

    def __str__(self) -> str:
        return ", ".join(f"{path} ({self.lists[path][0]:,} rows)" for path in self.of_objects())


def json_rows(file: File) -> Iterator[Row]:
    """Yield the rows of the list of objects in a JSON file: the one ``records`` names, or else the only one."""
    wanted = _only_list(file) if file.records is None else file.records
    found = False
    with file.opened() as stream:
        text = Text(file, stream)
        for path, items in _lists(text, []):
            if path == wanted:
                found = True
                yield from _rows(file, text, items)
    if not found:
        lists = str(_outline(file)[1]) or "none"
        raise file.broken(f"data.records: there is no list at {wanted!r}; lists of objects in the file: {lists}")


def _rows(file: File, text: Text, items: Iterator[Any]) -> Iterator[Row]:
    for number, values in enumerate(items, 1):
        if type(values) is not dict:
            raise text.error(f"a row must be an object with named fields, not {NAMES.get(type(values), 'number')}")
        if text.size > file.max_row_bytes:
            yield Row(number, {}, flaw=too_large("row", text.size, "characters", file.max_row_bytes))
        else:
            yield Row(number, values)


def _only_list(file: File) -> str:
    with file.opened(counted=False) as stream:
        if Text(file, stream).peek() == "[":
            return ""
    top, outline = _outline(file)
    found = outline.of_objects()
    if outline.columnar():
        names = ", ".join(outline.keys[:10])
        raise file.broken(f"is columnar (lists of equal length: {names}); save it as a list of rows, or as Parquet")
    if len(found) > 1:
        raise file.broken(f"holds several lists of rows; set data.records to one of them: {outline}")
    if not found:
        what = f"an object with the keys {', '.join(map(repr, outline.keys[:10]))}" if top == "{" else "a single value"
        raise file.broken(f"the top level must be a list of rows, or hold one under a key; it is {what}")
    return found[0]


def _outline(file: File) -> tuple[str, Outline]:
    """Return the first character, and what the whole file holds."""
    outline = Outline([], {})
    with file.opened(counted=False) as stream:
        text = Text(file, stream)
        top = text.peek()
        if not top:
            raise file.broken("there are no rows")
        for path, items in _lists(text, outline.keys):
            count = objects = 0
            for item in items:
                count, objects = count + 1, objects + isinstance(item, dict)
            outline.lists[path] = count, objects
    return top, outline


def _lists(text: Text, keys: list[str]) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield the path and the items of each outermost list; ``keys`` gets those of the object at the top."""
    yield from _lists_below(text, (), keys)
    if text.peek():
        raise text.error("not JSON: more data behind the end; is it JSON Lines? then name it .jsonl")


def _lists_below(text: Text, path: tuple[str, ...], keys: list[str]) -> Iterator[tuple[str, Iterator[Any]]]:
    opening = text.peek()
    if opening == "[":
        items = _items(text)
        yield ".".join(path), items
        for _ in items:
            pass  # what the caller had no use for
    elif opening != "{":
        text.value()
    elif len(path) >= MAX_DEPTH:
        raise text.error(reason_of(RecursionError()))
    else:
        for key in _keys(text):
            if not path:
                keys.append(key)
            yield from _lists_below(text, (*path, key), keys)


def _keys(text: Text) -> Iterator[str]:
    """Yield the keys of an object; the caller reads the value of each."""
    text.take("{")
    seen: set[str] = set()
    while text.peek() != "}" or seen:
        key = text.value()
        if not isinstance(key, str):
            raise text.error("not JSON: a key must be a text in double quotes")
        if key in seen:
            raise text.error(f"the key {key!r} occurs twice in one object")
        seen.add(key)
        text.take(":")
        yield key
        if text.take(",}") == "}":
            return
    text.take("}")


def _items(text: Text) -> Iterator[Any]:
    """Yield the values of a list."""
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.row += 1
        yield text.value()
        if text.take(",]") == "]":
            break
    text.row = 0
