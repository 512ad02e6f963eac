"""An export's folder: filled aside, described by ``export.json``, and put in place in one step."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.errors import ConfigError

RECORD = "export.json"


class Record(BaseModel):
    """What an export is, beside its files."""

    form: str
    asked: dict[str, Any]
    """All that decides on its content."""
    made: dict[str, Any]
    """What was found when it was checked."""
    files: dict[str, dict[str, Any]]


def put(folder: Path, form: str, asked: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> Path:
    """Have ``write`` fill a folder aside and put it in place, unless what is asked for lies there; return its place.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"export: {folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if _finished(folder, form, asked):
            return folder
        raise ConfigError(
            f"export: {folder} holds something else, or this export with changed files; name a new folder"
        )
    aside = _aside(folder)
    try:
        made = write(aside)
        record = Record(form=form, asked=asked, made=made, files=fingerprint.manifest(aside))
        jobs.write_json(aside / RECORD, record.model_dump(mode="json"))
        for path in sorted(aside.rglob("*")):
            jobs.sync(path)
        aside.replace(folder)
        jobs.sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.writing-{uuid.uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}.writing-*"):  # of an export that was killed
            shutil.rmtree(left)
        aside.mkdir()
    except OSError as error:
        raise ConfigError(f"export: cannot write {folder}: {error.strerror}") from None
    return aside


def _finished(folder: Path, form: str, asked: dict[str, Any]) -> bool:
    """Return whether a folder holds this very export, every file as it was written."""
    try:
        record = Record.model_validate(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    same = (record.form, record.asked) == (form, asked)
    return same and record.files == fingerprint.manifest(folder, skip=[RECORD])
