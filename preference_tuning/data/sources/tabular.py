"""Rows of files with named columns: CSV and Parquet."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from preference_tuning.data.pair import Row
from preference_tuning.data.sources.files import MAX_PIECE, File, decoded, first_line, too_large
from preference_tuning.errors import DataError

csv.field_size_limit(sys.maxsize)


def csv_rows(file: File) -> Iterator[Row]:
    """Yield the rows of a CSV file, each with the line on which it starts; every value is text as written."""
    room = [MAX_PIECE]
    start = 1
    with file.opened() as stream:
        reader = csv.reader(_csv_lines(file, stream, room), strict=True)
        try:
            header = _header(file, next((fields for fields in reader if fields), []), reader.line_num)
            start = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield _csv_row(file, header, fields, start)
                start, room[0] = reader.line_num + 1, MAX_PIECE
        except csv.Error as error:
            reason = str(error).split(" - ")[0]
            hint = "; is a quote never closed?" if reason == "unexpected end of data" else ""
            raise file.broken(f"not CSV: {reason}{hint}", f"line {start}") from None


def _csv_lines(file: File, stream: BinaryIO, room: list[int]) -> Iterator[str]:
    """Yield the lines; ``room`` is how many more bytes the row that they are part of may have."""
    number = 0
    while line := stream.readline(MAX_PIECE):
        number += 1
        room[0] -= len(line)
        if room[0] <= 0:
            raise file.broken(f"a row of more than {MAX_PIECE:,} bytes; is a quote never closed?", f"line {number}")
        text = decoded(file, number, line)
        if "\0" in text:
            raise file.broken("holds a NUL byte, which no text does", f"line {number}")
        yield text


def _header(file: File, header: list[str], line: int) -> list[str]:
    for place, name in enumerate(header, 1):
        if not name.strip():
            hint = "an index that pandas wrote? save without it: index=False"
            raise file.broken(f"column {place} has no name ({hint})", f"line {line}")
        if header.count(name) > 1:
            raise file.broken(f"the header has the column {name[:60]!r} twice", f"line {line}")
    return header


def _csv_row(file: File, header: list[str], fields: list[str], line: int) -> Row:
    if len(fields) > len(header):
        counts = f"{len(fields)} and {len(header)}"
        raise file.broken(f"more fields than the header has columns ({counts})", f"line {line}")
    if (size := sum(map(len, fields))) > file.max_row_bytes:
        return Row(line, {}, flaw=too_large("row", size, "characters", file.max_row_bytes))
    values: dict[str, Any] = dict.fromkeys(header)
    values.update(zip(header, fields, strict=False))
    return Row(line, values)


class ParquetFile(File):
    """An opened Parquet file; its progress is counted in rows, because bytes are not read in their order."""

    def __init__(self, path: Path, name: str, max_row_bytes: int) -> None:
        super().__init__(path, name, self._batches, None, max_row_bytes)
        with self._file() as file:
            self.total, self.unit = file.metadata.num_rows, "rows"

    @property
    def position(self) -> int:
        """How many rows have been read."""
        return self.number

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise self.broken(f"has the column {twice!r} twice")
                yield file
        except DataError:
            raise
        except Exception as error:  # Arrow's own kinds, OSError, and whatever damaged metadata leads to
            after = f"after row {self.number}" if self.number else ""
            raise self.broken(f"not a readable Parquet file: {first_line(error)}", after) from None

    def _batches(self, _: File) -> Iterator[Row]:
        with self._file() as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(500))
            for number, values in enumerate(rows, 1):
                yield checked(number, values, self.max_row_bytes)


def checked(number: int, values: dict[str, Any], limit: int, held_out: bool | None = None) -> Row:
    """Return a row that is already in memory, without its values where they are above ``data.max_row_bytes``."""
    size = 0
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, (dict, list)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    if size > limit:
        return Row(number, {}, held_out, too_large("row", size, "characters", limit))
    return Row(number, values, held_out)
