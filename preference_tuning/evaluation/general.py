"""General text beside the preference data: a model that forgets finds it less likely than before."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preference_tuning.errors import ConfigError, DataError
from preference_tuning.evaluation import statistics
from preference_tuning.evaluation.statistics import Figure

TOKENS = "tokens"
WHERE = "evaluation.general"


def texts(path: Path) -> list[str]:
    """Return the texts of a file: a paragraph each of a .txt, the field ``text`` of each line of a .jsonl.

    Raises:
        ConfigError: there is no such file, or it is of another kind.
        DataError: a line is not JSON or has no text, or there is no text at all.
    """
    if not path.is_file():
        raise ConfigError(f"{WHERE}: no such file: {path.absolute()}")
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{WHERE}: {path} is neither .txt nor .jsonl")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{WHERE}: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    found = list(_lines(path, content)) if path.suffix == ".jsonl" else content.split("\n\n")
    kept = [text.strip() for text in found if text.strip()]
    if not kept:
        raise DataError(f"{WHERE}: {path} has no text")
    return kept


def _lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise DataError(f"{WHERE}: {path}, line {number}: not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{WHERE}: {path}, line {number}: no field `text` that holds text")
        yield row["text"]


def encode(found: Sequence[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """Return the token ids of each text of two tokens and more, cut at ``longest``.

    Raises:
        DataError: there is none: nothing comes after a first token.
    """
    ids = [tokenizer.encode(text)[:longest] for text in found]
    if not (kept := [row for row in ids if len(row) > 1]):
        raise DataError(f"{WHERE}: no text has more than one token")
    return kept


def score(model: Any, rows: Sequence[list[int]], batch_size: int, base: Any, on: Callable[[int], object]) -> Any:
    """Return the summed log-probability of each text after its first token, [texts] nats.

    Args:
        model: that reads the texts.
        rows: token ids.
        batch_size: texts at once.
        base: precision, device and tokenizer.
        on: told of the number of texts that are done.
    """
    import torch

    from preference_tuning.models import scoring

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    sums = np.full(len(rows), np.nan)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [rows[i] for i in numbers]
        pad_id = base.tokenizer.pad_token_id
        laid = scoring.layout([row[:1] for row in batch], [row[1:] for row in batch], False, pad_id).to(base.device)
        with torch.no_grad():
            found = scoring.answer_logps(scoring.token_scores(model, laid, base.dtype).logps, laid)
        sums[numbers] = found.double().cpu().numpy()
        on(len(numbers))
    return sums


def write(columns: dict[str, Any], path: Path) -> None:
    """Write the lengths of the texts and their log-probabilities under each model."""
    pq.write_table(pa.table(columns), path)


def read(path: Path) -> dict[str, Any]:
    """Return the columns of the table."""
    table = pq.read_table(path)
    return {name: table[name].to_numpy().astype(np.float64) for name in table.column_names}


def figures(table: dict[str, Any], model: str, reference: str | None, seed: int) -> dict[str, Figure]:
    """Return ``general/nll`` and ``general/ppl`` a token of a model, and the rise of the loss over its reference."""
    if model not in table:
        return {}
    tokens = table[TOKENS]
    columns = {"general/nll": -table[model] / tokens}
    if reference in table:
        columns["general/nll_change"] = (table[reference] - table[model]) / tokens
    alone = np.arange(len(tokens))
    found = statistics.means(columns, alone, seed, weights=tokens)
    nll = found["general/nll"]
    low, value, high = (float(np.exp(end)) for end in (nll.low, nll.value, nll.high))
    return {**found, "general/ppl": Figure(value=value, low=low, high=high)}
