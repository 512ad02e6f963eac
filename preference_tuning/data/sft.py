"""Answers of their own for the SFT stage: read and checked like pairs, and without the prompts that are held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from preference_tuning.config import DataConfig, SFTSourceConfig
from preference_tuning.data import formats, table
from preference_tuning.data.across import Across, engine
from preference_tuning.data.content import TextRules
from preference_tuning.data.ledger import GOES_ON, NOT_LOST, Ledger
from preference_tuning.data.lengths import TokenRules
from preference_tuning.data.pair import Pair, Unpaired
from preference_tuning.data.reading import KEYS, SPOOL, Reader
from preference_tuning.data.splitting import judged
from preference_tuning.errors import DataError


@dataclass
class Answers:
    """What the SFT source gave."""

    source: table.SourceSummary
    rows: int
    problems: list[table.ProblemCount]
    content: str
    """Hash of the rows, whatever their order."""


@dataclass(frozen=True)
class _AnswerFormat:
    """The recognised format of an SFT source, whose rows become pairs without a rejected answer."""

    recognised: formats.RecognisedSFT

    @property
    def format(self) -> str:
        return self.recognised.format

    @property
    def description(self) -> str:
        return self.recognised.description

    def convert(self, values: dict[str, Any]) -> list[Pair] | list[Unpaired]:
        prompt, answer, tools = self.recognised.convert(values)
        return [Pair(prompt=prompt, chosen=answer, rejected=[], tools=tools, held_out=False)]


def _recognise(config: SFTSourceConfig, name: str, rows: Sequence[dict[str, Any]]) -> _AnswerFormat:
    return _AnswerFormat(formats.recognise_sft(config, name, rows))


def prepare(
    config: DataConfig, fingerprint: str, folder: Path, work: Path, text: TextRules, tokens: TokenRules | None
) -> Answers:
    """Write ``sft.arrow`` to ``folder``.

    Args:
        config: with ``sft_source``.
        fingerprint: of the SFT source; a hub id is read at that commit.
        folder: of the dataset; its quarantine gets the rows left out.
        work: of the pairs' first pass, whose held-out prompts are kept from SFT.
        text: what the text must not hold.
        tokens: what the rows are measured with.

    Raises:
        DataError: the source cannot be read, or too many of its rows cannot be used.
    """
    assert config.sft_source is not None
    own = work / "sft"
    own.mkdir()
    # An SFT set may well hold all prompts of the preferences; that the held-out ones leave it is no damage.
    with Ledger(config.problems, folder / table.QUARANTINE, not_lost=(*NOT_LOST, "leak")) as ledger:
        spooled = Reader(config, own, ledger, text, tokens).read([config.sft_source], [fingerprint], _recognise)
        rows, content = _write(config, folder, own, work, spooled.sources[0].pairs, ledger)
    (source,) = spooled.sources
    ledger.check(f"data.sft_source: {source.name}", spooled.pairs, config.max_dropped)
    if not rows:
        raise DataError(f"data.sft_source: {source.name}: no row is left to train on")
    return Answers(source, rows, list(ledger.counts.values()), hashlib.sha256(content.encode()).hexdigest())


def _write(config: DataConfig, folder: Path, own: Path, work: Path, count: int, ledger: Ledger) -> tuple[int, str]:
    """Write the answers that stay; return their number and the hash of their content."""
    with engine(own) as connection:
        across = Across(connection, own / KEYS, count, held_out=work / KEYS)
        policies = config.problems.model_dump()
        across.keep_without(problem for problem in ("leak", "duplicate") if policies[problem] not in GOES_ON)
        writer = table.Writer(folder / f"{table.SFT}.arrow", table.SCHEMA)
        problems, start = across.problems(), 0
        for batch in table.read_batches(own / SPOOL):
            stays = judged(batch, problems[start : start + batch.num_rows], ledger)
            writer.add(batch.filter(pa.array(stays)).select(table.SCHEMA.names))
            start += batch.num_rows
        writer.close()
        content, _ = across.fingerprints()
    return writer.count, content
