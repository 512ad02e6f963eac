"""One start of retraining, from the lock to the last line of its history."""

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import sides
from preference_tuning.data.table import SPLIT
from preference_tuning.errors import AlreadyRunningError, find
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.retraining import fingerprints, lock
from preference_tuning.retraining.decision import Completed, Decision, decide
from preference_tuning.retraining.fingerprints import Fingerprints
from preference_tuning.retraining.history import COMPLETED, QUIET, Clock, History, Record, Result, Run, facts_of, now

UNCHANGED = 10
"""The exit code of a start that did not train, because there was no reason to."""


def attempt(config: RunConfig, trigger: str, train: Callable[[RunConfig], Result], clock: Clock = now) -> Run:
    """Train if there is reason to, nobody else does, and return what became of it; it is in the history then.

    Args:
        config: of the run.
        trigger: who or what started it.
        train: runs the pipeline to its end.
        clock: tells the time.

    Raises:
        Exception: only if the history cannot be written; what ends the run is in the answer.
    """
    history = History(Path(config.output_dir))
    run = Run(name=config.registry.name, trigger=trigger, started=clock(), locked=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(history.path.parent, run.name))
            history.settle(run.name)
            _check_alone(history, run.name)
        except AlreadyRunningError as error:
            return history.add(_ended(run, clock, outcome="locked", exit_code=error.exit_code, reason=str(error)))
        try:
            run, decision = _look(config, history, run)
        except (Exception, KeyboardInterrupt) as error:
            _trace_unexpected(error)
            return history.add(_ended(run, clock, **facts_of(error)))
        if not decision.train:
            quiet = run.model_copy(update={"fingerprints": None})
            return history.add(_ended(quiet, clock, outcome="skipped", exit_code=UNCHANGED))
        return _train(_continued(config, history, run), train, history, run, clock)


def _ended(run: Run, clock: Clock, **facts: Any) -> Run:
    return run.model_copy(update={"ended": clock(), **facts})


def _check_alone(history: History, name: str) -> None:
    """Refuse to train beside a run that somebody started by hand: it needs the machine, and has the same champion."""
    for other in history.runs(name):
        if other.lives:
            host, pid, *_ = other.process.split()
            since = f"{other.started.astimezone():%Y-%m-%d %H:%M:%S}"
            raise AlreadyRunningError(f"already running: pid {pid} on {host}, since {since} ({other.trigger})")


def _look(config: RunConfig, history: History, run: Run) -> tuple[Run, Decision]:
    """Return the run with all that is known of it, and whether it is worth it."""
    last = next((run for run in reversed(history.runs(run.name)) if run.outcome in COMPLETED), None)
    known = last.fingerprints if last else None
    made_of = fingerprints.of(config, known)
    new_rows = _new_rows(history.path.parent, made_of, known) if known else None
    decision = decide(made_of, new_rows, _completed(config, last), config.retrain, run.started)
    return run.model_copy(update={"fingerprints": made_of, "new_rows": new_rows, "reason": decision.reason}), decision


def _new_rows(output_dir: Path, made_of: Fingerprints, known: Fingerprints) -> int | None:
    """Return how many pairs are new; None if the dataset of the last completed run was removed."""
    if made_of.data == known.data:
        return 0
    today, before = (data_job.kept(output_dir.absolute(), some.dataset) for some in (made_of, known))
    return sides.came(today.folder / SPLIT, before.folder / SPLIT) if today and before else None


def _completed(config: RunConfig, last: Run | None) -> Completed | None:
    if last is None or last.fingerprints is None or last.result is None:
        return None
    kept = last.result.version in FolderRegistry(config.registry).ids()
    return Completed(last.started, last.fingerprints, last.result.version, kept)


def _continued(config: RunConfig, history: History, run: Run) -> RunConfig:
    """Return the config under which unfinished training of other data is removed, where only the data changed.

    Somebody who changed a setting is asked what becomes of the work (``training.unfinished``). Data grows by itself:
    what a night left unfinished on yesterday's must not stop every night from then on.
    """
    if config.training.unfinished != "refuse" or run.fingerprints is None:
        return config
    before = _since_completed(history.runs(run.name))
    if not before or any(run.fingerprints.changed_since(other) not in ([], ["data"]) for other in before):
        return config
    training = config.training.model_copy(update={"unfinished": "start_over"})
    return config.model_copy(update={"training": training})


def _since_completed(runs: list[Run]) -> list[Fingerprints]:
    """Return what the runs were made of that were begun and not completed, since the last one that was."""
    completed = [i for i, run in enumerate(runs) if run.outcome in COMPLETED]
    begun = [run for run in runs[(completed or [-1])[-1] + 1 :] if run.outcome not in QUIET]
    return [run.fingerprints for run in begun if run.fingerprints]


def _train(config: RunConfig, train: Callable[[RunConfig], Result], history: History, run: Run, clock: Clock) -> Run:
    record = Record(history, run, clock)
    try:
        record.complete(train(config))
    except BaseException as error:  # it is in the history, and in the answer
        record.fail(error)
        _trace_unexpected(error)
    return record.run


def _trace_unexpected(error: BaseException) -> None:
    if find(error) is None:
        traceback.print_exception(error)
