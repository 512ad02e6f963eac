"""The dataset as token rows, streamed to disk once for each content, tokenizer and room, and shared by all jobs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from preference_tuning import fingerprint
from preference_tuning.errors import DataError
from preference_tuning.models import chat
from preference_tuning.progress import bar


@dataclass
class TokenRows:
    """Rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``length``, ``cut``, ``content``, ``group``."""

    rows: datasets.Dataset
    dropped: int
    cut: int


def tokenise(table: Path, tokenizer: chat.Tokenizer, room: chat.Room, folder: Path, answers: int) -> TokenRows:
    """Tokenise the pairs of an Arrow table into ``folder``; rows without room for an answer are left out and counted.

    Args:
        table: an Arrow file of canonical pairs.
        tokenizer: with the chat template of the run.
        room: how long a row may be.
        folder: where the token rows are kept, by a hash of their content.
        answers: how many answers of a pair the stage reads (1: chosen, 2: both); decides ``length`` and ``cut``.

    Raises:
        DataError: no row is left.
    """
    datasets.disable_progress_bars()
    pairs = in_order(table)
    content = hashlib.sha256("".join(sorted(pairs.data.column("content").to_pylist())).encode()).hexdigest()
    code = fingerprint.of_sources("preference_tuning.models.rows")
    key = fingerprint.of_value([content, chat.tokenizer_hash(tokenizer), vars(room), answers, code])[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with bar(f"tokenising {table.stem}", len(pairs)) as progress:

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            progress.update(len(batch["prompt"]))
            return _encode(batch, tokenizer, room, answers)

        rows = pairs.map(
            encode,
            batched=True,
            remove_columns=pairs.column_names,
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
        )
    if len(rows) == 0:
        raise DataError(
            f"no row of {table.name} leaves room for an answer within {room.max_length} tokens; raise the limit"
        )
    return TokenRows(rows, dropped=len(pairs) - len(rows), cut=pc.sum(rows.data.column("cut")).as_py())


def in_order(table: Path) -> datasets.Dataset:
    """Return the pairs of an Arrow table in the order of their content: that of the source decides nothing."""
    pairs = datasets.Dataset.from_file(str(table))
    # Signed: datasets cannot slice by unsigned numbers, which it tries where the rows lie in order already.
    return pairs.select(pc.sort_indices(pairs.data.column("content")).to_numpy().astype("int64"))


def _encode(
    batch: dict[str, list[Any]], tokenizer: chat.Tokenizer, room: chat.Room, answers: int
) -> dict[str, list[Any]]:
    names = ("chosen", "rejected")[:answers]
    conversations = [
        chat.Conversation(
            chat.read_messages(batch["prompt"][i]),
            [chat.read_messages(batch[name][i]) for name in names],
            chat.read_tools(batch["tools"][i]),
        )
        for i in range(len(batch["prompt"]))
    ]
    found = list(chat.encode(tokenizer, conversations, room))
    kept = [i for i, row in enumerate(found) if isinstance(row, chat.Encoded)]
    encoded = [row for row in found if isinstance(row, chat.Encoded)]
    return {
        **{name: [batch[name][i] for i in kept] for name in ("content", "group")},
        "prompt_ids": [row.prompt_ids for row in encoded],
        "chosen_ids": [row.answer_ids[0] for row in encoded],
        "rejected_ids": [row.answer_ids[1] if answers == 2 else [] for row in encoded],
        "length": [len(row.prompt_ids) + sum(map(len, row.answer_ids)) for row in encoded],
        "cut": [any(row.answer_cut) for row in encoded],
    }
