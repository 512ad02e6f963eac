"""From sources to a canonical dataset in two passes over the disk: memory does not grow with the rows.

The first pass (``reading``) makes checked pairs and their keys; ``across`` and ``near`` compare the keys; the second
pass (``splitting``) writes what stays to its side of the split and measures it.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preference_tuning import jobs
from preference_tuning.config import DataConfig, SourceConfig
from preference_tuning.data import findings, formats, lengths, report, sft, shown, splitting, table
from preference_tuning.data.across import PROBLEMS, Across, engine
from preference_tuning.data.content import TextRules
from preference_tuning.data.conversion import Format
from preference_tuning.data.ledger import GOES_ON, Ledger
from preference_tuning.data.lengths import TokenRules
from preference_tuning.data.measures import Measures
from preference_tuning.data.near import NearDuplicates
from preference_tuning.data.reading import KEYS, SPOOL, Reader, Spooled
from preference_tuning.errors import DataError

SAMPLE = 5_000
"""Pairs whose lengths are measured in tokens."""


def prepare(
    config: DataConfig, fingerprints: Sequence[str], folder: Path, tokens: TokenRules | None = None
) -> table.Dataset:
    """Write the canonical dataset of the config's sources to ``folder`` and return it.

    Args:
        config: the sources, and what to do with rows that have a problem.
        fingerprints: of each source, and last of the SFT source if there is one; a hub id is read at that commit.
        folder: where the dataset goes; whole, or not at all. What was left out goes beside it if the data is refused.
        tokens: what the rows are measured with; None leaves everything that is counted in tokens unchecked.

    Raises:
        DataError: a source cannot be read, too many rows cannot be used, or none is left.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    beside = folder.with_name(table.QUARANTINE)
    beside.unlink(missing_ok=True)
    try:
        _Preparing(config, fingerprints, aside, tokens).run()
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except DataError as error:
        quarantine = aside / table.QUARANTINE
        if not quarantine.is_file() or not quarantine.stat().st_size:
            raise
        quarantine.rename(beside)
        raise DataError(f"{error}\nthe rows left out, each with its problem: {beside}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return table.Dataset(folder)


class _Preparing:
    """One dataset on its way; ``work`` holds what is needed only until it is done."""

    def __init__(
        self, config: DataConfig, fingerprints: Sequence[str], folder: Path, tokens: TokenRules | None
    ) -> None:
        self.config, self.fingerprints, self.folder, self.tokens = config, fingerprints, folder, tokens
        self.work = folder / "work"
        self.work.mkdir()
        self.text = tokens.text_rules() if tokens else TextRules()
        self.ledger = Ledger(config.problems, folder / table.QUARANTINE)
        self.measures = Measures()
        policies = config.problems.model_dump()
        self.dropped = [problem for problem in PROBLEMS if problem and policies[problem] not in GOES_ON]

    def run(self) -> None:
        origins = self.config.all_sources()
        with self.ledger:
            reader = Reader(self.config, self.work, self.ledger, self.text, self.tokens)
            spooled = reader.read(origins, self.fingerprints[: len(origins)], self._recognise)
            self._check(spooled)
            with engine(self.work) as connection:
                manifest = self._compare(spooled, connection)
        self._finish(manifest)

    def _compare(self, spooled: Spooled, connection: Any) -> table.Manifest:
        across = Across(connection, self.work / KEYS, sum(source.pairs for source in spooled.sources))
        across.keep_without(problem for problem in self.dropped if problem != "near_duplicate")
        near = self._near_duplicates(across)
        across.keep_without(self.dropped)
        problems, sample = across.problems(), across.sample(SAMPLE)
        sizes = splitting.split(self.work / SPOOL, self.folder, self.work, problems, sample, self.ledger, self.measures)
        self._check(spooled)
        if not sum(sizes.values()):
            raise DataError(f"{_names(spooled)}: no pair is left")
        return self._manifest(spooled, sizes, across, near, self._answers())

    def _recognise(self, source: SourceConfig, name: str, rows: list[dict[str, Any]]) -> Format:
        return formats.recognise(source, self.config.pairing, name, rows)

    def _check(self, spooled: Spooled) -> None:
        self.ledger.check(_names(spooled), spooled.pairs, self.config.max_dropped)

    def _near_duplicates(self, across: Across) -> int | None:
        if not self.config.near_duplicates:
            return None
        similarity = self.config.near_duplicate_similarity
        return NearDuplicates(across, self.work / SPOOL, self.work, similarity).find()

    def _answers(self) -> sft.Answers | None:
        if self.config.sft_source is None:
            return None
        tokens = self.tokens.for_sft() if self.tokens else None
        return sft.prepare(self.config, self.fingerprints[-1], self.folder, self.work, self.text, tokens)

    def _manifest(
        self, spooled: Spooled, sizes: Mapping[str, int], across: Across, near: int | None, answers: sft.Answers | None
    ) -> table.Manifest:
        config, tokens = self.config, self.tokens
        content, split = across.fingerprints(*([answers.content] if answers else []))
        measured = self._measure()
        manifest = table.Manifest(
            fingerprint=content,
            split_fingerprint=split,
            sources=spooled.sources,
            sft_source=answers.source if answers else None,
            rows_in=spooled.rows,
            pairs=spooled.pairs,
            **sizes,
            sft=answers.rows if answers else None,
            prompts=across.prompts(),
            problems=sorted(self.ledger.counts.values(), key=lambda count: -count.rows),
            sft_problems=answers.problems if answers else [],
            findings=[],
            seed=config.seed,
            held_out_share=None if spooled.own_split else config.held_out,
            length_bias=self.measures.bias(),
            unit="tokens" if tokens else "characters",
            sampled=len(measured["prompt"]),
            lengths={name: _quantiles(values) for name, values in measured.items()},
            max_length=tokens.room.max_length if tokens else None,
            max_prompt_length=config.max_prompt_length,
            keep_end=config.problems.long_prompt == "keep_end",
            topics=self.measures.named("topic"),
            by_source=self.measures.named("source"),
            near_duplicate_prompts=near,
        )
        return manifest.model_copy(update={"findings": list(findings.of_set(manifest))})

    def _measure(self) -> dict[str, list[int]]:
        """Measure the sample, keep the lengths beside the dataset, and return them."""
        measured: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
        for batch in table.read_batches(self.work / splitting.SAMPLE_FILE):
            for side, values in lengths.measure(batch.to_pylist(), self.tokens).items():
                measured[side] += values
        pq.write_table(
            pa.table({side: pa.array(values, pa.int32()) for side, values in measured.items()}),
            self.folder / table.LENGTHS,
        )
        return measured

    def _finish(self, manifest: table.Manifest) -> None:
        jobs.write_json(self.folder / table.MANIFEST, manifest.model_dump(mode="json"))
        dataset = table.Dataset(self.folder)
        rows = [
            row
            for side in table.SPLITS
            for row in shown.show(list(islice(dataset.rows(side), shown.SHOWN // 2)), side, self.tokens)
        ]
        jobs.write_text(self.folder / table.SHOWN, json.dumps([row.model_dump() for row in rows], ensure_ascii=False))
        shutil.rmtree(self.work)
        jobs.write_text(self.folder / table.REPORT, report.render(dataset))


def _names(spooled: Spooled) -> str:
    return ", ".join(source.name for source in spooled.sources)


def _quantiles(values: Sequence[int]) -> table.Lengths:
    median, p95 = np.percentile(values, [50, 95]) if values else (0.0, 0.0)
    return table.Lengths(median=float(median), p95=float(p95), longest=max(values, default=0))
