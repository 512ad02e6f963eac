"""What is measured over all pairs that stay: length bias, topics, sources."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from preference_tuning.data.table import LengthBias

MOST_NAMES = 1000
"""Different topics or sources that are counted; a column with more is no grouping."""


class Measures:
    """Sums over batches of pairs."""

    def __init__(self) -> None:
        self._pairs = self._longer = self._shorter = 0
        self._chosen = self._rejected = self._difference = self._squares = 0.0
        self._names: dict[str, Counter[str]] = {"topic": Counter(), "source": Counter()}

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch in."""
        if not batch.num_rows:
            return
        chosen, rejected = characters(batch["chosen"]), characters(batch["rejected"])
        difference = (chosen - rejected).astype(np.float64)
        self._pairs += batch.num_rows
        self._longer += int((difference > 0).sum())
        self._shorter += int((difference < 0).sum())
        self._chosen += float(chosen.sum())
        self._rejected += float(rejected.sum())
        self._difference += float(difference.sum())
        self._squares += float((difference**2).sum())
        for column, counts in self._names.items():
            if len(counts) <= MOST_NAMES:
                for found in pc.value_counts(batch[column].drop_null()).to_pylist():
                    counts[found["values"]] += found["counts"]

    def bias(self) -> LengthBias:
        """Return how the lengths of the answers, in characters, tell chosen from rejected."""
        mean = self._difference / self._pairs
        variance = self._squares / self._pairs - mean**2
        unequal = self._longer + self._shorter
        return LengthBias(
            chosen_longer=self._longer / unequal if unequal else 0.5,
            effect=mean / math.sqrt(variance) if variance > 1e-9 else 0.0,
            mean_chosen=self._chosen / self._pairs,
            mean_rejected=self._rejected / self._pairs,
        )

    def named(self, column: str) -> dict[str, int]:
        """Return the number of pairs of each topic or source, the largest first; empty if it is no grouping."""
        counts = self._names[column]
        return dict(counts.most_common()) if len(counts) <= MOST_NAMES else {}


def characters(messages: pa.ListArray) -> NDArray[np.int64]:
    """Return the characters of each list of messages; no list is empty."""
    lengths = pc.utf8_length(pc.struct_field(pc.list_flatten(messages), "content")).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(pc.list_value_length(messages).to_numpy(zero_copy_only=False))[:-1]])
    sums: NDArray[np.int64] = np.add.reduceat(lengths, starts.astype(np.int64))
    return sums
