"""The score table: one row a held-out pair, with what every model makes of its two answers.

    content, prompt                                  hash of the pair; the group of its prompt
    chosen_tokens, rejected_tokens                   lengths of the answers
    <model>/chosen, <model>/rejected                 summed log-probabilities, nats
    <model>/chosen_token_logps, .../rejected_...     those of the single tokens
    <model>/chosen_kl, <model>/rejected_kl           KL(model || its reference), summed over the answer's tokens, nats

Every figure of an evaluation follows from it. The file's metadata names the reference of each model.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDES = ("chosen", "rejected")
REFERENCES = b"references"

Values = dict[str, np.ndarray[Any, Any]]


class Collector:
    """Fills the table batch by batch."""

    def __init__(self, chosen_tokens: Sequence[int], rejected_tokens: Sequence[int]) -> None:
        """Begin a table for pairs with answers of these lengths."""
        self._lengths = dict(zip(SIDES, map(np.asarray, (chosen_tokens, rejected_tokens)), strict=True))
        self._tokens: dict[str, list[np.ndarray[Any, Any] | None]] = {}
        self._sums: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, numbers: Sequence[int], answer: Any, logps: Mapping[str, Any], kl: Mapping[str, Any]) -> None:
        """Add a batch: values of its answer tokens, of which ``answer`` tells the owner (pair i has i and b + i)."""
        order = np.argsort(answer, kind="stable")
        ends = np.cumsum(np.bincount(answer, minlength=2 * len(numbers)))
        for name, values in logps.items():
            for side, row, part in self._parts(numbers, np.asarray(values)[order], ends):
                self._column(f"{name}/{side}_token_logps")[row] = part.astype(np.float32)
                self._sum(f"{name}/{side}")[row] = part.astype(np.float64).sum()
        for name, values in kl.items():
            for side, row, part in self._parts(numbers, np.asarray(values)[order], ends):
                self._sum(f"{name}/{side}_kl")[row] = part.astype(np.float64).sum()

    def table(self, contents: Sequence[str], groups: Sequence[str], references: Mapping[str, str]) -> pa.Table:
        """Return the finished table.

        Raises:
            ValueError: a pair was not scored by every model.
        """
        if missing := [name for name, parts in self._tokens.items() if any(part is None for part in parts)]:
            raise ValueError(f"not every pair has {', '.join(missing)}")
        columns: dict[str, Any] = {"content": list(contents), "prompt": list(groups)}
        columns |= {f"{side}_tokens": lengths for side, lengths in self._lengths.items()}
        columns |= dict(sorted({**self._sums, **self._tokens}.items()))
        return pa.table(columns).replace_schema_metadata({REFERENCES: json.dumps(dict(references))})

    def _parts(self, numbers: Sequence[int], values: Any, ends: Any) -> Iterable[tuple[str, int, Any]]:
        """Yield the values of each answer with its side and its row."""
        for owner, part in enumerate(np.split(values, ends[:-1])):
            side, place = divmod(owner, len(numbers))
            yield SIDES[side], numbers[place], part

    def _column(self, name: str) -> list[Any]:
        return self._tokens.setdefault(name, [None] * len(self._lengths["chosen"]))

    def _sum(self, name: str) -> Any:
        return self._sums.setdefault(name, np.full(len(self._lengths["chosen"]), np.nan))


def write(table: pa.Table, path: Path) -> None:
    """Write the table as Parquet; equal tables give equal bytes."""
    pq.write_table(table, path, compression="zstd")


def read(path: Path) -> Values:
    """Return the columns with one value a pair: texts as objects, numbers as float64."""
    table = pq.read_table(path)
    plain = [field for field in table.schema if not pa.types.is_list(field.type)]
    texts = {field.name for field in plain if pa.types.is_string(field.type)}
    return {
        field.name: table[field.name].to_numpy().astype(object if field.name in texts else np.float64)
        for field in plain
    }


def references(path: Path) -> dict[str, str]:
    """Return the reference of each model that has one."""
    found: dict[str, str] = json.loads((pq.read_schema(path).metadata or {}).get(REFERENCES, b"{}"))
    return found
