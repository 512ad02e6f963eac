"""A run's result on its way into the registry: the comparison with the champion, the version, the summary."""

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.config import BaseModelConfig, EvaluationConfig, RegistryConfig, RunConfig
from preference_tuning.data.table import MANIFEST, REPORT, SPLIT, Dataset
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation import gate
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.gate import Rule, Verdict
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.evaluation.metrics import ANSWERS, BASE, CHAMPION
from preference_tuning.evaluation.statistics import Array
from preference_tuning.models import weights
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import card, evidence
from preference_tuning.registry.folder import FolderRegistry, Version
from preference_tuning.tracking.comet import Comet, CometRun
from preference_tuning.training import unfinished
from preference_tuning.training.job import METRICS, TrainingRecord


class Result(BaseModel):
    """What the steps before produced."""

    model_config = {"arbitrary_types_allowed": True}

    finetuning_type: Literal["sft", "dpo"]
    base_model: BaseModelConfig
    source: ModelSource
    dataset: Dataset
    adapter: Path
    """The folder of the last stage's weights: an adapter or a full model."""
    training: dict[str, Path]
    """The evidence folder of each stage, in their order."""
    evaluation: Path
    config: RunConfig
    comet: CometRun
    output_dir: Path
    run: dict[str, str]

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


def register(result: Result, config: RegistryConfig, rules: EvaluationConfig) -> Registered:
    """Store a result as a version, make it champion if its evidence allows, and remove what only training needed.

    The evaluation's verdict is final only where there is no champion; a champion has to be beaten, on the same held-out
    pairs.

    Raises:
        PreferenceTuningError: the result is not finished or healthy, or cannot be stored.
    """
    registry = FolderRegistry(config)
    _check_evidence(result)
    evaluation = evaluation_job.load_summary(result.evaluation)
    reigning = registry.champion()
    rule = _against_champion(result, registry, reigning.version, rules) if reigning else gate.first_model()
    verdict = gate.verdict(evaluation.verdict.candidate, [*evaluation.verdict.rules, rule])
    adapter = weights.is_adapter(result.adapter)
    version = registry.publish(
        result.adapter,
        {**result.training, "evaluation": result.evaluation, "data": _manifest_only(result)},
        card.render(
            result.base_model, evaluation, verdict, result.records(), result.dataset.manifest, config.name, adapter
        ),
        _facts(result, evaluation, verdict),
    )
    if verdict.decision == "promote":
        registry.promote(version.id)
    unfinished.clear(result.output_dir)
    now = registry.champion()
    champion = now.version if now else None
    return Registered(
        version=version,
        folder=registry.path(version.id),
        promoted=champion == version.id,
        verdict=verdict,
        champion=champion,
    )


def track(result: Result, registered: Registered) -> None:
    """Complete the run's Comet experiment: stages that came from the step cache, and what became of the result."""
    spools = {stage: folder / METRICS for stage, folder in result.training.items()}
    spools["evaluation"] = result.evaluation / evaluation_job.METRICS
    for stage, spool in spools.items():
        if not result.comet.has(stage):
            tracker = Comet.start(result.comet, stage)
            tracker.replay(spool)
            tracker.end()
    tracker = Comet.start(result.comet, "register")
    tracker.log_others({f"registry/{name}": value for name, value in registered.metadata().items()})
    tracker.end()


def _check_evidence(result: Result) -> None:
    """Refuse a result that is not finished, not healthy, or not the one that was measured."""
    stages = ("sft", "dpo") if result.finetuning_type == "dpo" else ("sft",)
    found = evidence.problems(
        stages, result.adapter, result.training, result.evaluation, result.source, result.dataset.manifest
    )
    if found:
        raise PreferenceTuningError(f"nothing is registered: {'; '.join(found)}. Run it again with --no-cache")


def _against_champion(result: Result, registry: FolderRegistry, champion: str, rules: EvaluationConfig) -> Rule:
    """Return the rule on the champion; it does not apply to a result that is the champion."""
    if champion == fingerprint.of_value(fingerprint.manifest(result.adapter))[:16]:
        return Rule(name="champion", measured="this very model", wanted="another model", outcome="skipped")
    reigning = registry.version(champion)
    if reigning.base_model["fingerprint"] != result.source.fingerprint:
        measured, wanted = f"{champion} has another base model", "the same base model"
        return Rule(name="champion", measured=measured, wanted=wanted, outcome="undecided")
    scores = _with_champion(result, registry, reigning, rules)
    # The split never moves a prompt: what is held out today was held out when the champion was trained.
    unseen = np.ones(len(scores["prompt"]), bool)
    known = gate.Evidence(
        candidate=result.finetuning_type,
        parent="sft" if result.finetuning_type == "dpo" else BASE,
        scores=scores,
        figures={},
        champion=gate.Champion(champion, reigning.finetuning_type, unseen),
    )
    return gate.against_champion(known, rules)


def _with_champion(
    result: Result, registry: FolderRegistry, champion: Version, rules: EvaluationConfig
) -> dict[str, Array]:
    """Return the scores with the champion's on today's held-out pairs; it is scored anew where it never saw them."""
    ours = evaluation_job.load_scores(result.evaluation)
    stored = registry.path(champion.id) / "evidence" / "evaluation"
    theirs, name = evaluation_job.load_scores(stored), champion.finetuning_type
    same_data = champion.data.get("split_fingerprint") == result.dataset.manifest.split_fingerprint
    same_template = champion.metrics["template_hash"] == evaluation_job.load_summary(result.evaluation).template_hash
    same_rows = len(theirs[f"{BASE}/chosen"]) == len(ours[f"{BASE}/chosen"])
    if not (same_data and same_template and same_rows):
        theirs, name = _score_anew(result, registry.path(champion.id) / "model", rules), CHAMPION
    return ours | {f"{CHAMPION}/{answer}": theirs[f"{name}/{answer}"] for answer in ANSWERS}


def _score_anew(result: Result, model: Path, rules: EvaluationConfig) -> dict[str, Array]:
    job = evaluation_job.from_artifacts(
        result.base_model,
        result.source,
        result.dataset,
        {CHAMPION: model},
        rules.model_copy(update={"samples": 0}),
        result.output_dir,
        result.comet.model_copy(update={"config": result.comet.config.model_copy(update={"mode": "off"})}),
        beta=1.0,
        max_length=result.config.dpo.length(result.base_model),
    )
    return evaluation_job.load_scores(evaluation_job.evaluate(job).evidence)


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
            "beta": evaluation.beta,
            "models": {
                name: {key: figure.model_dump() for key, figure in figures.items()}
                for name, figures in evaluation.models.items()
            },
        },
        "verdict": verdict,
        "run": result.run,
    }
