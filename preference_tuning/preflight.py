"""Everything of a run that can be known to be wrong before it costs anything."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from preference_tuning.config import RunConfig
from preference_tuning.data import findings, job
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation import general, harness, judge
from preference_tuning.models.compute import check_packages
from preference_tuning.models.devices import processes_of
from preference_tuning.models.source import ModelSource, locate
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import targets
from preference_tuning.tracking import account
from preference_tuning.training import job as training_job
from preference_tuning.training import unfinished

USUAL = {"sft": 2e-5, "dpo": 5e-7}
"""Learning rates at which a whole model of a few billion parameters is trained (Zephyr, Tunstall et al. 2023)."""
TO_EVALUATE = ("model", "judges", "outputs", "registry")
"""What has to be right where nothing is trained."""


def check(config: RunConfig, only: Collection[str] = ()) -> str:
    """Check the config against the world (model, data, folders, tracking) and return the findings, a line each.

    Args:
        config: of a run.
        only: names of what is looked at; empty: everything.

    Raises:
        PreferenceTuningError: with every finding that stops a run; config errors outrank data errors in the exit code.
    """
    findings: list[str] = []
    errors: list[PreferenceTuningError] = []
    for name, look in (
        ("model", _model),
        ("training", _training),
        ("data", _data),
        ("judges", _judges),
        ("resume", _resume),
        ("outputs", _outputs),
        ("registry", _registry),
        ("pushes", _pushes),
        ("tracking", _tracking),
    ):
        if only and name not in only:
            continue
        try:
            findings.append(f"{name:9} ok: {look(config)}")
        except PreferenceTuningError as error:
            errors.append(error)
    if errors:
        first = min(errors, key=lambda error: error.exit_code)
        raise type(first)("\n".join(dict.fromkeys(str(error) for error in errors)))
    return "\n".join(findings)


def _model(config: RunConfig) -> str:
    check_packages(config.base_model)
    source = locate(config.base_model)
    told = [f"{source.kind} {source.location} ({source.fingerprint[:16]})"]
    if config.lora is None:
        told[0] += ", every weight is trained"
        rates = {"sft": config.sft.learning_rate}
        if config.finetuning_type == "dpo":
            rates["dpo"] = config.dpo.learning_rate
        told += [
            f"{'':10}warning: {stage}.learning_rate {rate:g} is a rate for adapters; usual here is {USUAL[stage]:g}"
            for stage, rate in rates.items()
            if rate > 10 * USUAL[stage]
        ]
    return "\n".join(told)


def _training(config: RunConfig) -> str:
    count = processes_of(config.training, config.base_model)
    return f"{count} processes" if count > 1 else "one process"


def _data(config: RunConfig) -> str:
    manifest = job.prepare_for_run(job.of_run(config, _found(config))).manifest
    sft_rows = manifest.sft if manifest.sft is not None else manifest.train
    count = processes_of(config.training, config.base_model)
    config.sft.check_warmup("sft", sft_rows, count)
    if config.finetuning_type == "dpo":
        config.dpo.check_warmup("dpo", manifest.train, count)
    left_out = f", {manifest.dropped} left out" if manifest.dropped else ""
    told = [f"{manifest.train} training and {manifest.held_out} held-out pairs in {manifest.source}{left_out}"]
    told += [f"{'':10}{f.level}: {f.message}" for f in (*manifest.findings, *findings.of_run(manifest, config))]
    return "\n".join(told)


def _resume(config: RunConfig) -> str:
    """Look for interrupted training that the run would begin anew beside."""
    source = locate(config.base_model)
    dataset = job.prepare_for_run(job.of_run(config, source))
    stages: dict[Literal["sft", "dpo"], dict[str, Any]] = {"sft": {"lora": config.lora, "sft": config.sft}}
    if config.finetuning_type == "dpo":
        stages["dpo"] = {"dpo": config.dpo}
    out, name = Path(config.output_dir).expanduser(), config.registry.name
    for stage, settings in stages.items():
        work = training_job.from_artifacts(
            stage, config.base_model, source, dataset, out, config.training, name=name, **settings
        )
        # What SFT will leave is known only when it is done.
        unfinished.check(work, but=("adapter_hash",) if stage == "dpo" else ())
    return "no unfinished training stands in the way"


def _found(config: RunConfig) -> ModelSource | None:
    """Return the model, or None: its own check says that it is missing, and the data can still be read."""
    try:
        return locate(config.base_model)
    except ConfigError:
        return None


def _judges(config: RunConfig) -> str:
    """Say what is asked and read beside the held-out pairs: a judge, lm-evaluation-harness, general text."""
    evaluation = config.evaluation
    read = [f"{len(general.texts(Path(evaluation.general)))} general texts"] if evaluation.general else []
    asked = [judge.check(evaluation.judge)] if evaluation.judge else []
    asked += [harness.check(evaluation.lm_eval)] if evaluation.lm_eval else []
    return "; ".join([*asked, *read]) or "none"


def _outputs(config: RunConfig) -> str:
    folder = Path(config.output_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"output_dir: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: cannot write {folder}: no permission in {there}")
    return str(folder)


def _registry(config: RunConfig) -> str:
    registry = FolderRegistry(config.registry)
    registry.check_writable()
    champion = registry.champion()
    return f"{registry.name} in {registry.place}, champion {champion.version if champion else 'none yet'}"


def _pushes(config: RunConfig) -> str:
    """Ask every target, so that all that is wrong is told at once."""
    told, wrong = [], []
    for target in targets.of(config):
        try:
            told.append(target.check())
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return f"\n{'':10}".join(told) or "none"


def _tracking(config: RunConfig) -> str:
    return account.check(config.tracking)
