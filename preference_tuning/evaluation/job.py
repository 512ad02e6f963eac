"""What an evaluation job is, how a step starts one, and what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import PORTABLE, BaseModelConfig, EvaluationConfig
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import catalogue, statistics
from preference_tuning.evaluation.deciding import Reigning, Terms
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.metrics import BASE, CHAMPION
from preference_tuning.models.chat import Room
from preference_tuning.models.source import ModelSource, template_of
from preference_tuning.tracking import spool

MODULE = "preference_tuning.evaluation"
EVIDENCE = "evidence"
SUMMARY, REPORT, METRICS = "evaluation.json", "report.html", spool.FILE


class Champion(BaseModel):
    """The model to beat, as it lies in the registry."""

    version: str
    finetuning_type: str
    folder: Path
    """Of its weights."""
    hash: str
    base_model_fingerprint: str
    split: Path
    """Which pairs it was trained on (``data.table.SPLIT``)."""


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
    champion: Champion | None = None
    """The one that the last of the adapters has to beat; None if there is none but itself."""
    beta: float
    max_length: int
    max_prompt_length: int | None
    keep_end: bool
    output_dir: Path

    @property
    def scored_champion(self) -> Champion | None:
        """The champion, if it can be scored beside the others."""
        same = self.champion is not None and self.champion.base_model_fingerprint == self.source.fingerprint
        return self.champion if same else None

    @property
    def tuned(self) -> dict[str, Path]:
        """The folder of every tuned model that is scored."""
        return self.adapters | ({CHAMPION: self.scored_champion.folder} if self.scored_champion else {})

    @property
    def tuned_hashes(self) -> dict[str, str]:
        """The hash of every tuned model that is scored."""
        return self.adapter_hashes | ({CHAMPION: self.scored_champion.hash} if self.scored_champion else {})

    @property
    def references(self) -> dict[str, str]:
        """The reference of each tuned model: the model before it, and of the champion the base model."""
        found = dict(zip(self.adapters, (BASE, *self.adapters), strict=False))
        return found | ({CHAMPION: BASE} if self.scored_champion else {})

    @property
    def terms(self) -> Terms:
        """What the verdict depends on beside what is measured."""
        reigning = self.champion and Reigning(
            version=self.champion.version,
            finetuning_type=self.champion.finetuning_type,
            same_base_model=self.scored_champion is not None,
        )
        return Terms(
            candidate=list(self.adapters)[-1],
            references=self.references,
            beta=self.beta,
            config=self.config.portable(),
            champion=reigning,
        )

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
            **self.model_dump(mode="json", include=names, context=PORTABLE),
            "champion": self.champion and [self.champion.version, self.champion.hash],
            "inputs": inputs_of(self.config),
            "base_model_fingerprint": self.source.fingerprint,
            "chat_template": fingerprint.of_value(template_of(self.base_model)),
            "code": fingerprint.of_sources(MODULE),
        }


class Sample(BaseModel):
    """One held-out prompt with the answers of every model and of the data."""

    prompt: str
    chosen: str
    answers: dict[str, str]
    """Greedy."""
    sampled: dict[str, str]


class Evaluation(BaseModel):
    """The figures of every model, samples, and the verdict on the last tuned model."""

    pairs: int
    dropped: int
    data_fingerprint: str
    base_model_fingerprint: str
    template_hash: str
    adapter_hashes: dict[str, str]
    """Of the tuned weights that were scored, by stage."""
    terms: Terms
    models: dict[str, dict[str, statistics.Figure]]
    worse: list[str]
    """What got worse in the candidate, a sentence each."""
    samples: list[Sample]
    verdict: Verdict
    notes: list[str] = []
    """What a reader should know of how it was measured, such as whether the judge is believed."""
    bonds: dict[str, str]
    """Hashes of all that the verdict stands on, by what they are of."""
    seal: str
    """One hash over the verdict, the figures and the bonds."""
    seconds: float

    @property
    def champion(self) -> str | None:
        """The version that the candidate was compared with."""
        return self.terms.reigning

    def metadata(self) -> dict[str, Any]:
        """Return what the dashboard shows of it: the main figures, each with the ends of its interval."""
        shown = catalogue.main(self.models)
        values = {
            f"{model}/{key}": value
            for model, figures in self.models.items()
            for name in shown
            if name in figures
            for key, value in catalogue.numbers(name, figures[name])
        }
        decided = {"decision": self.verdict.decision, "reason": self.verdict.reason, "seal": self.seal}
        counted = {"champion": self.champion or "none", "pairs": self.pairs, "dropped": self.dropped}
        return {**decided, "worse": self.worse, **counted, "seconds": self.seconds, **values}


class Evaluated(BaseModel):
    """A finished evaluation, and the folder of its scores, summary and report."""

    evaluation: Evaluation
    evidence: Path


def inputs_of(config: EvaluationConfig) -> list[str]:
    """Return the hashes of what the config names beside the dataset: general text, and tasks of lm_eval."""
    paths = [config.general, config.lm_eval.include_path if config.lm_eval else None]
    return [fingerprint.of_path(Path(path)) for path in paths if path]


def evaluate(job: EvaluationJob, again: bool = False, begun: Callable[[Path], object] = lambda _: None) -> Evaluated:
    """Run an evaluation job and return what it found; finished work is not done twice unless ``again``.

    ``begun`` is told, before anything runs, in which folder the evidence will lie.

    Raises:
        PreferenceTuningError: it failed.
    """
    folder = (job.output_dir / "jobs" / f"evaluate-{fingerprint.of_value(job.identity())[:16]}").absolute()
    begun(folder / EVIDENCE)
    evaluation = jobs.run(MODULE, folder, job, Evaluation, again)
    return Evaluated(evaluation=evaluation, evidence=folder / EVIDENCE)


def from_artifacts(
    base_model: BaseModelConfig,
    source: ModelSource,
    dataset: Dataset,
    adapters: dict[str, Path],
    config: EvaluationConfig,
    output_dir: Path,
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
        **settings,
    )


def load_summary(evidence: Path) -> Evaluation:
    """Return the figures and the verdict of an evaluation."""
    return Evaluation.model_validate_json((evidence / SUMMARY).read_text(encoding="utf-8"))
