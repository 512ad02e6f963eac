"""The dataset as token rows, made once a job and kept beside its checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from preference_tuning import fingerprint
from preference_tuning.errors import DataError
from preference_tuning.models import chat


@dataclass
class TokenRows:
    """Rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``length``; what was dropped and cut."""

    rows: datasets.Dataset
    dropped: int
    cut: int


def tokenise(table: Path, tokenizer: chat.Tokenizer, max_length: int, folder: Path, answers: int) -> TokenRows:
    """Tokenise the pairs of an Arrow table into ``folder``; rows without room for an answer are left out and counted.

    Args:
        table: an Arrow file of canonical pairs.
        tokenizer: with the chat template of the run.
        max_length: longest prompt plus answer, in tokens.
        folder: where the token rows are kept.
        answers: how many answers of a pair the stage reads (1: chosen, 2: both); decides ``length``.

    Raises:
        DataError: no row is left.
    """
    datasets.disable_progress_bars()
    pairs = datasets.Dataset.from_file(str(table))
    key = fingerprint.of_value([fingerprint.of_file(table), chat.template_hash(tokenizer), max_length, answers])

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = [
            chat.encode_pair(tokenizer, prompt, chosen, rejected, max_length)
            for prompt, chosen, rejected in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)
        ]
        kept = [pair for pair in encoded if pair is not None]
        columns: dict[str, list[Any]] = {name: [pair[name] for pair in kept] for name in PAIR_COLUMNS}  # type: ignore[literal-required]
        columns["length"] = [
            len(p["prompt_ids"]) + len(p["chosen_ids"]) + (len(p["rejected_ids"]) if answers == 2 else 0) for p in kept
        ]
        return columns

    rows = pairs.map(
        encode,
        batched=True,
        remove_columns=pairs.column_names,
        cache_file_name=str(folder / f"tokens-{table.stem}.arrow"),
        new_fingerprint=key[:32],
    )
    if len(rows) == 0:
        raise DataError(f"no row of {table.name} leaves room for an answer within {max_length} tokens; raise the limit")
    return TokenRows(rows, dropped=len(pairs) - len(rows), cut=_count_cut(rows, max_length, answers))


PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def _count_cut(rows: datasets.Dataset, max_length: int, answers: int) -> int:
    names = PAIR_COLUMNS[1 : 1 + answers]
    return sum(
        any(len(prompt) + len(answer) >= max_length for answer in row)
        for prompt, *row in zip(rows["prompt_ids"], *(rows[name] for name in names), strict=True)
    )
