"""The canonical dataset: Arrow tables of pairs, and beside them everything that was found on the way.

folder/train.arrow  held_out.arrow   the pairs (SCHEMA)
folder/sft.arrow                     the answers of data.sft_source, where it is set; rejected is empty
folder/manifest.json                 where the rows come from, counts, findings, the fingerprints
folder/split.parquet                 of each pair: hash of its content, its group, its side, where it came from
folder/quarantine.jsonl              the rows left out, each with its problem
folder/lengths.parquet               lengths of a sample of the pairs
folder/shown.json                    ten pairs as the model reads them
folder/report.html
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from preference_tuning.data.pair import MESSAGE_KEYS, Messages, Pair
from preference_tuning.errors import DataError

MESSAGES = pa.list_(pa.struct([(key, pa.string()) for key in MESSAGE_KEYS]))
SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("tools", pa.string()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("margin", pa.float64()),
        ("topic", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),
        ("row", pa.int64()),
        ("content", pa.string()),
    ]
)
"""``content`` is the sha256 of a pair, by which readers order them: the order in which a source holds them decides
nothing."""
MANIFEST, QUARANTINE, REPORT, SPLIT = "manifest.json", "quarantine.jsonl", "report.html", "split.parquet"
LENGTHS, SHOWN = "lengths.parquet", "shown.json"
SPLITS = ("train", "held_out")
SFT = "sft"


class ProblemCount(BaseModel):
    """How often a problem was found, and where."""

    problem: str
    policy: str
    rows: int
    places: list[str]
    """The first rows that have it, such as ``line 12``; with several sources, after the source's name."""
    details: list[str]
    """What is wrong in the first of them."""


class Finding(BaseModel):
    """Something about the set as a whole."""

    name: str
    level: Literal["note", "warning"]
    message: str


class SourceSummary(BaseModel):
    """How a source was read."""

    name: str
    fingerprint: str
    format: str = ""
    recognised: str = ""
    rows: int = 0
    pairs: int = 0
    not_sampled: int = 0
    """Pairs left aside by the source's weight."""
    test_split: str | None = None


class Lengths(BaseModel):
    """Quantiles of a length over the sample."""

    median: float
    p95: float
    longest: int


class LengthBias(BaseModel):
    """Whether length alone tells chosen from rejected, in characters, over all pairs."""

    chosen_longer: float
    """Share of the pairs of unequal length whose chosen answer is the longer one."""
    effect: float
    """Mean difference of the lengths, chosen less rejected, in standard deviations of that difference (Cohen's d)."""
    mean_chosen: float
    mean_rejected: float


class Manifest(BaseModel):
    """What a canonical dataset holds and where it comes from."""

    fingerprint: str
    """Over the content of the pairs: equal for equal pairs, whatever their order, file, format or compression."""
    split_fingerprint: str
    """Over the content and the side of every pair, and the SFT answers: what a run trains on and is measured on."""
    sources: list[SourceSummary]
    sft_source: SourceSummary | None = None
    rows_in: int
    pairs: int
    """Pairs made of the rows: one a row, or several where a row ranks several answers."""
    train: int
    held_out: int
    sft: int | None = None
    prompts: int
    problems: list[ProblemCount]
    sft_problems: list[ProblemCount] = []
    findings: list[Finding]
    seed: int
    held_out_share: float | None
    """None: the source's own held-out split is used."""
    length_bias: LengthBias
    unit: Literal["tokens", "characters"]
    """Of ``lengths``: characters where no tokenizer is known."""
    sampled: int
    """Pairs that ``lengths`` were measured on."""
    lengths: dict[str, Lengths]
    max_length: int | None
    max_prompt_length: int | None
    keep_end: bool
    topics: dict[str, int]
    by_source: dict[str, int]
    near_duplicate_prompts: int | None
    """None: not looked for."""

    @property
    def source(self) -> str:
        """The names of the sources."""
        return ", ".join(source.name for source in self.sources)

    @property
    def answers_cut(self) -> int:
        """Pairs with an answer that loses its end."""
        return sum(count.rows for count in self.problems if count.problem == "answer_cut")

    @property
    def prompts_cut(self) -> int:
        """Pairs with a prompt that loses its beginning."""
        return sum(c.rows for c in self.problems if c.problem == "long_prompt" and c.policy == "keep_end")

    @property
    def dropped(self) -> int:
        """Rows and pairs that are not in the dataset."""
        return sum(count.rows for count in self.problems if count.policy == "drop")

    def metadata(self) -> dict[str, Any]:
        """Return what the dashboard shows of it."""
        names = {
            "fingerprint",
            "split_fingerprint",
            "rows_in",
            "train",
            "held_out",
            "prompts",
            "near_duplicate_prompts",
        }
        shown = {name: value for name, value in self.model_dump(include=names).items() if value is not None}
        problems = {f"problems/{count.problem}": count.rows for count in self.problems}
        findings = {f"findings/{finding.name}": finding.message for finding in self.findings}
        bias = {"chosen_longer": self.length_bias.chosen_longer, "length_effect": self.length_bias.effect}
        return {**shown, "source": self.source, "dropped": self.dropped, **bias, **problems, **findings}


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

    @property
    def sft_split(self) -> str:
        """The split that SFT trains on: answers of their own, or the chosen ones."""
        return SFT if self.manifest.sft is not None else "train"

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split."""
        return read_rows(self.path(split))


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow stream, from the file and not memory-mapped, so memory stays flat."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow stream."""
    for batch in read_batches(path):
        yield from batch.to_pylist()


class Writer:
    """Writes record batches of one schema as an Arrow stream; the file appears even if nothing is written."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str | None = None) -> None:
        self._writer = pa.ipc.new_stream(str(path), schema, options=pa.ipc.IpcWriteOptions(compression=compression))
        self.count = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        if batch.num_rows:
            self._writer.write_batch(batch)
            self.count += batch.num_rows

    def close(self) -> None:
        """Write the end of the stream."""
        self._writer.close()


class ParquetWriter:
    """Writes record batches of one schema as Parquet, in row groups of a size that its readers like."""

    ROWS = 50_000
    """Of a row group: many small ones would make the file's own description grow in memory with the rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def __enter__(self) -> "ParquetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, columns: Sequence[Any]) -> None:
        """Append the columns of the schema."""
        batch = pa.RecordBatch.from_arrays([pa.array(c) for c in columns], schema=self._schema)
        self._waiting.append(batch)
        self._rows += batch.num_rows
        if self._rows >= self.ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._rows = [], 0


def pair_columns(
    pairs: Sequence[Pair], rows: Sequence[int], groups: Sequence[str], sources: Sequence[str], content: Sequence[str]
) -> list[pa.Array]:
    """Return the columns of ``SCHEMA``; built from flat lists, because ``from_pylist`` takes five times as long."""
    return [
        _messages([pair.prompt for pair in pairs]),
        _messages([pair.chosen for pair in pairs]),
        _messages([pair.rejected for pair in pairs]),
        pa.array([as_json(pair.tools) for pair in pairs], pa.string()),
        pa.array([pair.chosen_score for pair in pairs], pa.float64()),
        pa.array([pair.rejected_score for pair in pairs], pa.float64()),
        pa.array([pair.margin for pair in pairs], pa.float64()),
        pa.array([pair.topic for pair in pairs], pa.string()),
        pa.array([pair.source or name for pair, name in zip(pairs, sources, strict=True)], pa.string()),
        pa.array(groups, pa.string()),
        pa.array(rows, pa.int64()),
        pa.array(content, pa.string()),
    ]


def _messages(lists: list[Messages]) -> pa.Array:
    flat = [message for messages in lists for message in messages]
    offsets = pa.array([0, *itertools.accumulate(map(len, lists))], pa.int32())
    columns = [
        pa.array([message["role"] for message in flat], pa.string()),
        pa.array([message["content"] for message in flat], pa.string()),
        pa.array([as_json(message.get("tool_calls")) for message in flat], pa.string()),
        pa.array([message.get("tool_call_id") for message in flat], pa.string()),
        pa.array([message.get("name") for message in flat], pa.string()),
    ]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, names=list(MESSAGE_KEYS)))


def as_json(value: Any) -> str | None:
    """Return a value as JSON text, None as None."""
    return None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)
