"""Preparing data as a job in its own process: done once for the same content, settings and tokenizer, and kept."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import PORTABLE, BaseModelConfig, DataConfig, RunConfig
from preference_tuning.data import findings, sides, sources
from preference_tuning.data.table import SPLIT, Dataset, Manifest
from preference_tuning.errors import DataError
from preference_tuning.models.source import ModelSource, template_of

MODULE = "preference_tuning.data"
DATASET = "dataset"


class Tokens(BaseModel):
    """What rows are measured with: a model's tokenizer, and how long a row may be in each stage."""

    base_model: BaseModelConfig
    source: ModelSource
    max_length: int
    """Of a DPO row, prompt and answer."""
    sft_length: int


class DataJob(jobs.Job):
    """Which rows become a dataset, and what they are measured with."""

    config: DataConfig
    fingerprints: list[str]
    """Of each source, and last of the SFT source if there is one."""
    tokens: Tokens | None
    output_dir: Path

    def identity(self) -> dict[str, Any]:
        """Return what makes two jobs the same work: content and settings, never places or times."""
        tokens = self.tokens and {
            "model": self.tokens.source.fingerprint,
            "template": template_of(self.tokens.base_model),
            "lengths": [self.tokens.max_length, self.tokens.sft_length],
        }
        config = self.config.model_dump(mode="json", context=PORTABLE)
        code = fingerprint.of_sources(MODULE)
        return {"config": config, "fingerprints": self.fingerprints, "tokens": tokens, "code": code}

    @property
    def id(self) -> str:
        """The hash of the identity, by which a dataset is found again."""
        return fingerprint.of_value(self.identity())[:16]


def fingerprints_of(config: DataConfig) -> list[str]:
    """Return the hash of each source's bytes, or the commit of a hub dataset, the SFT source last.

    Raises:
        DataError: a path does not exist or cannot be read.
        ConfigError: the hub has no such dataset or revision.
    """
    origins = [*config.all_sources(), *([config.sft_source] if config.sft_source else [])]
    return [sources.fingerprint_of(origin, config.allow_urls) for origin in origins]


def of_run(config: RunConfig, model: ModelSource | None) -> DataJob:
    """Return the data job of a run; without a model (it was not found) nothing is measured in tokens."""
    tokens = model and Tokens(
        base_model=config.base_model,
        source=model,
        max_length=config.dpo.length(config.base_model),
        sft_length=config.base_model.max_seq_length,
    )
    return DataJob(
        config=config.data,
        fingerprints=fingerprints_of(config.data),
        tokens=tokens,
        retries=config.training.retries,
        output_dir=Path(config.output_dir).expanduser().absolute(),
    )


def of_data(config: DataConfig) -> DataJob:
    """Return the job of data alone: nothing is measured in tokens."""
    output_dir = Path(str(RunConfig.model_fields["output_dir"].default)).absolute()
    return DataJob(config=config, fingerprints=fingerprints_of(config), tokens=None, output_dir=output_dir)


def prepare_for_run(job: DataJob, again: bool = False) -> Dataset:
    """Return the dataset of a job as ``prepare`` does, and insist on pairs on both sides, none with a common prompt.

    Raises:
        DataError: as ``prepare``, or a side is empty, or held-out prompts are trained on.
        ConfigError: as ``prepare``.
    """
    dataset = prepare(job, again)
    if problem := findings.empty_side(dataset.manifest):
        raise DataError(problem)
    sides.check_overlap(dataset.folder / SPLIT)
    return dataset


def prepare(job: DataJob, again: bool = False) -> Dataset:
    """Return the dataset of a job; finished work is not done twice unless ``again``.

    Raises:
        DataError: a source cannot be read, or too many of its rows cannot be used.
        ConfigError: the tokenizer cannot be loaded.
    """
    jobs.run(MODULE, _folder(job.output_dir, job.id), job, Manifest, again)
    return Dataset(_folder(job.output_dir, job.id) / DATASET)


def kept(output_dir: Path, id: str) -> Dataset | None:
    """Return the dataset that a job of this id made, or None if it is no longer there."""
    folder = _folder(output_dir, id) / DATASET
    return Dataset(folder) if folder.is_dir() else None


def _folder(output_dir: Path, id: str) -> Path:
    return output_dir / "data" / id
