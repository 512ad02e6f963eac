"""An opened source, and what files of rows have in common: unpacking, encoding, positions; and JSON Lines.

A file is untrusted: whatever its bytes are, reading ends in rows or in one DataError that says where and why.
Memory stays flat. The other formats are next door: ``json_rows`` and ``tabular``.
"""

import codecs
import gzip
import io
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from preference_tuning.data.pair import FlawError, Row
from preference_tuning.errors import DataError

LINES = (".jsonl", ".ndjson", ".csv")
KINDS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet")
PACKINGS = (".gz", ".zst")
MAX_PIECE = 100_000_000
"""The most bytes held at once where the end of a row is not in sight; ``max_row_bytes`` cannot be larger."""
CHUNK = 1 << 16
MAX_DEPTH = 100
"""Levels of nesting in a row: far more than any conversation has, far fewer than Python's recursion limit."""
WHITE = b" \t\r\n"
NAMES = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
UTF16_32 = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""By byte order mark; the longer ones first, because UTF-32's begins with UTF-16's."""


class Reading(ABC):
    """An opened source."""

    place = "row"
    """``line`` for a source that has lines: what a row's number counts."""
    unit = "rows"
    """What ``total`` and ``position`` count: ``B`` or ``rows``."""
    total = 0
    test_split: str | None = None
    """The source's own held-out split that is read too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.position_in_rows = 0

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows; a DataError names the place of what cannot be read."""

    @property
    def position(self) -> int:
        """How much of ``total`` has been read."""
        return self.position_in_rows

    def broken(self, reason: str, where: str = "") -> DataError:
        """Return the one error of this source."""
        return DataError(f"{self.name}, {where}: {reason}" if where else f"{self.name}: {reason}")


class File(Reading):
    """An opened file."""

    def __init__(self, path: Path, name: str, read: "Reader", records: str | None, max_row_bytes: int) -> None:
        super().__init__(name)
        self.path, self.read, self.records, self.max_row_bytes = path, read, records, max_row_bytes
        kind, self.packing = kind_of(path)
        self.total, self.unit = path.stat().st_size, "B"
        self.place = "line" if kind in LINES else "row"
        self.number = 0
        """Of the last row that was read."""
        self._raw: BinaryIO | None = None
        self._done = False

    def rows(self) -> Iterator[Row]:
        """Yield the rows, numbered by line in JSON Lines and CSV."""
        try:
            for row in self.read(self):
                self.number = row.number
                yield row
        except (OSError, EOFError, zlib.error) as error:
            after = f"after {self.place} {self.number}" if self.number else ""
            raise self.broken(_unreadable(self.packing, error), after) from None
        if not self.number:
            raise self.broken("there are no rows")
        self._done = True

    @property
    def position(self) -> int:
        """How many bytes of the file, as it lies on the disk, have been read."""
        if self._done:
            return self.total
        return 0 if self._raw is None or self._raw.closed else min(self._raw.tell(), self.total)

    @contextmanager
    def opened(self, counted: bool = True) -> Iterator[BinaryIO]:
        """Open the text of the file, unpacked and behind its byte order mark."""
        with self.path.open("rb") as raw:
            if counted:
                self._raw = raw
            stream = _unpacked(raw, self.packing)
            head = stream.peek(4)[:4]
            if not head:
                raise self.broken("is empty")
            if other := _other_encoding(head):
                raise self.broken(f"is {other}, not UTF-8 text; save it as UTF-8")
            if head.startswith(codecs.BOM_UTF8):
                stream.read(3)
            yield stream


Reader = Callable[[File], Iterator[Row]]


def kind_of(path: Path) -> tuple[str, str]:
    """Return what a file's name says: its kind (``""``: none that is known), and how it is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind if kind in KINDS and not (packing and kind == ".parquet") else ""), packing


def too_large(what: str, size: int, unit: str, limit: int) -> FlawError:
    """Return the flaw of a row above ``data.max_row_bytes``."""
    return FlawError("too_large", f"the {what} has {size:,} {unit}, more than data.max_row_bytes = {limit:,}")


def first_line(error: BaseException) -> str:
    """Return what an error of a library says in its first line, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unpacked(raw: BinaryIO, packing: str) -> io.BufferedReader:
    if packing == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), CHUNK)
    if packing == ".zst":
        import pyarrow as pa

        # Arrow raises on a cut stream, which most readers of zstd take for the end of the file.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), CHUNK)
    return cast(io.BufferedReader, raw)


def _other_encoding(head: bytes) -> str | None:
    for mark, name in UTF16_32.items():
        if head.startswith(mark):
            return name
    # Text without a mark begins with an ASCII character in every format read here, so NULs tell its width.
    zeros = [byte == 0 for byte in head]
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if zeros in ([False, True, False, True], [True, False, True, False]) else None


def _unreadable(packing: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or first_line(error)
    if not packing or getattr(error, "errno", None):
        return f"cannot be read: {reason}"
    cut = isinstance(error, EOFError) or "runcated" in reason
    return f"the {packing} data is cut off ({reason})" if cut else f"not valid {packing} data ({reason})"


def decoded(file: File, number: int, line: bytes) -> str:
    """Return the text of a line; the error names the line."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start + 1} of the line); save it as UTF-8"
        raise file.broken(reason, f"line {number}") from None


class RejectedError(ValueError):
    """Valid JSON that two readers would read differently, or that cannot be held."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RejectedError(f"the key {twice!r} occurs twice in one object")
    return values


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise RejectedError(f"the number {text[:30]} is not finite")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)


def json_line_rows(file: File) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file; a line above ``data.max_row_bytes`` is passed over without being held."""
    limit = file.max_row_bytes
    number = 0
    with file.opened() as stream:
        while line := stream.readline(limit + 2):
            number += 1
            if len(line) > limit and (size := _length(line, stream)) > limit:
                yield Row(number, {}, flaw=too_large("line", size, "bytes", limit))
            elif line := line.strip(WHITE):
                yield Row(number, _parsed(file, number, line))


def _length(line: bytes, stream: BinaryIO) -> int:
    """Return the bytes of a line of which ``line`` is the beginning, and go to its end, holding none of it."""
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = stream.readline(CHUNK)
        size += len(line)
    return size - (len(line) - len(line.rstrip(b"\r\n")))


def _parsed(file: File, number: int, line: bytes) -> dict[str, Any]:
    text = decoded(file, number, line)
    try:
        values, end = DECODER.raw_decode(text)
        if end != len(text):
            raise json.JSONDecodeError("more text behind the end of the row", text, end)
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and deep(values):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise file.broken(f"{reason_of(error)} ({text[:60]!r})", f"line {number}") from None
    if type(values) is not dict:
        raise file.broken(
            f"a row must be an object with named fields, not {NAMES.get(type(values), 'number')}", f"line {number}"
        )
    return values


def deep(value: Any) -> bool:
    """Say whether a value is nested more deeply than any row should be."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def reason_of(error: Exception) -> str:
    """Return what ``DECODER`` refuses, in words."""
    if isinstance(error, RejectedError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "not JSON: " + ("nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits")
