"""Rows as they lie in a source: JSON Lines, JSON, CSV, Parquet, an Arrow directory, or a hub dataset."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint, hub
from preference_tuning.config import DataConfig
from preference_tuning.errors import ConfigError, DataError

Row = tuple[int, dict[str, Any]]
"""A row with its number: the line in a text file, else its place counted from 1."""

csv.field_size_limit(sys.maxsize)


def fingerprint_of(config: DataConfig) -> str:
    """Return the hash of the source's bytes, or the commit of a hub dataset.

    Raises:
        DataError: the path does not exist or cannot be read.
        ConfigError: the hub has no such dataset or revision.
    """
    path = _local(config)
    if path is None:
        return hub.resolve_commit(config.source, config.revision, "dataset")
    if config.revision:
        raise ConfigError(f"data.revision: {config.source} is a local path, which has no revision; remove it")
    try:
        return fingerprint.of_path(path)
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error.strerror}") from None


def read(config: DataConfig, commit: str | None = None) -> Iterator[Row]:
    """Yield the rows of the source.

    Raises:
        DataError: with the file and line of what cannot be read.
    """
    path = _local(config)
    if path is None:
        yield from _hub_rows(config, commit)
    elif path.is_dir():
        yield from _directory_rows(path, config.split)
    else:
        try:
            yield from READERS[path.suffix.lower()](path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _local(config: DataConfig) -> Path | None:
    path = Path(config.source).expanduser()
    if not path.exists():
        if hub.REPO_ID.match(config.source) and path.suffix.lower() not in READERS:
            return None
        raise DataError(f"data.source: no such file: {path.absolute()} (and it is not a hub id)")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"data.source: {path}: unknown kind of file; known: {', '.join(sorted(READERS))}")
        if path.stat().st_size == 0:
            raise DataError(f"data.source: {path} is empty")
    return path


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise DataError(f"{path}, line {number}: not JSON: {reason} ({line.strip()[:60]!r})") from None
            yield number, _mapping(row, path, f"line {number}")


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: the top level must be a list of rows, not {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield number, _mapping(row, path, f"row {number}")


def _mapping(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, {where}: a row must be an object with named fields, not {type(row).__name__}")
    return row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise DataError(f"{path}, line {reader.line_num}: more fields than the header has columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _directory_rows(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.source: {path} is not a directory saved by datasets: {reason}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"data.split: {path} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    yield from enumerate(loaded, 1)


def _hub_rows(config: DataConfig, commit: str | None) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(config.source, revision=commit or config.revision, split=config.split)
    except Exception as error:  # datasets raises dozens of kinds here; each ends as one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data.source: cannot load {config.source!r} from the hub: {reason}") from None
    yield from enumerate(rows, 1)
