"""The second pass: pairs of the spool go to their side of the split, or to the quarantine, and are measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preference_tuning.data import table
from preference_tuning.data.across import PROBLEMS
from preference_tuning.data.ledger import Ledger
from preference_tuning.data.measures import Measures
from preference_tuning.progress import bar

DETAILS = {
    "leak": "the prompt is among the held-out ones",
    "contradiction": "the same answers stand the other way round in another row",
    "duplicate": "an earlier row is the same",
    "near_duplicate": "the prompt is nearly a held-out one",
}
SAMPLE_FILE = "sample.arrow"
_SPLIT = pa.schema(
    [
        ("content", pa.string()),
        ("side", pa.string()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)


def split(
    spool: Path,
    folder: Path,
    work: Path,
    problems: NDArray[np.uint8],
    sample: NDArray[np.bool_],
    ledger: Ledger,
    measures: Measures,
) -> Mapping[str, int]:
    """Write the sides and the split manifest to ``folder``, a sample to ``work``; return the size of each side.

    Args:
        spool: the pairs of the first pass, in the order of the two arrays.
        folder: of the dataset.
        work: of what is needed only on the way.
        problems: of each pair beside the others, as places in ``across.PROBLEMS``.
        sample: which pairs are shown and measured in tokens.
        ledger: records the problems, and decides.
        measures: counts the pairs that stay.
    """
    writers = {side: table.Writer(folder / f"{side}.arrow", table.SCHEMA) for side in table.SPLITS}
    samples = table.Writer(work / SAMPLE_FILE, pa.schema([*table.SCHEMA, ("lengths", pa.list_(pa.int32()))]))
    start = 0
    with (
        table.ParquetWriter(folder / table.SPLIT, _SPLIT) as manifest,
        bar("splitting", len(problems)) as progress,
    ):
        for batch in table.read_batches(spool):
            here = slice(start, start + batch.num_rows)
            stays = judged(batch, problems[here], ledger)
            held_out = batch["held_out"].to_numpy(zero_copy_only=False)
            for side, on_side in (("train", ~held_out), ("held_out", held_out)):
                rows = batch.filter(pa.array(stays & on_side))
                writers[side].add(rows.select(table.SCHEMA.names))
                manifest.add(_listed(rows, side))
            measures.add(batch.filter(pa.array(stays)))
            samples.add(batch.filter(pa.array(stays & sample[here])).select([*table.SCHEMA.names, "lengths"]))
            start += batch.num_rows
            progress.update(batch.num_rows)
    for writer in (*writers.values(), samples):
        writer.close()
    return {side: writer.count for side, writer in writers.items()}


def judged(batch: pa.RecordBatch, problems: NDArray[np.uint8], ledger: Ledger) -> NDArray[np.bool_]:
    """Return which rows stay, and record the problems that rows have beside others."""
    stays = np.ones(batch.num_rows, np.bool_)
    for i in map(int, np.flatnonzero(problems)):
        (row,) = batch.slice(i, 1).to_pylist()
        problem = PROBLEMS[problems[i]]
        stays[i] = ledger.note(problem, row["place"], DETAILS[problem], _readable(row))
    return stays


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    sides = ("prompt", "chosen", "rejected")
    return {side: [{k: v for k, v in message.items() if v is not None} for message in row[side]] for side in sides}


def _listed(rows: pa.RecordBatch, side: str) -> list[pa.Array]:
    sides = pa.array([side] * rows.num_rows, pa.string())
    return [rows["content"], sides, rows["group"], rows["source"], rows["row"]]
