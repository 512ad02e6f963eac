"""`run.py resume`: a run that failed goes on from its last completed step, with its own config, as a new run.

ZenML's replay does it, and skips what it is told to, whatever changed since. So a step is skipped only if its cache key
is still the one under which it ran: code, data, base model, settings and inputs are the same. Anything else runs again,
and is named.
"""

import json
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from zenml.client import Client
from zenml.config.step_configurations import Step
from zenml.enums import ExecutionStatus
from zenml.exceptions import ZenKeyError
from zenml.models import PipelineRunResponse, StepRunResponse
from zenml.orchestrators import cache_utils
from zenml.pipelines.pipeline_definition import Pipeline

from pipelines.runs import FOLDER, reconcile, runs_of
from pipelines.training import OPTIONS, training
from preference_tuning.config import load
from preference_tuning.errors import AlreadyRunningError, ConfigError, PreferenceTuningError
from preference_tuning.retraining import lock

TRIGGER = "resume"
LOOKED_AT = 50
"""So many runs are looked through for the last one that failed."""
ENDED_BADLY = (ExecutionStatus.FAILED, ExecutionStatus.STOPPED, ExecutionStatus.CANCELLED)


def resume(name: str | None) -> None:
    """Continue a run, and say what of it is kept.

    Args:
        name: name or id, or the beginning of one; None: the last one that failed in this folder.

    Raises:
        ConfigError: there is no such run, or nothing to resume of it.
        AlreadyRunningError: it is running, or is being retrained.
    """
    reconcile(training.name)
    run = _named(name) if name else _last()
    _check(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{run.name}.yaml"
        path.write_text(yaml.safe_dump(_document(run)), encoding="utf-8")
        config = load(path).config
        with lock.held(Path(config.output_dir).expanduser(), config.registry.name):
            begun = training.copy()
            begun.trigger = TRIGGER
            pipeline = begun.with_options(config_path=str(path), enable_cache=run.config.enable_cache)
            kept, lost = _kept(pipeline, run)
            print(_told(run, kept, lost), flush=True)
            pipeline.replay(pipeline_run=run.id, skip=kept)


def _named(name: str) -> PipelineRunResponse:
    try:
        run = Client().get_pipeline_run(name)
    except (KeyError, ValueError) as error:
        several = isinstance(error, ZenKeyError)
        raise ConfigError(
            f"resume: {'more than one run begins with' if several else 'there is no run'} {name!r}; "
            "`zenml pipeline runs list` shows them"
        ) from None
    if run.pipeline is None or run.pipeline.name != training.name:
        raise ConfigError(f"resume: run {run.name} is not one of the pipeline {training.name!r}")
    return run


def _last() -> PipelineRunResponse:
    """Return the last run here that failed, and that no later one did over."""
    done: list[dict[str, Any]] = []
    for run in runs_of(training.name, size=LOOKED_AT):
        if run.config.extra.get(FOLDER, str(Path.cwd())) != str(Path.cwd()):
            continue
        parameters = run.config.parameters or {}
        if run.status.is_successful:
            done.append(parameters)
        elif run.status in ENDED_BADLY and parameters not in done:
            return run
    raise ConfigError(
        f"resume: no run that was started in {Path.cwd()} failed and is still to be done; `run.py history` lists them"
    )


def _check(run: PipelineRunResponse) -> None:
    """Refuse a run of which there is nothing to resume here."""
    if run.status.is_successful:
        raise ConfigError(f"resume: run {run.name} is {run.status.value}; there is nothing to resume")
    if run.status not in ENDED_BADLY:
        raise AlreadyRunningError(f"resume: run {run.name} is {run.status.value}; let it end, or stop it first")
    folder = run.config.extra.get(FOLDER)
    if folder and folder != str(Path.cwd()):
        # Paths in its config are those of that folder.
        raise ConfigError(f"resume: run {run.name} was started in {folder}; resume it there")


def _document(run: PipelineRunResponse) -> dict[str, Any]:
    """Return the config of a run as its file had it."""
    if not run.config.parameters:
        raise PreferenceTuningError(f"resume: ZenML has no config of run {run.name}")
    return {**run.config.extra.get(OPTIONS, {}), "parameters": run.config.parameters}


def _kept(pipeline: Pipeline, run: PipelineRunResponse) -> tuple[list[str], list[str]]:
    """Return the completed steps whose result is still the one that they would have, and those of which it is not.

    In the order of the pipeline: a step after one that runs again runs again too.
    """
    asked = pipeline.copy()
    asked.prepare()
    given = {name: value for name, value in asked._run_args.items() if name != "prevent_build_reuse"}
    snapshot, *_ = asked._compile(**given)
    kept, lost = list[str](), list[str]()
    for name, step in snapshot.step_configurations.items():
        done = run.steps.get(name)
        if done is None or not done.status.is_successful or step.config.enable_cache is False:
            continue
        # As the database gives it back: the key is made from the text of the parameters.
        raw = json.loads(step.model_dump_json(exclude={"config"}))
        stored = Step.from_dict(raw, snapshot.pipeline_configuration, exclude_hook_sources=False)
        same = _key(stored, done) == _ran(done).cache_key and set(step.spec.upstream_steps) <= set(kept)
        (kept if same else lost).append(name)
    return kept, lost


def _key(step: Step, done: StepRunResponse) -> str:
    """Return the cache key that a step would have now on the inputs that it had."""
    client = Client()
    inputs = {name: done.inputs[name] for name in step.spec.normalized_inputs if name in done.inputs}
    return cache_utils.generate_cache_key(step, inputs, client.active_stack.artifact_store, client.active_project.id)


def _ran(step: StepRunResponse) -> StepRunResponse:
    """Return the step run itself of one that a resumed run skipped."""
    while step.status == ExecutionStatus.SKIPPED and isinstance(step.original_step_run_id, UUID):
        step = Client().get_run_step(step.original_step_run_id)
    return step


def _told(run: PipelineRunResponse, kept: list[str], lost: list[str]) -> str:
    lines = [f"resume     {run.name}: {', '.join(kept) if kept else 'nothing'} kept"]
    if lost:
        lines.append(
            f"           {', '.join(lost)} once more: code, data, base model or settings are not those of then"
        )
    return "\n".join(lines)
