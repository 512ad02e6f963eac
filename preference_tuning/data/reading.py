"""The first pass: rows of the sources become checked pairs in a spool, with the keys that pairs are compared by."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from preference_tuning.config import DataConfig, Origin, portable
from preference_tuning.data import pairing, sources, table
from preference_tuning.data.across import KeyWriter
from preference_tuning.data.content import Keys, TextRules, keys_of, share_of
from preference_tuning.data.conversion import Converter, Format
from preference_tuning.data.ledger import Ledger
from preference_tuning.data.lengths import TokenRules
from preference_tuning.data.pair import FlawError, Pair, Row, Unpaired
from preference_tuning.errors import DataError
from preference_tuning.progress import bar

BATCH = 500
LOOKED_AT = 200
"""Rows by which a format is recognised."""

SPOOL, KEYS = "spool.arrow", "keys.parquet"
SPOOLED = pa.schema(
    [*table.SCHEMA, ("held_out", pa.bool_()), ("place", pa.string()), ("lengths", pa.list_(pa.int32()))]
)
"""A pair on disk between the passes: beside what it will be, its side, and how messages call its row."""

Problem = tuple[str, str]
Recogniser = Callable[[Any, str, list[dict[str, Any]]], Format]


@dataclass(slots=True)
class Candidate:
    """A pair on its way: where it comes from, and what is wrong with it."""

    pair: Pair
    row: int
    place: str
    source: str
    held_out: bool | None
    problems: list[Problem] = field(default_factory=list)
    keys: Keys | None = None
    lengths: list[int] | None = None
    """In tokens, as in ``lengths.Examined``."""


@dataclass
class Spooled:
    """What the first pass left."""

    sources: list[table.SourceSummary]
    rows: int = 0
    pairs: int = 0
    """Candidates: pairs, and rows that could not become one."""
    own_split: bool = False
    """Whether a source put its pairs on a side itself."""


class Reader:
    """Reads all sources of a config into a spool."""

    def __init__(
        self, config: DataConfig, folder: Path, ledger: Ledger, text: TextRules, tokens: TokenRules | None
    ) -> None:
        self._config, self._folder, self._ledger = config, folder, ledger
        self._text, self._tokens = text, tokens
        self._spool = table.Writer(folder / SPOOL, SPOOLED, compression="lz4")
        self._keys = KeyWriter(folder / KEYS)
        self._several = False
        self.result = Spooled([])

    def read(self, origins: Sequence[Origin], fingerprints: Sequence[str], recognise: Recogniser) -> Spooled:
        """Read every source and return what was found.

        Raises:
            DataError: a source cannot be read, or its format is not recognised.
        """
        limits = self._config.max_row_bytes, self._config.allow_urls
        readings = [sources.open_source(o, f, *limits) for o, f in zip(origins, fingerprints, strict=True)]
        self._several = len(origins) > 1
        for origin, fingerprint, reading, name in zip(
            origins, fingerprints, readings, names_of(origins, readings), strict=True
        ):
            summary = table.SourceSummary(name=name, fingerprint=fingerprint, test_split=reading.test_split)
            self._read(origin, reading, summary, recognise)
            self.result.sources.append(summary)
        self._spool.close()
        self._keys.close()
        if self.result.rows == 0:
            raise DataError(f"{', '.join(s.name for s in self.result.sources)}: there are no rows")
        return self.result

    def _read(
        self, origin: Origin, reading: sources.Reading, summary: table.SourceSummary, recognise: Recogniser
    ) -> None:
        name, before = summary.name, self.result.rows
        rows = (row for row in with_progress(reading, name) if self._opened(row, name, reading))
        first = list(itertools.islice(rows, LOOKED_AT))
        if first:
            convert = Converter(partial(recognise, origin, reading.name), [row.values for row in first])
            candidates = self._candidates(itertools.chain(first, rows), convert, name, reading)
            for batch in in_batches(candidates, BATCH):
                self._examine(batch, origin, summary)
            summary.format, summary.recognised = convert.format.format, convert.format.description
        summary.rows = self.result.rows - before

    def _opened(self, row: Row, name: str, reading: sources.Reading) -> bool:
        self.result.rows += 1
        if row.flaw is None:
            return True
        self._lose(row.flaw, self._place(name, reading, row), row.values)
        return False

    def _lose(self, flaw: FlawError, place: str, values: dict[str, Any]) -> None:
        self.result.pairs += 1
        self._ledger.note(flaw.problem, place, flaw.detail, values)

    def _place(self, name: str, reading: sources.Reading, row: Row) -> str:
        """Return what messages call a row; numbers begin anew in each source and in its own test split."""
        split = reading.test_split if row.held_out else None
        return " ".join(filter(None, [name if self._several else None, split, reading.place, str(row.number)]))

    def _candidates(
        self, rows: Iterable[Row], convert: Converter, name: str, reading: sources.Reading
    ) -> Iterator[Candidate]:
        halves = pairing.Halves(self._folder / f"halves-{len(self.result.sources)}")
        for row in rows:
            where = self._place(name, reading, row)
            try:
                made = convert(row.values)
            except FlawError as flaw:
                self._lose(flaw, where, row.values)
                continue
            for one in made:
                side = row.held_out if row.held_out is not None else one.held_out
                if isinstance(one, Unpaired):
                    halves.add(one, row.number, side)
                else:
                    yield Candidate(one, row.number, where, name, side)
        for pair, number, side in halves.pairs():
            yield Candidate(pair, number, self._place(name, reading, Row(number, {}, side)), name, side)
        for number, lonely, values in halves.alone():
            self._lose(lonely, self._place(name, reading, Row(number, {})), values)

    def _examine(self, batch: list[Candidate], origin: Origin, summary: table.SourceSummary) -> None:
        seed = self._config.seed
        self.result.pairs += len(batch)
        whole = [candidate for candidate in batch if self._identify(candidate)]
        sampled = [c for c in whole if c.keys and share_of(c.keys.group, seed, "sample") < origin.weight]
        summary.not_sampled += len(whole) - len(sampled)
        self.result.pairs -= len(whole) - len(sampled)
        if self._tokens:
            for candidate, found in zip(sampled, self._tokens.examine([c.pair for c in sampled]), strict=True):
                candidate.problems += found.problems
                candidate.lengths = found.lengths
        kept = [candidate for candidate in sampled if self._goes_on(candidate)]
        summary.pairs += len(kept)
        self._store(kept)

    def _identify(self, candidate: Candidate) -> bool:
        """Give a candidate its keys and the problems of its text; return whether it has keys."""
        try:
            candidate.keys = keys_of(candidate.pair)
            if candidate.keys.size > self._config.max_row_bytes:
                limit = self._config.max_row_bytes
                raise FlawError("too_large", f"the row has {candidate.keys.size} bytes; data.max_row_bytes is {limit}")
        except FlawError as flaw:
            self._ledger.note(flaw.problem, candidate.place, flaw.detail, stored(candidate.pair))
            return False
        candidate.problems += self._text.problems(candidate.pair)
        return True

    def _goes_on(self, candidate: Candidate) -> bool:
        """Record a candidate's problems: all that let it go on, and the first that does not."""
        for problem, detail in candidate.problems:
            if not self._ledger.note(problem, candidate.place, detail, stored(candidate.pair)):
                return False
        return True

    def _store(self, kept: list[Candidate]) -> None:
        if not kept:
            return
        keys = [candidate.keys for candidate in kept if candidate.keys]
        columns = table.pair_columns(
            [c.pair for c in kept],
            [c.row for c in kept],
            [k.group for k in keys],
            [c.source for c in kept],
            [k.content.hex() for k in keys],
        )
        held_out = pa.array([self._is_held_out(c) for c in kept])
        columns += [held_out, pa.array([c.place for c in kept]), pa.array([c.lengths for c in kept], SPOOLED[-1].type)]
        self._spool.add(pa.RecordBatch.from_arrays(columns, schema=SPOOLED))
        self._keys.add(
            [
                pa.array([k.content for k in keys], pa.binary(32)),
                pa.array([k.answers for k in keys], pa.binary(16)),
                pa.array([k.swapped for k in keys]),
                pa.array([k.prompt for k in keys], pa.binary(16)),
                held_out,
            ]
        )

    def _is_held_out(self, candidate: Candidate) -> bool:
        if candidate.held_out is not None:
            self.result.own_split = True
            return candidate.held_out
        assert candidate.keys is not None
        return share_of(candidate.keys.group, self._config.seed) < self._config.held_out


def names_of(origins: Sequence[Origin], readings: Sequence[sources.Reading]) -> list[str]:
    """Return what reports call the sources: the name given, else that of the file, as much as it takes of its path.

    What is of this machine only is no part of a name: files of one name in other folders are told apart by a number.
    """
    places = [portable(reading.name) for reading in readings]
    short = [Path(place).name or place for place in places]
    told = [file if short.count(file) == 1 else place for place, file in zip(places, short, strict=True)]
    numbered = [f"{name} ({told[:i].count(name) + 1})" if told.count(name) > 1 else name for i, name in enumerate(told)]
    return [origin.name or name for origin, name in zip(origins, numbered, strict=True)]


def with_progress(reading: sources.Reading, name: str) -> Iterator[Row]:
    """Yield the rows of a source under a progress bar."""
    with bar(f"reading {name}", reading.total, unit=reading.unit) as progress:
        for number, row in enumerate(reading.rows()):
            if number % BATCH == 0:
                progress.update(reading.position - progress.n)
            yield row
        progress.update(reading.total - progress.n)


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def stored(pair: Pair) -> dict[str, Any]:
    """Return a pair as the quarantine keeps it."""
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
