"""The life of checkpoints: written aside, sealed, put in place in one step, resumed from only as they were sealed.

A process may end at any moment, and the machine with it. A folder named ``checkpoint-N`` is complete and on disk, or it
was damaged later, which its manifest of hashes shows. Whatever is half written or half deleted has a hidden name.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from preference_tuning import fingerprint, jobs
from preference_tuning.errors import ConfigError
from preference_tuning.models import weights

FOLDER = "checkpoints"
SEAL, TOTALS = "MANIFEST.json", "totals.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"
"""transformers' mark for a checkpoint that it did not get to finish."""
WRITING, DELETING = ".writing", ".deleting-"

NEEDED = (TOTALS, "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""Beside the weights, whose files depend on whether they are an adapter's or a full model's."""
SHARDED = {"optimizer.pt": "optimizer.bin"}
"""What a file is called when the weights are shared out over several processes."""

KEPT = 2
"""Checkpoints that are kept: should the newest be damaged, there is one more."""


class Totals(BaseModel):
    """Of the training so far, over all its legs; what was done again after a crash counts once."""

    seconds: float = 0.0
    tokens: int = 0


class Seal(BaseModel):
    """The manifest of a checkpoint."""

    step: int
    identity: dict[str, Any]
    """Of the job: its settings, and the hashes of data, base model and code."""
    files: dict[str, dict[str, Any]]
    """Size and sha256 of every file beside the manifest."""


def aside(folder: Path) -> Path:
    """Return the folder in which the checkpoints of ``folder`` are written."""
    return folder / WRITING


def publish(folder: Path, step: int, totals: Totals, identity: dict[str, Any]) -> None:
    """Seal what was written aside for ``step``, put it in place, and remove what the newest two make superfluous."""
    written = aside(folder) / f"checkpoint-{step}"
    jobs.write_json(written / TOTALS, totals.model_dump(mode="json"))
    seal(written, identity)
    _sync(written)
    place = folder / written.name
    if place.exists():  # damaged: training went on from an older one and came here again
        _delete(place)
    written.rename(place)
    jobs.sync(folder)
    rotate(folder)


def seal(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Write the manifest of a complete checkpoint; a folder without one is never resumed from."""
    files = fingerprint.manifest(checkpoint, skip=[SEAL])
    sealed = Seal(step=step_of(checkpoint), identity=identity, files=files)
    jobs.write_json(checkpoint / SEAL, sealed.model_dump(mode="json"))


def problem(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None if every byte is as it was sealed."""
    try:
        sealed = sealed_in(checkpoint)
        found = fingerprint.manifest(checkpoint, skip=[SEAL])
    except (OSError, ValidationError):
        return "it was not finished (no readable manifest)"
    if INCOMPLETE in found:
        return f"it was not finished (it has a {INCOMPLETE})"
    if missing := sorted(sealed.files.keys() - found.keys()):
        return f"lost since it was written: {', '.join(missing)}"
    if changed := sorted(name for name in sealed.files if found[name] != sealed.files[name]):
        return f"changed since it was written: {', '.join(changed)}"
    if sealed.step != step_of(checkpoint):
        return f"it is of step {sealed.step}"
    needed = (*weights.files(checkpoint), *NEEDED)
    missing = [name for name in needed if not {name, SHARDED.get(name)} & sealed.files.keys()]
    return f"it has no {', no '.join(missing)}" if missing else None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each newer one that does not."""
    rejected: list[str] = []
    for checkpoint in _newest_first(folder):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint, rejected
        rejected.append(f"{checkpoint.name}: {reason}")
    return None, rejected


def rotate(folder: Path) -> None:
    """Delete all checkpoints but the newest two that verify; where none does, delete none."""
    found = list(_newest_first(folder))
    good: list[Path] = []
    for checkpoint in found:
        if len(good) < KEPT and problem(checkpoint) is None:
            good.append(checkpoint)
    for checkpoint in found if good else []:
        if checkpoint not in good:
            _delete(checkpoint)


def clean(folder: Path) -> None:
    """Remove what an ended process left half written or half deleted."""
    for left in (aside(folder), *folder.glob(f"{DELETING}*")):
        shutil.rmtree(left, ignore_errors=True)


def remove(job_folder: Path) -> None:
    """Remove the checkpoints of a job whose result is safe; a call that was cut short can be repeated."""
    clean(job_folder)
    if (job_folder / FOLDER).is_dir():
        _delete(job_folder / FOLDER)


def sealed_in(checkpoint: Path) -> Seal:
    """Return the manifest of a checkpoint."""
    return Seal.model_validate_json((checkpoint / SEAL).read_text(encoding="utf-8"))


def totals_of(checkpoint: Path | None) -> Totals:
    """Return what training had done when a checkpoint was written; nothing at the beginning."""
    if checkpoint is None:
        return Totals()
    return Totals.model_validate_json((checkpoint / TOTALS).read_text(encoding="utf-8"))


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def check(checkpoint: Path, wanted: dict[str, Any], forced: bool = False) -> list[str]:
    """Return how the job that wrote a checkpoint differs from the one with the identity ``wanted``.

    Raises:
        ConfigError: it differs, and that is not ``forced``.
    """
    found = differences(sealed_in(checkpoint).identity, wanted)
    if found and not forced:
        raise ConfigError(
            f"{checkpoint} was written by other work: {'; '.join(found)}. Undo the change to continue it, or move the "
            "folder away to train anew"
        )
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return a line for each key of two identities that differs, ``sft.learning_rate: 0.0003 -> 0.0001``."""
    before, after = (dict(_flat(json.loads(json.dumps(identity)))) for identity in (found, wanted))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def _delete(path: Path) -> None:
    """Take a folder away in one step: what is half deleted must not look like a damaged checkpoint."""
    hidden = path.with_name(f"{DELETING}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder, folder.parent):
        jobs.sync(path)
