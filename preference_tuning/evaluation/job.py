"""What an evaluation job is, how a step starts one, and what it leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig, EvaluationConfig
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import statistics
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.metrics import BASE
from preference_tuning.models.chat import Room
from preference_tuning.models.source import ModelSource
from preference_tuning.tracking.comet import CometRun

MODULE = "preference_tuning.evaluation"
EVIDENCE = "evidence"
SCORES, SUMMARY, REPORT, METRICS = "scores.parquet", "evaluation.json", "report.html", "metrics.jsonl"


class EvaluationJob(jobs.Job):
    """Which tuned models are scored on which held-out pairs; the base model is always among the models."""

    base_model: BaseModelConfig
    source: ModelSource
    config: EvaluationConfig
    data: Path
    data_fingerprint: str
    adapters: dict[str, Path]
    """Folders of adapters or full models, in the order in which they were trained: each is the reference of the next,
    the base model of the first."""
    adapter_hashes: dict[str, str]
    beta: float
    max_length: int
    max_prompt_length: int | None
    keep_end: bool
    output_dir: Path
    comet: CometRun

    @property
    def references(self) -> dict[str, str]:
        """The reference of each tuned model: the model before it."""
        return dict(zip(self.adapters, (BASE, *self.adapters), strict=False))

    @property
    def most_parts(self) -> int:
        """How many pieces of a batch are one pair each."""
        return self.config.batch_size

    def what_fits(self, facts: dict[str, Any]) -> str:
        """Return what to do when pairs one at a time are too much."""
        return "pairs are scored one at a time already: lower dpo.max_length or evaluation.max_new_tokens"

    @property
    def room(self) -> Room:
        """How long a row may be, in tokens."""
        return Room(self.max_length, self.max_prompt_length, self.keep_end)

    def identity(self) -> dict[str, Any]:
        """Return what makes two evaluations the same work."""
        names = {"base_model", "config", "data_fingerprint", "adapter_hashes", "beta", "max_length"}
        names |= {"max_prompt_length", "keep_end"}
        return {
            **self.model_dump(mode="json", include=names),
            "base_model_fingerprint": self.source.fingerprint,
            "code": fingerprint.of_sources(MODULE),
        }


class Sample(BaseModel):
    """One held-out prompt with the answers of every model and of the data."""

    prompt: str
    chosen: str
    answers: dict[str, str]


class Evaluation(BaseModel):
    """The figures of every model, samples, and the verdict on the last tuned model."""

    pairs: int
    dropped: int
    data_fingerprint: str
    base_model_fingerprint: str
    template_hash: str
    adapter_hashes: dict[str, str]
    """Of the tuned weights that were scored, by stage."""
    beta: float
    models: dict[str, dict[str, statistics.Figure]]
    samples: list[Sample]
    verdict: Verdict
    seconds: float

    def metadata(self) -> dict[str, Any]:
        """Return what the dashboard shows of it."""
        values = {f"{model}/{name}": f.value for model, figures in self.models.items() for name, f in figures.items()}
        decided = {"decision": self.verdict.decision, "reason": self.verdict.reason}
        return {**values, **decided, "pairs": self.pairs, "dropped": self.dropped, "seconds": self.seconds}


class Evaluated(BaseModel):
    """A finished evaluation, and the folder of its scores, summary and report."""

    evaluation: Evaluation
    evidence: Path


def evaluate(job: EvaluationJob, again: bool = False) -> Evaluated:
    """Run an evaluation job and return what it found; finished work is not done twice unless ``again``.

    Raises:
        PreferenceTuningError: it failed.
    """
    folder = (job.output_dir / "jobs" / f"evaluate-{fingerprint.of_value(job.identity())[:16]}").absolute()
    evaluation = jobs.run(MODULE, folder, job, Evaluation, again)
    return Evaluated(evaluation=evaluation, evidence=folder / EVIDENCE)


def from_artifacts(
    base_model: BaseModelConfig,
    source: ModelSource,
    dataset: Dataset,
    adapters: dict[str, Path],
    config: EvaluationConfig,
    output_dir: Path,
    comet: CometRun,
    **settings: Any,
) -> EvaluationJob:
    """Build the job from what the earlier steps left."""
    return EvaluationJob(
        base_model=base_model,
        source=source,
        config=config,
        data=dataset.folder.absolute(),
        data_fingerprint=dataset.manifest.split_fingerprint,
        max_prompt_length=dataset.manifest.max_prompt_length,
        keep_end=dataset.manifest.keep_end,
        adapters={name: folder.absolute() for name, folder in adapters.items()},
        adapter_hashes={name: fingerprint.of_directory(folder) for name, folder in adapters.items()},
        output_dir=output_dir.absolute(),
        comet=comet,
        **settings,
    )


def load_scores(evidence: Path) -> dict[str, statistics.Array]:
    """Return the per-example score table of an evaluation: its numbers, and the prompts of the pairs."""
    table = pq.read_table(evidence / SCORES)
    scores = {name: table[name].to_numpy() for name in table.column_names}
    return {name: column if name == "prompt" else np.asarray(column, np.float64) for name, column in scores.items()}


def load_summary(evidence: Path) -> Evaluation:
    """Return the figures and the verdict of an evaluation."""
    return Evaluation.model_validate_json((evidence / SUMMARY).read_text(encoding="utf-8"))
