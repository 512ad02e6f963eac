"""Prompts that are nearly the same (MinHash, Broder 1997, by datasketch; banded as in Leskovec et al., chapter 3).

Banding finds candidates, and each is confirmed by the true Jaccard similarity of its word sequences, so what is
reported as nearly the same is.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from preference_tuning.data.across import Across, scan
from preference_tuning.data.table import ParquetWriter, read_batches
from preference_tuning.progress import bar

PERMUTATIONS = 64
RECALL = 0.95
"""Wanted share of the near-duplicates at the threshold that banding makes candidates of."""
LONGEST = 20_000
"""Characters of a prompt that are compared."""

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

# Everything in a bucket is compared with one of it, chosen by its content: the order of rows decides nothing.
ACROSS = """
with sides as (select b.id, b.key, held_out, content from bands b join keys using (id) where band = {band}),
held as (select key, arg_min(id, content) as other from sides where held_out group by key)
select id, other from sides join held using (key) where not held_out
"""
WITHIN = """
with here as (select b.id, b.key, content from bands b join keys using (id) where band = {band}),
firsts as (select key, arg_min(id, content) as other from here group by key having count(*) > 1)
select id, other from here join firsts using (key) where id <> other
"""


def shingles(prompt: list[dict[str, Any]]) -> set[bytes]:
    """Return the three-word sequences of a prompt, its system turn aside: many prompts share that one."""
    text = "\n".join(m["content"] for m in prompt if m["role"] != "system")[:LONGEST]
    words = WORD.findall(text.casefold())
    return {" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))}


def bands(similarity: float) -> int:
    """Return into how many bands to cut ``PERMUTATIONS`` to find pairs of this similarity with ``RECALL``."""
    for rows in (32, 16, 8, 4, 2):
        count = PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** count >= RECALL:
            return count
    return PERMUTATIONS


class NearDuplicates:
    """Finds near-duplicates among the different prompts of the kept pairs."""

    def __init__(self, across: Across, spool: Path, folder: Path, similarity: float) -> None:
        self._across, self._spool, self._folder, self._similarity = across, spool, folder, similarity
        self._bands = bands(similarity)

    def find(self) -> int:
        """Mark the training pairs whose prompt is nearly a held-out one; return how many prompts have a near twin."""
        run = self._across.connection.execute
        self._write_bands()
        for table in ("bands", "texts"):
            run(f"create view {table} as select * from {scan(self._folder / f'{table}.parquet')}")
        run("create table twins (id bigint, other bigint, across boolean)")
        for band, (query, is_across) in itertools.product(range(self._bands), ((ACROSS, True), (WITHIN, False))):
            for pairs in self._confirmed(query.format(band=band)):
                self._across.connection.register("confirmed", pairs)
                run("insert into twins select id, other, ? from confirmed", [is_across])
        self._across.add(
            "near_duplicate",
            "select id from kept where not held_out and prompt in "
            "(select prompt from keys where id in (select id from twins where across))",
        )
        query = "select count(distinct id) from (select id from twins union all select other from twins)"
        ((count,),) = run(query).fetchall()
        return int(count)

    def _write_bands(self) -> None:
        first, count = self._across.firsts(), self._bands
        with (
            ParquetWriter(self._folder / "bands.parquet", _BANDS) as band_file,
            ParquetWriter(self._folder / "texts.parquet", _TEXTS) as text_file,
            bar("near-duplicate prompts", int(first.sum())) as progress,
        ):
            for ids, prompts in self._prompts(first):
                sets = [shingles(prompt) for prompt in prompts]
                signatures = np.stack([m.hashvalues for m in MinHash.generator(sets, num_perm=PERMUTATIONS, seed=1)])
                # Only compared within this process, so Python's own hash will do.
                keys = [hash(part.tobytes()) for row in signatures for part in np.split(row, count)]
                numbers = np.tile(np.arange(count, dtype=np.int16), len(ids))
                band_file.add([numbers, keys, np.repeat(ids, count)])
                text_file.add([ids, [b"\0".join(sorted(s)) for s in sets]])
                progress.update(len(ids))

    def _prompts(self, wanted: Any) -> Iterator[tuple[Any, list[Any]]]:
        start = 0
        for batch in read_batches(self._spool):
            here = np.flatnonzero(wanted[start : start + batch.num_rows])
            if len(here):
                yield here + start, batch["prompt"].take(pa.array(here)).to_pylist()
            start += batch.num_rows

    def _confirmed(self, query: str) -> Iterator[pa.Table]:
        """Yield the candidates, ``id`` and ``other``, whose similarity really reaches the threshold, in batches."""
        joined = (
            f"select c.id, c.other, a.shingles as one, b.shingles as two from ({query}) c "
            "join texts a on a.id = c.id join texts b on b.id = c.other"
        )
        for batch in self._across.batches(joined):
            similar = [self._similar(row["one"], row["two"]) for row in batch.to_pylist()]
            yield pa.table(batch.select(["id", "other"]).filter(pa.array(similar, pa.bool_())))

    def _similar(self, one: bytes, two: bytes) -> bool:
        a, b = set(one.split(b"\0")), set(two.split(b"\0"))
        return len(a & b) >= self._similarity * len(a | b)


_BANDS = pa.schema([("band", pa.int16()), ("key", pa.int64()), ("id", pa.int64())])
_TEXTS = pa.schema([("id", pa.int64()), ("shingles", pa.binary())])
