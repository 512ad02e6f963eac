"""Which prompts lie on which side of a split, read from the list that lies beside a dataset (``table.SPLIT``)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from preference_tuning.errors import DataError


def check_overlap(split: Path) -> None:
    """Refuse held-out pairs whose prompts are trained on.

    Raises:
        DataError: there are some; figures on them would flatter.
    """
    held_out = _of_side(split, "held_out")["group"]
    if shared := _shared(held_out, _of_side(split, "train")["group"]):
        raise DataError(
            f"{shared} of {len(pc.unique(held_out))} held-out prompts are among the training data, so figures on "
            "them would flatter: set data.problems.leak: drop, or mend the split of the source"
        )


def trained_on(split: Path, other: Path) -> tuple[int, int]:
    """Return how many of the held-out prompts of ``split`` are on the training side of ``other``, and how many it has.

    A pair that is there under another group counts as well: the groups of a set follow ``data.columns.group``.
    """
    held_out, training = _of_side(split, "held_out"), _of_side(other, "train")
    known = pc.or_(*(pc.is_in(held_out[name], pc.unique(training[name])) for name in ("group", "content")))
    return len(pc.unique(held_out["group"].filter(known))), len(pc.unique(held_out["group"]))


def came(split: Path, before: Path) -> int:
    """Return how many pairs of ``split`` are not in the split ``before``, whatever their side."""
    now, then = (_read(path, "content")["content"] for path in (split, before))
    different = pc.unique(now)
    return len(different) - int(pc.sum(pc.is_in(different, pc.unique(then))).as_py() or 0)


def new_to(split: Path, groups: Sequence[str]) -> list[bool]:
    """Return for each group of pairs whether a model was not trained on it, from the split of its data."""
    trained = set(_of_side(split, "train")["group"].to_pylist())
    return [group not in trained for group in groups]


def held_out(split: Path) -> set[str]:
    """Return the hashes of the held-out pairs."""
    return set(_of_side(split, "held_out")["content"].to_pylist())


def fingerprint_of(split: Path) -> str:
    """Return one hash over every pair's content, group and side; their order and their sources decide nothing."""
    table = _read(split, "content", "group", "side").to_pydict()
    digest = hashlib.sha256()
    for row in sorted(zip(*table.values(), strict=True)):
        digest.update("\0".join(row).encode() + b"\n")
    return digest.hexdigest()


def _of_side(split: Path, side: str) -> Any:
    table = _read(split, "content", "group", "side")
    # As a pattern: pyarrow imports pandas to compare with a value of Python.
    return table.filter(pc.match_substring_regex(table["side"], f"^{side}$")).select(["content", "group"])


def _read(split: Path, *columns: str) -> Any:
    # `pq.read_table` would do the same after a second of imports, of datasets and of pandas.
    with pq.ParquetFile(split) as file:
        return file.read(columns=columns)


def _shared(some: Any, others: Any) -> int:
    return int(pc.sum(pc.is_in(pc.unique(some), pc.unique(others))).as_py() or 0)
