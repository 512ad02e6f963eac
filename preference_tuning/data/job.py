"""Preparing data as a job in its own process: done once for the same content, settings and tokenizer, and kept."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig, DataConfig, RunConfig
from preference_tuning.data import findings, sides, sources
from preference_tuning.data.table import SPLIT, Dataset, Manifest
from preference_tuning.errors import DataError
from preference_tuning.models.source import ModelSource

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
            "template": template_of(self.tokens.base_model.chat_template),
            "lengths": [self.tokens.max_length, self.tokens.sft_length],
        }
        config = self.config.model_dump(mode="json")
        code = fingerprint.of_sources(MODULE)
        return {"config": config, "fingerprints": self.fingerprints, "tokens": tokens, "code": code}


def template_of(setting: str | None) -> str | None:
    """Return the chat template that the config sets: its name, or what is in its file."""
    path = Path(setting or "").expanduser()
    return path.read_text(encoding="utf-8") if path.is_file() else setting


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
    folder = job.output_dir / "data" / fingerprint.of_value(job.identity())[:16]
    jobs.run(MODULE, folder, job, Manifest, again)
    return Dataset(folder / DATASET)
