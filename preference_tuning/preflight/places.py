"""Areas that are one look each: a text, or the error that stops a run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preference_tuning.config import AlerterNotify, RunConfig
from preference_tuning.errors import ConfigError
from preference_tuning.evaluation import general, harness, judge
from preference_tuning.models.devices import processes_of
from preference_tuning.notifying import receivers
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import World
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import targets
from preference_tuning.tracking import account
from preference_tuning.training import job as training_job
from preference_tuning.training import unfinished


def training(config: RunConfig) -> str:
    """Return how many processes train."""
    count = processes_of(config.training, config.base_model)
    return f"{count} processes" if count > 1 else "one process"


def resume(world: World) -> Iterator[Finding]:
    """Yield whether interrupted training is there that the run would begin anew beside."""
    config, source, dataset = world.config, world.source, world.dataset
    stages: dict[Any, dict[str, Any]] = {"sft": {"lora": config.lora, "sft": config.sft}}
    if config.finetuning_type == "dpo":
        stages["dpo"] = {"dpo": config.dpo}
    out, name = Path(config.output_dir).expanduser(), config.registry.name
    for stage, settings in stages.items():
        work = training_job.from_artifacts(
            stage, config.base_model, source, dataset, out, config.training, name=name, **settings
        )
        # What SFT will leave is known only when it is done.
        unfinished.check(work, but=("adapter_hash",) if stage == "dpo" else ())
    yield Area("resume").ok("no unfinished training stands in the way")


def judges(config: RunConfig) -> str:
    """Say what is asked and read beside the held-out pairs: a judge, lm-evaluation-harness, general text."""
    evaluation = config.evaluation
    read = [f"{len(general.texts(Path(evaluation.general)))} general texts"] if evaluation.general else []
    asked = [judge.check(evaluation.judge)] if evaluation.judge else []
    asked += [harness.check(evaluation.lm_eval)] if evaluation.lm_eval else []
    return "; ".join([*asked, *read]) or "none"


def outputs(config: RunConfig) -> str:
    """Return where everything is written, if it can be."""
    folder = Path(config.output_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"output_dir: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: cannot write {folder}: no permission in {there}")
    return str(folder)


def registry(config: RunConfig) -> str:
    """Return where versions go, if they can, and which one is to beat."""
    registry = FolderRegistry(config.registry)
    registry.check_writable()
    champion = registry.champion()
    return f"{registry.name} in {registry.place}, champion {champion.version if champion else 'none yet'}"


def pushes(config: RunConfig) -> str:
    """Return what every target of pushes says; all that is wrong is told at once."""
    told, wrong = [], []
    for target in targets.of(config):
        try:
            told.append(target.check())
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return f"\n{'':10}".join(told) or "none"


def notify(config: RunConfig) -> str:
    """Return who is told what becomes of the run; whom it would not reach is a warning, as it harms no run."""
    lines = []
    for place, receiver in enumerate(config.notify):
        if isinstance(receiver, AlerterNotify):
            continue  # of ZenML's stack
        try:
            lines.append(receivers.check(receiver))
        except ConfigError as error:
            lines.append(f"warning: notify.{place}: {error}")
    return "\n".join([f"{len(config.notify)} receivers" if config.notify else "nobody", *lines])


def tracking(config: RunConfig) -> str:
    """Return how Comet is fed, if it can be."""
    return account.check(config.tracking)
