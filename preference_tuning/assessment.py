"""Any model at any time, on the held-out pairs of a config: scored beside the base model and the champion, and judged.

The pipeline's evaluation does the same for what a run trained; here nothing is trained and nothing is registered.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preference_tuning import preflight
from preference_tuning.config import EvaluationConfig, RunConfig, portable
from preference_tuning.data import job as data_job
from preference_tuning.data import sides
from preference_tuning.data.table import SPLIT, Dataset
from preference_tuning.errors import ConfigError, DataError, PreferenceTuningError
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation import screen
from preference_tuning.evaluation.job import Evaluated
from preference_tuning.models import weights
from preference_tuning.models.source import ModelSource, locate
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import FolderRegistry, Version, version_id

MODEL = "model"
"""The name of what is assessed, in tables and reports."""


@dataclass(frozen=True)
class Candidate:
    """The model to be assessed."""

    title: str
    folder: Path
    finetuning_type: Literal["sft", "dpo"]
    """Of a folder that no registry knows, that of the config."""
    version: Version | None
    """None: nothing is known of its training."""


def assess(what: str, config: RunConfig) -> str:
    """Evaluate a model and return what came out, on one screen.

    Args:
        what: ``champion``, ``previous``, a version's id or its beginning, or a folder with an adapter or a full model.
        config: base model, data, evaluation and registry; nothing else of it is used.

    Raises:
        ConfigError: there is no such model, or it belongs to another base model.
        DataError: the model was trained on prompts that are held out here.
        PreferenceTuningError: the version or the champion is damaged, or the evaluation failed.
    """
    preflight.check(config, preflight.TO_EVALUATE)
    registry, source = FolderRegistry(config.registry), locate(config.base_model)
    candidate = find(what, config, registry)
    _check_base(candidate, source, config)
    dataset = data_job.prepare_for_run(data_job.of_run(config, source))
    _check_unseen(candidate, registry, dataset)
    work = evaluation_job.from_artifacts(
        config.base_model,
        source,
        dataset,
        {MODEL: candidate.folder},
        _rules_for(candidate, config.evaluation),
        Path(config.output_dir).expanduser(),
        champion=to_beat(registry, version_id(candidate.folder)),
        # Its reference is the base model, as the champion's is; rewards against it are log-ratios for both.
        beta=1.0,
        max_length=config.dpo.length(config.base_model),
        retries=config.training.retries,
    )
    return "\n".join(_screen(candidate, dataset, evaluation_job.evaluate(work)))


def find(what: str, config: RunConfig, registry: FolderRegistry) -> Candidate:
    """Return the model that is meant.

    Raises:
        ConfigError: there is none, or its folder holds no model.
        PreferenceTuningError: it is a version whose files are not what was published.
    """
    folder = Path(what).expanduser()
    if what in ("champion", "previous") or not folder.is_dir():
        version = registry.find(what)
    elif problem := _no_model(folder):
        raise ConfigError(f"{folder}: {problem}")
    else:
        version = registry.find(version_id(folder))
        if version is None:
            return Candidate(str(folder), folder.absolute(), config.finetuning_type, None)
    if version is None:
        known = ", ".join(registry.ids()) or "none yet"
        raise ConfigError(f"{what!r} is no folder, and no version of {registry.name!r} in {registry.place} ({known})")
    if problems := registry.verify(version):
        raise PreferenceTuningError(
            f"registry: {version} of {registry.name!r} is not what was published: {problems[0]}"
        )
    manifest = registry.version(version)
    title = f"version {version} of {registry.name}"
    return Candidate(title, registry.path(version) / "model", manifest.finetuning_type, manifest)


def _no_model(folder: Path) -> str | None:
    """Return why a folder cannot be evaluated, or None."""
    if not weights.is_adapter(folder) and not (folder / "config.json").is_file():
        return "neither an adapter (adapter_config.json) nor a full model (config.json)"
    return weights.problem(folder)


def _check_base(candidate: Candidate, source: ModelSource, config: RunConfig) -> None:
    """Refuse a model that was tuned from another base model than the config's."""
    told, ours = None, portable(config.base_model.source)
    if candidate.version is not None:
        if candidate.version.base_model["fingerprint"] != source.fingerprint:
            told = f"{candidate.version.base_model['source']} ({candidate.version.base_model['fingerprint'][:16]})"
    elif weights.is_adapter(candidate.folder):
        settings = json.loads((candidate.folder / weights.ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if settings.get("base_model_name_or_path") != ours:
            told = str(settings.get("base_model_name_or_path"))
    if told:
        raise ConfigError(
            f"base_model.source: {candidate.title} was tuned from {told}, and the config has {ours} "
            f"({source.fingerprint[:16]})"
        )


def _check_unseen(candidate: Candidate, registry: FolderRegistry, dataset: Dataset) -> None:
    """Refuse held-out pairs on whose prompts the model was trained."""
    if candidate.version is None:
        return
    training = registry.path(candidate.version.id) / "evidence" / "data" / SPLIT
    known, held_out = sides.trained_on(dataset.folder / SPLIT, training)
    if known:
        raise DataError(
            f"{dataset.manifest.source}: {candidate.title} was trained on {known} of {held_out} held-out prompts, so "
            "figures on them would flatter; use the data, the seed and the share that it was trained with, or new pairs"
        )


def _rules_for(candidate: Candidate, config: EvaluationConfig) -> EvaluationConfig:
    """Return the evaluation with the primary metric that suits a model whose SFT policy is not at hand.

    ``auto`` would take a model whose reference is the base model for an SFT model.
    """
    if candidate.finetuning_type == "sft" or config.gate.primary != "auto":
        return config
    gate = config.gate.model_copy(update={"primary": "rewards/accuracies"})
    return config.model_copy(update={"gate": gate})


def _screen(candidate: Candidate, dataset: Dataset, evaluated: Evaluated) -> Iterator[str]:
    evaluation, manifest = evaluated.evaluation, dataset.manifest
    yield from screen.entry("model", f"{candidate.title} ({candidate.finetuning_type.upper()})")
    yield from screen.entry(
        "data", f"{manifest.source}: {evaluation.pairs} held-out pairs ({evaluation.data_fingerprint[:16]})"
    )
    yield from screen.entry("champion", evaluation.champion or "none")
    yield ""
    yield from screen.render(evaluation)
    notes = list(evaluation.notes)
    if candidate.version is None:
        notes.append("what it was trained on is not known here, so the pairs may not be new to it")
    for note in notes:
        yield from screen.entry("note", note)
    yield f"report     {evaluated.evidence / evaluation_job.REPORT}"
