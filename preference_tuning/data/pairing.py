"""Unpaired answers with labels (KTO's form), paired where a prompt has both kinds; outside of memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preference_tuning.data.across import engine, parts, scan
from preference_tuning.data.content import group_of_prompt
from preference_tuning.data.pair import FlawError, Pair, Unpaired

BATCH = 2000
PART = 20_000
"""Answers that are matched at a time, with their text."""
SCHEMA = pa.schema(
    [
        ("prompt_key", pa.string()),
        ("good", pa.bool_()),
        ("held_out", pa.bool_()),
        ("row", pa.int64()),
        ("answer", pa.string()),
        ("rest", pa.string()),
    ]
)
# The n-th good answer of a prompt meets its n-th bad one, by their text: the order of rows decides nothing.
MATCH = """
with ranked as (
    select *, row_number() over (partition by prompt_key, good, held_out order by answer, row) as place
    from {halves} where {part}
)
select {columns} from (select * from ranked where good) g {join} join (select * from ranked where not good) b
on g.prompt_key = b.prompt_key and g.place = b.place and g.held_out is not distinct from b.held_out {where}
order by coalesce(g.row, b.row), g.place
"""


class Halves:
    """Collects unpaired answers on disk and gives them back as pairs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[dict[str, Any]] = []
        self._count = 0

    def add(self, half: Unpaired, row: int, held_out: bool | None) -> None:
        """Keep an answer until all rows are read."""
        rest = {
            "prompt": half.prompt,
            "tools": half.tools,
            "topic": half.topic,
            "source": half.source,
            "group": half.group,
        }
        self._waiting.append(
            {
                # Half a surrogate pair cannot be hashed; escaped JSON carries it on to where it is reported.
                "prompt_key": group_of_prompt(half.prompt),
                "good": half.good,
                "held_out": held_out,
                "row": row,
                "answer": json.dumps(half.answer),
                "rest": json.dumps(rest),
            }
        )
        self._count += 1
        if len(self._waiting) >= BATCH:
            self._flush()

    def pairs(self) -> Iterator[tuple[Pair, int, bool | None]]:
        """Yield each pair with the row of its good answer and its side."""
        for found in self._query("g.rest, g.answer as good, b.answer as bad, g.row as row, g.held_out", "inner", ""):
            rest = json.loads(found["rest"])
            pair = Pair(chosen=json.loads(found["good"]), rejected=json.loads(found["bad"]), **rest)
            yield pair, found["row"], found["held_out"]

    def alone(self) -> Iterator[tuple[int, FlawError, dict[str, Any]]]:
        """Yield the row, the flaw and the content of each answer that found no partner."""
        columns = (
            "coalesce(g.row, b.row) as row, g.row is not null as good, coalesce(g.answer, b.answer) as answer, "
            "coalesce(g.rest, b.rest) as rest"
        )
        for found in self._query(columns, "full outer", "where g.row is null or b.row is null"):
            kind, other = ("good", "bad") if found["good"] else ("bad", "good")
            detail = (
                f"a {kind} answer, and the prompt has no {other} one left: DPO learns from pairs "
                "(a set of single labelled answers is for KTO)"
            )
            values = {"answer": json.loads(found["answer"]), **json.loads(found["rest"])}
            yield found["row"], FlawError("unpaired", detail), values

    def _flush(self) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._folder / "halves.parquet", SCHEMA)
        self._writer.write_table(pa.Table.from_pylist(self._waiting, SCHEMA))
        self._waiting = []

    def _query(self, columns: str, join: str, where: str) -> Iterator[dict[str, Any]]:
        if self._waiting:
            self._flush()
        if self._writer is None:
            return
        self._writer.close()
        how = {"columns": columns, "join": join, "where": where, "halves": scan(self._folder / "halves.parquet")}
        with engine(self._folder) as connection:
            for part in parts("prompt_key", self._count, PART, literal="'{:02x}'"):
                for batch in connection.sql(MATCH.format(part=part, **how)).to_arrow_reader(BATCH):
                    yield from batch.to_pylist()
