"""The canonical dataset: two Arrow tables of pairs, a manifest, a quarantine of what was left out, and a report.

folder/train.arrow  held_out.arrow   prompt, chosen, rejected (messages), topic, group, row
folder/manifest.json                 where the rows come from, counts, the split, the fingerprint
folder/quarantine.jsonl              the rows left out, each with its reason
folder/report.html
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from preference_tuning.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("topic", pa.string()),
        ("group", pa.string()),
        ("row", pa.int64()),
    ]
)
MANIFEST, QUARANTINE, REPORT = "manifest.json", "quarantine.jsonl", "report.html"
SPLITS = ("train", "held_out")


class Manifest(BaseModel):
    """What a canonical dataset holds and where it comes from."""

    fingerprint: str
    """Over the content of the rows and their side of the split; the order of the rows does not matter."""
    source: str
    source_fingerprint: str
    rows_in: int
    train: int
    held_out: int
    dropped: dict[str, int]
    """Rows left out, by reason."""
    prompts: int
    seed: int
    held_out_share: float
    chosen_longer: float
    """Share of pairs whose chosen answer has more characters."""
    mean_characters: dict[str, float]
    topics: dict[str, int]


class Dataset:
    """A canonical dataset on disk."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder``.

        Raises:
            DataError: it holds no canonical dataset.
        """
        self.folder = folder
        try:
            self.manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(f"{folder} is not a prepared dataset: it has no readable {MANIFEST}") from None

    def path(self, split: str) -> Path:
        """Return the Arrow file of a split."""
        return self.folder / f"{split}.arrow"

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split, memory-mapped."""
        with pa.memory_map(str(self.path(split))) as mapped, pa.ipc.open_stream(mapped) as reader:
            for batch in reader:
                yield from batch.to_pylist()


class Writer:
    """Writes the rows of one split as an Arrow stream, a batch at a time."""

    def __init__(self, path: Path, batch: int = 1000) -> None:
        self._writer = pa.ipc.new_stream(str(path), SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._batch = batch
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) >= self._batch:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []

    def close(self) -> None:
        """Write what is left and the end of the stream."""
        self._flush()
        self._writer.close()
