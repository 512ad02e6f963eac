"""What a version and a later decision on it say of themselves, and what their files are known by."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from preference_tuning import fingerprint
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry import storage

MANIFEST, DECISION, CARD = "manifest.json", "decision.json", "README.md"
CHARTS = "charts/"
"""The card's charts, beside it."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""What an id may look like, before it becomes part of a path."""


class Version(BaseModel):
    """The manifest of a version."""

    id: str
    name: str
    created: datetime
    model_files: dict[str, dict[str, Any]]
    evidence_files: dict[str, dict[str, Any]]
    finetuning_type: Literal["sft", "dpo"]
    base_model: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    code: str
    metrics: dict[str, Any]
    verdict: Verdict
    run: dict[str, str]
    licence: str | None = None
    """As the hub calls it; None: not known."""
    software: dict[str, str | bool | None] = {}
    """What made it: versions, the commit of this project, and whether files of it were changed (``modified``)."""
    links: dict[str, str] = {}
    """Where more is to be seen: the run in ZenML, the experiment in Comet."""
    seal: str | None = None
    """Hash over the other fields; None in versions from before there was one."""


class Decision(BaseModel):
    """The manifest of an evaluation that came after a version was published."""

    version: str
    created: datetime
    evidence_files: dict[str, dict[str, Any]]
    config: dict[str, Any]
    seal: str
    """Of the evaluation."""
    verdict: Verdict


def read_version(text: str, id: str) -> Version:
    """Return what the manifest of a version says.

    Raises:
        PreferenceTuningError: it is not one of ours, or that of another version.
        ConfigError: it lists a file that would lie elsewhere.
    """
    try:
        version = Version.model_validate_json(text)
    except ValidationError as error:
        raise PreferenceTuningError(f"registry: {MANIFEST} of {id} cannot be read: {_first(error)}") from None
    for name in (*version.model_files, *version.evidence_files):
        storage.checked(name)
    if version.id != id:
        raise PreferenceTuningError(f"registry: the folder of version {id} holds version {version.id}")
    return version


def read_decision(text: str, name: str) -> Decision:
    """Return what the manifest of a decision says; ``name`` is its folder's.

    Raises:
        PreferenceTuningError: it is not one of ours.
    """
    try:
        return Decision.model_validate_json(text)
    except ValidationError as error:
        raise PreferenceTuningError(f"registry: {DECISION} of {name} cannot be read: {_first(error)}") from None


def checked_id(id: str) -> str:
    """Return an id as it is, if it can be one.

    Raises:
        ConfigError: it cannot, so that no path or URL is made of it.
    """
    if not ID.fullmatch(id):
        raise ConfigError(f"registry: {id!r} cannot be the id of a version")
    return id


def version_id(model: Path) -> str:
    """Return the id of the version that the model in a folder is or would be; its card is no part of it."""
    return weights_hash(model)[:16]


def weights_hash(model: Path) -> str:
    """Return the hash of a model's folder as training left it, without the card that publishing adds."""
    files = fingerprint.manifest(model, skip=[CARD])
    return fingerprint.of_value({name: file for name, file in files.items() if not name.startswith(CHARTS)})


def differences(folder: Path, listed: dict[str, dict[str, Any]]) -> list[str]:
    """Return what differs from a list of files, a line for each; names begin with that of the folder."""
    found, part = fingerprint.manifest(folder), folder.name
    return [
        *(f"{part}/{name} is missing" for name in listed if name not in found),
        *(f"{part}/{name} is not part of it" for name in found if name not in listed),
        *(f"{part}/{name} was changed" for name in listed if found.get(name, listed[name]) != listed[name]),
    ]


def seal_of(document: dict[str, Any]) -> str:
    """Return the hash of a manifest without its seal."""
    return fingerprint.of_value({name: value for name, value in document.items() if name != "seal"})


def decision_id(version: str, seal: str) -> str:
    """Return the id of a decision, by the seal of its evaluation."""
    return checked_id(f"{version}-{seal[:16]}")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
