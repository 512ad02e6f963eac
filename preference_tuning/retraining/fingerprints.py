"""What a run is made of, as hashes: two runs with equal ones would be the same run again."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.config import BaseModelConfig, RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.evaluation.job import inputs_of
from preference_tuning.models.source import locate

CODE = tuple(f"preference_tuning.{name}" for name in ("data", "training", "evaluation", "registry"))

ELSEWHERE: dict[str, Any] = {
    "output_dir": True,
    "registry": True,
    "tracking": True,
    "retrain": True,
    "notify": True,
    "base_model": {"source", "revision", "chat_template"},
    "training": {"retries", "save_every_minutes", "strict_resume", "unfinished"},
    "evaluation": {"general": True, "lm_eval": {"include_path"}},
    "data": True,
}
"""What is no part of ``Fingerprints.config``: places, how a run is looked after, and what is hashed by its content."""


WORDS = {"data": "data", "config": "config", "code": "code", "base_model": "base model"}


class Fingerprints(BaseModel):
    """The four things that decide on the result of a run, and ``dataset``, by which its pairs are found again."""

    data: str
    """Over every pair and its side, and the SFT answers: the same in another order, file or format."""
    dataset: str
    """Of the bytes of the sources and how they are read; equal ones spare reading them again."""
    config: str
    code: str
    base_model: str

    def changed_since(self, other: "Fingerprints") -> list[str]:
        """Return in words what differs."""
        return [words for name, words in WORDS.items() if getattr(self, name) != getattr(other, name)]


def of(config: RunConfig, known: Fingerprints | None = None) -> Fingerprints:
    """Return the fingerprints of a run that would start now.

    The data is read, checked and split, unless its sources are those of the run with the fingerprints ``known``.

    Raises:
        DataError: the data cannot be trained on.
        ConfigError: the base model, or what else the config names, is not there.
    """
    source = locate(config.base_model)
    job = data_job.of_run(config, source)
    same = known is not None and known.dataset == job.id
    return Fingerprints(
        data=known.data if known and same else data_job.prepare_for_run(job).manifest.split_fingerprint,
        dataset=job.id,
        config=of_config(config),
        code=fingerprint.of_sources(*CODE),
        base_model=source.fingerprint,
    )


def of_config(config: RunConfig) -> str:
    """Return the hash of the settings that decide on the result, and of the files beside the data that they name."""
    return fingerprint.of_value(
        {
            "settings": config.model_dump(mode="json", exclude=ELSEWHERE),
            "template": _template(config.base_model),
            "inputs": inputs_of(config.evaluation),
            # Which pairs there are, and on which side, is in their own fingerprint.
            "prompts": [config.data.max_prompt_length, config.data.problems.long_prompt],
        }
    )


def _template(model: BaseModelConfig) -> str | None:
    path = Path(model.chat_template or "").expanduser()
    return fingerprint.of_file(path) if path.is_file() else model.chat_template
