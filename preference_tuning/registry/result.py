"""A run's result on its way into the registry: the comparison with the champion, the version, the summary."""

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.config import BaseModelConfig, RegistryConfig, RunConfig
from preference_tuning.data.table import MANIFEST, REPORT, SPLIT, Dataset
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.models import weights
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import card, evidence
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import FolderRegistry, Version, version_id
from preference_tuning.training import unfinished
from preference_tuning.training.job import TrainingRecord


class Result(BaseModel):
    """What the steps before produced."""

    model_config = {"arbitrary_types_allowed": True}

    finetuning_type: Literal["sft", "dpo"]
    base_model: BaseModelConfig
    source: ModelSource
    dataset: Dataset
    adapters: dict[str, Path]
    """The folder of each stage's weights, adapters or full models, in the order in which they were trained."""
    training: dict[str, Path]
    """The evidence folder of each stage, in their order."""
    evaluation: Path
    config: RunConfig
    output_dir: Path
    run: dict[str, str]

    @property
    def adapter(self) -> Path:
        """The folder of the last stage's weights."""
        return list(self.adapters.values())[-1]

    def records(self) -> dict[str, TrainingRecord]:
        """Return the training record of each stage."""
        return evidence.records(self.training)


class Registered(BaseModel):
    """What became of a result."""

    version: Version
    folder: Path
    promoted: bool
    verdict: Verdict
    champion: str | None
    evaluation: Path
    """The evidence of the verdict."""

    def metadata(self) -> dict[str, Any]:
        """Return what the dashboard shows of it."""
        return {
            "version": self.version.id,
            "folder": str(self.folder),
            "promoted": self.promoted,
            "champion": self.champion or "none",
            "decision": self.verdict.decision,
            "reason": self.verdict.reason,
        }


def register(result: Result, config: RegistryConfig) -> Registered:
    """Store a result as a version, make it champion if its evidence allows, and remove what only training needed.

    The verdict is the evaluation's, against the champion that reigns now.

    Raises:
        PreferenceTuningError: the result is not finished or healthy, or cannot be stored.
    """
    registry = FolderRegistry(config)
    _check_evidence(result)
    evaluated = _current(result, registry)
    evaluation, verdict = evaluated.evaluation, evaluated.evaluation.verdict
    adapter = weights.is_adapter(result.adapter)
    kept = {**result.training, "evaluation": evaluated.evidence, "data": _manifest_only(result)}
    version = registry.publish(
        result.adapter,
        kept,
        card.render(
            result.base_model, evaluation, verdict, result.records(), result.dataset.manifest, config.name, adapter
        ),
        _facts(result, evaluation, verdict),
    )
    if version.metrics.get("seal") != evaluation.seal:
        # The same model was published with the evaluation of another day.
        registry.keep_decision(version.id, kept, result.config.model_dump(mode="json"), evaluation.seal, verdict)
    if verdict.decision == "promote":
        registry.promote(version.id, evaluation.seal)
    unfinished.clear(result.output_dir)
    now = registry.champion()
    champion = now.version if now else None
    return Registered(
        version=version,
        folder=registry.path(version.id),
        promoted=champion == version.id,
        verdict=verdict,
        champion=champion,
        evaluation=evaluated.evidence,
    )


def _check_evidence(result: Result) -> None:
    """Refuse a result that is not finished, not healthy, or not the one that was measured."""
    stages = ("sft", "dpo") if result.finetuning_type == "dpo" else ("sft",)
    found = evidence.problems(
        stages, result.adapter, result.training, result.evaluation, result.source, result.dataset.manifest
    )
    if found:
        raise PreferenceTuningError(f"nothing is registered: {'; '.join(found)}. Run it again with --no-cache")


def _current(result: Result, registry: FolderRegistry) -> evaluation_job.Evaluated:
    """Return the run's evaluation, made anew if another champion reigns than the one that it looked at.

    It may have come from the step cache, or another run may have promoted its model since.
    """
    evaluation = evaluation_job.load_summary(result.evaluation)
    champion = to_beat(registry, version_id(result.adapter))
    if evaluation.champion == (champion.version if champion else None):
        return evaluation_job.Evaluated(evaluation=evaluation, evidence=result.evaluation)
    job = evaluation_job.from_artifacts(
        result.base_model,
        result.source,
        result.dataset,
        result.adapters,
        result.config.evaluation,
        result.output_dir,
        champion=champion,
        beta=result.config.dpo.beta,
        max_length=result.config.dpo.length(result.base_model),
        retries=result.config.training.retries,
    )
    return evaluation_job.evaluate(job)


def _manifest_only(result: Result) -> Path:
    """Return a folder with the data's manifest and report, without its rows."""
    folder = result.output_dir / "jobs" / f"data-{result.dataset.manifest.split_fingerprint[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, SPLIT, REPORT):
        shutil.copyfile(result.dataset.folder / name, folder / name)
    return folder


def _facts(result: Result, evaluation: Evaluation, verdict: Verdict) -> dict[str, Any]:
    manifest = result.dataset.manifest
    return {
        "finetuning_type": result.finetuning_type,
        "base_model": {
            "source": result.base_model.source,
            "revision": result.base_model.revision,
            "fingerprint": result.source.fingerprint,
        },
        "data": {
            "source": manifest.source,
            "source_fingerprints": [source.fingerprint for source in manifest.sources],
            **manifest.model_dump(include={"fingerprint", "split_fingerprint", "train", "held_out"}),
        },
        "config": result.config.model_dump(mode="json"),
        "code": fingerprint.of_sources("preference_tuning.training", "preference_tuning.evaluation"),
        "metrics": {
            "pairs": evaluation.pairs,
            "template_hash": evaluation.template_hash,
            "beta": evaluation.terms.beta,
            "seal": evaluation.seal,
            "models": {
                name: {key: figure.model_dump() for key, figure in figures.items()}
                for name, figures in evaluation.models.items()
            },
        },
        "verdict": verdict,
        "run": result.run,
    }
