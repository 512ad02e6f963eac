"""The life of a run in ZenML's database: it says "running" only as long as its process lives.

ZenML does not notice that a process was killed. So the process holds a lock while its run lives, the run names the lock
in its ``extra``, and the next start marks runs as failed whose lock nobody holds. Runs on other machines, of other
orchestrators or without a lock of ours are left alone.
"""

import contextlib
import fcntl
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zenml.client import Client
from zenml.constants import STR_FIELD_MAX_LENGTH
from zenml.enums import ExecutionStatus, MetadataResourceTypes
from zenml.models import ExceptionInfo, PipelineRunResponse, PipelineRunUpdate, RunMetadataResource, StepRunUpdate
from zenml.utils import dashboard_utils
from zenml.utils.time_utils import utc_now

from preference_tuning import continuing
from preference_tuning.errors import PreferenceTuningError, find
from preference_tuning.retraining.history import Result

LOCK, HOST, FOLDER = "lock", "host", "folder"
LOOK_SECONDS = 10.0
"""Between two looks at a run on another machine."""
KILLED = "its process was killed; the next start found it and marked it as failed"


@contextlib.contextmanager
def alive(pipeline: str, output_dir: Path) -> Iterator[dict[str, str]]:
    """Hold the lock of a run that starts here, and yield the ``extra`` by which the run names it.

    Killed runs are marked as failed before; a run that fails inside is left with its reason.
    """
    orchestrator = Client().active_stack.orchestrator.config
    if not (orchestrator.is_local and orchestrator.is_synchronous):
        yield {}
        return
    lock = (output_dir / "runs" / f"{uuid.uuid4().hex}.lock").absolute()
    lock.parent.mkdir(parents=True, exist_ok=True)
    reconcile(pipeline)
    _clear(lock.parent)
    aside = lock.with_suffix(".new")
    with aside.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        aside.rename(lock)  # held from the moment that others can see it
        try:
            yield {LOCK: str(lock), HOST: socket.gethostname(), FOLDER: str(Path.cwd())}
        except BaseException as error:
            _tell(pipeline, str(lock), error)
            raise
        finally:
            lock.unlink(missing_ok=True)


def finished(run: PipelineRunResponse) -> PipelineRunResponse:
    """Return a run when it is at its end, on whatever machine it is."""
    while not run.status.is_finished:
        time.sleep(LOOK_SECONDS)
        run = Client().get_pipeline_run(run.id)
    return run


def result_of(run: PipelineRunResponse) -> Result:
    """Return what a finished run left in the registry, as its last step told.

    Raises:
        PreferenceTuningError: the run failed.
    """
    run = Client().get_pipeline_run(run.id)
    if not run.status.is_successful:
        raise PreferenceTuningError(
            f"run {run.name} {run.status.value}: {run.get_body().status_reason or 'no reason is known'}"
        )
    told = run.steps["register"].run_metadata
    links = {"dashboard": dashboard_utils.get_run_url(run), "comet": told.get("comet/url")}
    return Result.model_validate(
        {**told, "run": run.name, "links": {name: str(link) for name, link in links.items() if link}}
    )


def reconcile(pipeline: str) -> None:
    """Mark the runs as failed whose process was killed."""
    for run in runs_of(pipeline, in_progress=True):
        extra = run.config.extra
        lock = Path(extra.get(LOCK, ""))
        if extra.get(HOST) != socket.gethostname() or not lock.parent.is_dir():
            continue
        with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as held:
            if lock.is_file():
                fcntl.flock(held.enter_context(lock.open()), fcntl.LOCK_EX | fcntl.LOCK_NB)
            _fail(run, KILLED, {})
            lock.unlink(missing_ok=True)
            print(f"  run {run.name}: {KILLED}", file=sys.stderr)


def _clear(folder: Path) -> None:
    """Remove the locks of processes that were killed before their run began."""
    for lock in folder.glob("*.lock"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink()


def _tell(pipeline: str, lock: str, error: BaseException) -> None:
    """Leave the reason of a failure with its run, if it came to be one."""
    known = find(error)
    reason = str(known or f"{type(error).__name__}: {error}")
    facts = {"message": reason, "exit_code": known.exit_code if known else 1, **(known.facts if known else {})}
    for run in runs_of(pipeline, size=10):
        if run.config.extra.get(LOCK) == lock:
            continuing.note(error, run.name, _failed_step(run))
            _fail(run, reason, facts)
            resource = RunMetadataResource(id=run.id, type=MetadataResourceTypes.PIPELINE_RUN)
            failure = {"message": reason, "then": continuing.noted(error) or ""}
            Client().create_run_metadata(metadata={"failure": failure}, resources=[resource])


def _failed_step(run: PipelineRunResponse) -> str | None:
    """Return the step that a run ended in, if it was in one."""
    return next((name for name, step in run.steps.items() if not step.status.is_successful), None)


def runs_of(pipeline: str, **which: Any) -> list[PipelineRunResponse]:
    """Return runs of the pipeline, the newest first; none if it never ran."""
    if not Client().list_pipelines(name=pipeline, size=1).items:
        return []
    found: list[PipelineRunResponse] = (
        Client().list_pipeline_runs(pipeline=pipeline, sort_by="desc:created", hydrate=True, **which).items
    )
    return found


def _fail(run: PipelineRunResponse, reason: str, facts: dict[str, Any]) -> None:
    """Mark a run and its unfinished steps as failed, and leave ``facts`` with every failed step."""
    client = Client()
    for step in run.steps.values():
        if not step.status.is_finished:
            info = ExceptionInfo(traceback=reason, message=reason)
            update = StepRunUpdate(status=ExecutionStatus.FAILED, end_time=utc_now(), exception_info=info)
            client.zen_store.update_run_step(step.id, update)
        if facts and (step.status == ExecutionStatus.FAILED or not step.status.is_finished):
            resource = RunMetadataResource(id=step.id, type=MetadataResourceTypes.STEP_RUN)
            client.create_run_metadata(metadata=facts, resources=[resource])
    short = reason if len(reason) <= STR_FIELD_MAX_LENGTH else reason[: STR_FIELD_MAX_LENGTH - 1] + "…"
    client.zen_store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=short))
