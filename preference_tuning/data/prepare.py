"""From a source to a canonical dataset: check every row, drop what teaches nothing, split by prompt."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint, jobs
from preference_tuning.config import DataConfig
from preference_tuning.data import report, sources, table
from preference_tuning.errors import DataError

SHOWN_PROBLEMS = 10
PROMPT_ENDS = ("user", "tool")
ROLES = ("system", "user", "assistant", "tool")

Messages = list[dict[str, str]]


class _RowError(ValueError):
    """A row that cannot be used; the message says why."""


def prepare(config: DataConfig, source_fingerprint: str, folder: Path) -> table.Dataset:
    """Write the canonical dataset of a source to ``folder`` and return it.

    Raises:
        DataError: rows are missing, blank or of the wrong shape (all named), or too many teach nothing.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        manifest = _write(config, source_fingerprint, aside)
        jobs.write_json(aside / table.MANIFEST, manifest.model_dump(mode="json"))
        jobs.write_text(aside / table.REPORT, report.render(manifest, table.Dataset(aside)))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return table.Dataset(folder)


def check(config: DataConfig) -> int:
    """Read and check every row without writing anything; return how many pairs there are.

    Raises:
        DataError: as ``prepare``.
    """
    return sum(1 for _ in _pairs(config, None))


def _write(config: DataConfig, source_fingerprint: str, folder: Path) -> table.Manifest:
    writers = {split: table.Writer(folder / f"{split}.arrow") for split in table.SPLITS}
    counts = _Counts()
    hashes: list[str] = []
    with (folder / table.QUARANTINE).open("w", encoding="utf-8") as quarantine:
        seen: set[str] = set()
        for row in _pairs(config, source_fingerprint):
            content = fingerprint.of_value([row["prompt"], row["chosen"], row["rejected"]])
            if reason := _teaches_nothing(row, content, seen):
                counts.dropped[reason] += 1
                quarantine.write(json.dumps({"reason": reason, **row}, ensure_ascii=False) + "\n")
                continue
            seen.add(content)
            split = "held_out" if _is_held_out(row["group"], config) else "train"
            writers[split].add(row)
            hashes.append(f"{split} {content}")
            counts.add(row)
    for writer in writers.values():
        writer.close()
    _check_counts(config, counts, {split: writer.count for split, writer in writers.items()})
    return table.Manifest(
        fingerprint=fingerprint.of_value(sorted(hashes)),
        source=config.source,
        source_fingerprint=source_fingerprint,
        rows_in=counts.rows + counts.dropped.total(),
        train=writers["train"].count,
        held_out=writers["held_out"].count,
        dropped=dict(counts.dropped),
        prompts=len(counts.groups),
        seed=config.seed,
        held_out_share=config.held_out,
        chosen_longer=counts.chosen_longer / counts.rows,
        mean_characters={name: total / counts.rows for name, total in counts.characters.items()},
        topics=dict(counts.topics.most_common()),
    )


class _Counts:
    def __init__(self) -> None:
        self.rows = 0
        self.chosen_longer = 0
        self.dropped: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.topics: Counter[str] = Counter()
        self.groups: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        lengths = {name: sum(len(m["content"]) for m in row[name]) for name in ("prompt", "chosen", "rejected")}
        self.rows += 1
        self.chosen_longer += lengths["chosen"] > lengths["rejected"]
        self.characters.update(lengths)
        self.groups.add(row["group"])
        if row["topic"]:
            self.topics[row["topic"]] += 1


def _check_counts(config: DataConfig, counts: _Counts, sizes: dict[str, int]) -> None:
    lost, total = counts.dropped.total(), counts.rows + counts.dropped.total()
    if total == 0:
        raise DataError(f"{config.source}: there are no rows")
    if lost / total > config.max_dropped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.most_common())
        raise DataError(
            f"{config.source}: {lost} of {total} rows teach nothing ({reasons}), more than data.max_dropped = "
            f"{config.max_dropped:g} allows; mend the data, or raise the limit"
        )
    if not all(sizes.values()):
        raise DataError(
            f"{config.source}: {len(counts.groups)} different prompts split into {sizes['train']} training and "
            f"{sizes['held_out']} held-out pairs, and neither side may be empty; give more prompts, or another "
            f"data.held_out (now {config.held_out:g})"
        )


def _is_held_out(group: str, config: DataConfig) -> bool:
    """Decide by a keyed hash of the prompt, so that equal prompts stay together and new rows never move old ones."""
    key = config.seed.to_bytes(8, "big", signed=False) if config.seed < 2**64 else str(config.seed).encode()[:64]
    digest = hashlib.blake2b(group.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < config.held_out


def _teaches_nothing(row: dict[str, Any], content: str, seen: set[str]) -> str | None:
    if row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    return "exact duplicate" if content in seen else None


def _pairs(config: DataConfig, commit: str | None) -> Iterator[dict[str, Any]]:
    """Yield canonical rows; a wrong row does not stop the reading, so that all of them are named at once."""
    problems: list[str] = []
    total = 0
    for number, row in sources.read(config, commit):
        if total == 0:
            _check_columns(config, row)
        total += 1
        try:
            pair = _canonical(config, number, row)
        except _RowError as bad:
            problems.append(f"row {number}: {bad}")
            continue
        if not problems:
            yield pair
    if total == 0:
        raise DataError(f"{config.source}: there are no rows")
    if problems:
        shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        more = [f"  ... and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError("\n".join([f"{config.source}: {len(problems)} of {total} rows cannot be used", *shown, *more]))


def _check_columns(config: DataConfig, row: dict[str, Any]) -> None:
    columns = config.columns.model_dump()
    missing = {field: name for field, name in columns.items() if name not in row}
    if missing:
        wanted = ", ".join(f"{name!r} (data.columns.{field})" for field, name in missing.items())
        there = ", ".join(repr(name) for name in row)
        raise DataError(f"{config.source}: there is no column {wanted}; the columns are {there}")


def _canonical(config: DataConfig, number: int, row: dict[str, Any]) -> dict[str, Any]:
    prompt = _messages(row, config.columns.prompt, "user")
    if prompt[-1]["role"] not in PROMPT_ENDS:
        raise _RowError(f"{config.columns.prompt}: must end with a user turn, not {prompt[-1]['role']}")
    answers = {name: _answer(row, getattr(config.columns, name), prompt) for name in ("chosen", "rejected")}
    topic = row.get("topic")
    group = fingerprint.of_value([[m["role"], " ".join(m["content"].casefold().split())] for m in prompt])[:32]
    return {
        "prompt": prompt,
        **answers,
        "topic": topic if isinstance(topic, str) else None,
        "group": group,
        "row": number,
    }


def _answer(row: dict[str, Any], column: str, prompt: Messages) -> Messages:
    messages = _messages(row, column, "assistant")
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or any(message["role"] != "assistant" for message in messages):
        raise _RowError(f"{column}: must be an assistant's answer to the prompt")
    return messages


def _messages(row: dict[str, Any], column: str, role: str) -> Messages:
    value = row.get(column)
    if value is None:
        raise _RowError(f"{column}: is missing or null")
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise _RowError(f"{column}: must be text or a list of messages, not {type(value).__name__}")
    return [_message(message, column) for message in value]


def _message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise _RowError(f"{column}: a message needs a role and a text content")
    if message.get("role") not in ROLES:
        raise _RowError(f"{column}: unknown role {message.get('role')!r}; known: {', '.join(ROLES)}")
    if not message["content"].strip():
        raise _RowError(f"{column}: is blank")
    try:
        message["content"].encode("utf-8")
    except UnicodeEncodeError:
        raise _RowError(f"{column}: has half of a surrogate pair, which is no text") from None
    return {"role": message["role"], "content": message["content"]}
