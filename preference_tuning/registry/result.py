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
from preference_tuning.hub import COMMIT
from preference_tuning.models import weights
from preference_tuning.models.description import describe
from preference_tuning.models.source import ModelSource, pinned
from preference_tuning.registry import card, charts, evidence, provenance
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import CARD, FolderRegistry, Version, version_id
from preference_tuning.registry.pointers import Change
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
    taken_back: Change | None
    """The rollback that keeps it from becoming champion again by its own verdict."""
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
            **({"taken_back": str(self.taken_back)} if self.taken_back else {}),
        }


def register(result: Result, config: RegistryConfig) -> Registered:
    """Store a result as a version, make it champion if its evidence allows, and remove what only training needed.

    The verdict is the evaluation's, against the champion that reigns now. A version that somebody took back stays where
    it is: its run would find the champion of old again, and the same verdict, and undo what was decided by hand.

    Raises:
        OvertakenError: another model became champion since; the version is stored and nothing else is changed.
        PreferenceTuningError: the result is not finished or healthy, or cannot be stored.
    """
    registry = FolderRegistry(config)
    _check_evidence(result)
    evaluated = _current(result, registry)
    evaluation, verdict = evaluated.evaluation, evaluated.evaluation.verdict
    kept = {**result.training, "evaluation": evaluated.evidence, "data": _manifest_only(result)}
    facts = _facts(result, evaluation, verdict)
    version = registry.publish(result.adapter, kept, _card(result, evaluation, facts), facts)
    if version.metrics.get("seal") != evaluation.seal:
        # The same model was published with the evaluation of another day.
        registry.keep_decision(version.id, kept, facts["config"], evaluation.seal, verdict)
    unfinished.clear(result.output_dir)
    taken_back = registry.taken_back(version.id)
    if verdict.decision == "promote" and taken_back is None:
        registry.promote(version.id, evaluation.seal, expected=evaluation.champion)
    now = registry.champion()
    champion = now.version if now else None
    return Registered(
        version=version,
        folder=registry.path(version.id),
        promoted=champion == version.id,
        verdict=verdict,
        champion=champion,
        taken_back=taken_back,
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


def _card(result: Result, evaluation: Evaluation, facts: dict[str, Any]) -> dict[str, str]:
    """Return the files of the model card: the card, and its charts beside it."""
    pictures = charts.draw(result.training, evaluation)
    told = card.Card(
        name=result.config.registry.name,
        adapter=weights.is_adapter(result.adapter),
        base_model=pinned(result.base_model.portable(), result.source.fingerprint),
        source=result.source,
        languages=describe(result.source).languages,
        datasets=_hub_datasets(result),
        manifest=result.dataset.manifest,
        records=result.records(),
        evaluation=evaluation,
        charts=list(pictures),
        **{name: facts[name] for name in ("licence", "verdict", "software", "links")},
    )
    return {CARD: card.render(told), **pictures}


def _hub_datasets(result: Result) -> list[str]:
    """Return the ids of the data's sources that lie on a hub: these are known by a commit, files by their hash."""
    data, manifest = result.config.data, result.dataset.manifest
    read = [*zip(data.all_sources(), manifest.sources, strict=True)]
    found = [origin.source for origin, summary in read if COMMIT.match(summary.fingerprint)]
    if data.sft_source and manifest.sft_source and COMMIT.match(manifest.sft_source.fingerprint):
        found.append(data.sft_source.source)
    return found


def _facts(result: Result, evaluation: Evaluation, verdict: Verdict) -> dict[str, Any]:
    manifest, base_model = result.dataset.manifest, result.base_model.portable()
    return {
        "finetuning_type": result.finetuning_type,
        "base_model": {
            "source": base_model.source,
            "revision": base_model.revision,
            "fingerprint": result.source.fingerprint,
            "kind": result.source.kind,
            "commit": result.source.fingerprint if result.source.kind == "hub" else None,
        },
        "data": {
            "source": manifest.source,
            "source_fingerprints": [source.fingerprint for source in manifest.sources],
            **manifest.model_dump(include={"fingerprint", "split_fingerprint", "train", "held_out"}),
        },
        "config": result.config.portable().model_dump(mode="json"),
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
        "licence": provenance.licence(result.config.registry, result.source),
        "software": provenance.software(),
        "links": provenance.links(result.run),
    }
