"""Comparisons across rows, outside of memory: duplicates, contradictions, leaks, the fingerprint.

The keys of all pairs lie in a Parquet file, and DuckDB, which spills to disk, does the grouping and sorting; so memory
does not grow with the number of rows.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preference_tuning.data.table import ParquetWriter

MEMORY = "256MB"
PART = 100_000
"""Pairs that are compared at a time: with more of them the comparison takes more turns, not more memory."""
KEYS = pa.schema(
    [
        ("id", pa.int64()),
        ("content", pa.binary(32)),
        ("answers", pa.binary(16)),
        ("swapped", pa.bool_()),
        ("prompt", pa.binary(16)),
        ("held_out", pa.bool_()),
    ]
)

PROBLEMS = ("", "leak", "contradiction", "duplicate", "near_duplicate")
"""What a pair's entry in ``Across.problems`` stands for."""

# Run on one part of the pairs after another. What is compared has the prompt in common, so parts by prompts are whole.
# A leak comes first: of a pair that is on both sides the held-out one stays. Within a side a pair preferred both ways
# says nothing, so all its rows go; of equal pairs the first stays.
FIND = """
insert into found
with part as (
    select * from keys where {part}
), leaks as (
    select id from part where not held_out and prompt in (select prompt from held where {part})
), rest as (
    select * from part anti join leaks using (id)
), disputed as (
    select answers, held_out from rest group by all having bool_or(swapped) and not bool_and(swapped)
), contradictions as (
    select id from rest semi join disputed using (answers, held_out)
), firsts as (
    select content, held_out, min(id) as first from rest group by content, held_out having count(*) > 1
), duplicates as (
    select id from rest join firsts using (content, held_out) where id <> first
        and id not in (select id from contradictions)
)
select id, 1::utinyint as problem from leaks
union all select id, 2 from contradictions
union all select id, 3 from duplicates
"""


@contextmanager
def engine(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Give a DuckDB connection that keeps to ``MEMORY`` and spills into ``folder``."""
    settings: dict[str, Any] = {"memory_limit": MEMORY, "threads": 2, "temp_directory": str(folder / "spill")}
    with duckdb.connect(":memory:", config=settings) as connection:
        connection.execute("set preserve_insertion_order = false")
        yield connection


class KeyWriter:
    """Writes the keys of pairs, numbered in the order they come in."""

    def __init__(self, path: Path) -> None:
        self._writer = ParquetWriter(path, KEYS)
        self.count = 0

    def add(self, columns: list[pa.Array]) -> None:
        """Append the columns of ``KEYS`` after ``id``."""
        rows = len(columns[0])
        self._writer.add([pa.array(np.arange(self.count, self.count + rows)), *columns])
        self.count += rows

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class Across:
    """The keys of all pairs, compared."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, keys: Path, count: int, held_out: Path | None = None
    ) -> None:
        """Compare ``count`` pairs by their ``keys``; what is held out is theirs, or that of other keys."""
        self.connection, self._count = connection, count
        connection.execute(f"create view keys as select * from {scan(keys)}")
        connection.execute(f"create view held as select prompt from {scan(held_out or keys)} where held_out")
        connection.execute("create table found (id bigint, problem utinyint)")
        for part in self._parts("prompt"):
            connection.execute(FIND.format(part=part))

    def add(self, problem: str, query: str) -> None:
        """Give the pairs whose ids ``query`` selects a problem."""
        number = PROBLEMS.index(problem)
        self.connection.execute(f"insert into found select id, {number} from ({query})")

    def problems(self) -> NDArray[np.uint8]:
        """Return for each pair the problem it has beside the others, as a place in ``PROBLEMS``."""
        problems = np.zeros(self._count, np.uint8)
        for batch in self.batches("select id, problem from found"):
            problems[batch["id"].to_numpy()] = batch["problem"].to_numpy()
        return problems

    def keep_without(self, dropped: Iterable[str]) -> None:
        """Let ``kept`` be the pairs that have none of these problems."""
        numbers = ", ".join(["0", *(str(PROBLEMS.index(problem)) for problem in dropped)])
        self.connection.execute(
            "create or replace view kept as select * from keys "
            f"anti join (select id from found where problem in ({numbers})) using (id)"
        )

    def prompts(self) -> int:
        """Return how many different prompts are kept."""
        query = "select count(distinct prompt) from kept where {}"
        counts = (self.connection.execute(query.format(part)).fetchall() for part in self._parts("prompt"))
        return sum(int(count) for ((count,),) in counts)

    def firsts(self) -> NDArray[np.bool_]:
        """Return one kept pair of each prompt, that with the smallest hash."""
        query = "select arg_min(id, content) as id from kept where {} group by prompt"
        return self.ids(*(query.format(part) for part in self._parts("prompt")))

    def ids(self, *queries: str) -> NDArray[np.bool_]:
        """Return for each pair whether a query selects its id."""
        chosen = np.zeros(self._count, np.bool_)
        for query in queries:
            for batch in self.batches(query):
                chosen[batch["id"].to_numpy()] = True
        return chosen

    def sample(self, size: int) -> NDArray[np.bool_]:
        """Return the kept pairs with the ``size`` smallest hashes: a sample that the order of rows does not decide."""
        return self.ids(f"select id from kept order by content limit {size}")

    def fingerprints(self, *extra: str) -> tuple[str, str]:
        """Return ``(of the content, of the content with its side and extra)``: sha256 over the sorted hashes."""
        content, split = hashlib.sha256(), hashlib.sha256("\0".join(extra).encode())
        for part in self._parts("content"):
            query = f"select content, held_out from kept where {part} order by content, held_out"
            for batch in self.batches(query):
                for value, held_out in zip(batch["content"].to_pylist(), batch["held_out"].to_pylist(), strict=True):
                    content.update(value)
                    split.update(value + (b"h" if held_out else b"t"))
        return content.hexdigest(), split.hexdigest()

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """Yield the result of a query."""
        # A cursor of its own: the next query on the connection would end this one.
        yield from self.connection.cursor().sql(query).to_arrow_reader(50_000)

    def _parts(self, column: str) -> list[str]:
        return parts(column, self._count, PART)


def parts(column: str, count: int, size: int, literal: str = "'\\x{:02X}'::blob") -> list[str]:
    """Return conditions that cut ``count`` rows, in the order of a column of hashes, into parts of about ``size``.

    Args:
        column: holds hashes.
        count: of the rows.
        size: of a part; there are 256 at most.
        literal: a first byte as the column writes it.
    """
    number = min(256, math.ceil(count / size)) or 1
    starts = [256 * i // number for i in range(number)]
    return [
        f"{column} >= {literal.format(low)}" + (f" and {column} < {literal.format(high)}" if high < 256 else "")
        for low, high in zip(starts, [*starts[1:], 256], strict=True)
    ]


def scan(path: Path) -> str:
    """Return what stands for a Parquet file in a query."""
    quoted = str(path).replace("'", "''")
    return f"read_parquet('{quoted}')"
