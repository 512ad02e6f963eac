"""Unfinished training of other settings: refused, continued or removed, as the config says, and never passed over.

The folder of a job is named by its identity. So a changed setting, other data, another base model or other code would
silently begin anew beside hours of unfinished work.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preference_tuning import events, fingerprint, jobs
from preference_tuning.errors import ConfigError
from preference_tuning.training import checkpoints

if TYPE_CHECKING:
    from preference_tuning.training.job import TrainingJob

FORCED = "-forced"
"""How the folder of a job ends that went on with the checkpoints of another: its result never passes for clean."""

UNFORCEABLE = ("lora", "fsdp", "base_model.load_in_4bit", "sft.optim", "dpo.optim")
"""What the files of a checkpoint have their form from."""


@dataclass(frozen=True)
class Unfinished:
    """A training job of the same stage and model that was interrupted, and how it differs from the one at hand."""

    folder: Path
    step: int
    changed: list[str]


def check(job: TrainingJob, but: tuple[str, ...] = ()) -> None:
    """Refuse a job beside unfinished training of other settings, unless the config says what becomes of that.

    Args:
        job: that is to be run.
        but: keys of its identity that are not known yet and do not count.

    Raises:
        ConfigError: names the training, what changed since, and the ways out.
    """
    if job.unfinished == "start_over" or _begun(_exact(job)):
        return
    found = list(_others(job, but))
    if not found or not all(other.changed for other in found):
        return
    if job.unfinished == "refuse":
        raise ConfigError(_refusal(job, found[0]))
    _check_forceable(job, found[0])


def settle(job: TrainingJob, again: bool = False) -> tuple[Path, TrainingJob]:
    """Return the folder of a job, and the job as it is done there: from its beginning, or from where another ended.

    Args:
        job: that is to be run.
        again: whether finished work is done anew.

    Raises:
        ConfigError: as ``check``.
    """
    exact = _exact(job)
    if _begun(exact):
        return exact, job
    check(job)
    others = list(_others(job))
    if job.unfinished == "start_over":
        for other in others:
            _remove(other, exact)
    if job.unfinished != "continue":
        return exact, job
    forced = exact.with_name(exact.name + FORCED)
    if not _begun(forced) and others:
        others[0].folder.rename(forced)
    if not _begun(forced) or (again and _finished(forced)):
        return exact, job
    return forced, job.model_copy(update={"forced": _forced(forced, job)})


def clear(output_dir: Path) -> None:
    """Remove the checkpoints of finished jobs; called when a result is published, and with it safe."""
    for folder in (output_dir / "jobs").glob("*"):
        if _finished(folder) and (folder / checkpoints.FOLDER).is_dir() and not _runs(folder):
            checkpoints.remove(folder)


def _exact(job: TrainingJob) -> Path:
    return (job.output_dir / "jobs" / f"{job.stage}-{fingerprint.of_value(job.identity())[:16]}").absolute()


def _begun(folder: Path) -> bool:
    return (folder / jobs.JOB).is_file()


def _finished(folder: Path) -> bool:
    return (folder / jobs.RESULT).is_file()


def _others(job: TrainingJob, but: tuple[str, ...] = ()) -> Iterator[Unfinished]:
    """Yield the unfinished jobs of the stage and the model that have a good checkpoint and do not run, newest first."""
    folders = [
        path for path in (job.output_dir / "jobs").glob(f"{job.stage}-*") if _begun(path) and not _finished(path)
    ]
    for folder in sorted(folders, key=lambda path: (path / jobs.JOB).stat().st_mtime, reverse=True):
        if _named(folder) != job.name or _runs(folder):
            continue
        newest, _ = checkpoints.newest_good(folder / checkpoints.FOLDER)
        if newest is not None:
            yield Unfinished(folder.absolute(), checkpoints.step_of(newest), _changed(newest, folder, job, but))


def _named(folder: Path) -> str | None:
    """Return the name of the model that a job trains."""
    kept: dict[str, Any] = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))
    return kept.get("name")


def _runs(folder: Path) -> bool:
    with (folder / jobs.LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _changed(checkpoint: Path, folder: Path, job: TrainingJob, but: tuple[str, ...] = ()) -> list[str]:
    found, wanted = checkpoints.sealed_in(checkpoint).identity, job.identity()
    known = [key for key in wanted if key not in but]
    changed = checkpoints.differences({k: found.get(k) for k in known}, {k: wanted[k] for k in known})
    # What was mixed once is not clean because the settings came back.
    return changed or (["it went on with other settings before"] if folder.name.endswith(FORCED) else [])


def _refusal(job: TrainingJob, other: Unfinished) -> str:
    return (
        f"{job.stage}: unfinished training of {job.name or 'this model'} lies in {other.folder}, at step {other.step}, "
        f"and this is other work: {'; '.join(other.changed)}. Undo the change to continue it, or continue it with the "
        "change by --force-resume, or remove it by --set training.unfinished=start_over"
    )


def _check_forceable(job: TrainingJob, other: Unfinished) -> None:
    if stuck := [line for line in other.changed if line.partition(":")[0].startswith(UNFORCEABLE)]:
        raise ConfigError(
            f"{job.stage}: the checkpoints in {other.folder} cannot go on with {'; '.join(stuck)}. Undo that, or "
            "remove them by --set training.unfinished=start_over"
        )


def _remove(other: Unfinished, successor: Path) -> None:
    """Remove unfinished training, as was asked for, and note it with the job that starts over."""
    message = (
        f"unfinished training in {other.folder.name}, at step {other.step}, was removed: {'; '.join(other.changed)}"
    )
    successor.mkdir(parents=True, exist_ok=True)
    events.add(successor, "started_over", message, removed=other.folder.name, step=other.step, changed=other.changed)
    _say(message)
    # Under a name that no job has, so that a removal cut short leaves no damaged job.
    hidden = other.folder.with_name(f".removed-{other.folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    other.folder.rename(hidden)
    shutil.rmtree(hidden)


def _forced(folder: Path, job: TrainingJob) -> dict[str, Any]:
    """Return what a forced job continues, from the event that tells of it; it is noted now if it never was."""
    for event in reversed(events.read(folder)):
        if event.kind == "forced_resume" and event.facts["to"] == folder.name:
            return {key: event.facts[key] for key in ("from", "step", "changed")}
    newest, _ = checkpoints.newest_good(folder / checkpoints.FOLDER)
    assert newest is not None
    before = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))
    came_from = f"{job.stage}-{fingerprint.of_value(checkpoints.sealed_in(newest).identity)[:16]}"
    changed = [*(before.get("forced") or {}).get("changed", []), *_changed(newest, folder, job)]
    forced = {"from": came_from, "step": checkpoints.step_of(newest), "changed": changed}
    message = f"{job.stage.upper()}: goes on from step {forced['step']} of {came_from} with {'; '.join(changed)}"
    events.add(folder, "forced_resume", message, to=folder.name, **forced)
    _say(message)
    return forced


def _say(message: str) -> None:
    sys.stderr.write(f"  {message}\n")
