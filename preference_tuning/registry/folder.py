"""The folder registry: content-addressed versions, complete or absent, and the champion as a pointer file.

    <folder>/registry.json                              marks the folder as ours
    <folder>/<name>/versions/<id>/model/                adapter or full model, tokenizer, chat template, model card
    <folder>/<name>/versions/<id>/evidence/             reports, records, metrics, scores, the data's manifest
    <folder>/<name>/versions/<id>/manifest.json         hashes of every file, figures, verdict, provenance
    <folder>/<name>/decisions/<id>-<seal>/              later evaluations of a version, with the verdict of each
    <folder>/<name>/champion.json  previous.json        pointers, replaced in one step

A version is written aside, synced and renamed; its id is a hash of the model's files, so publishing the same model
again changes nothing. So is a decision.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import RegistryConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry import contents

MARK, MANIFEST, CHAMPION, PREVIOUS = "registry.json", "manifest.json", "champion.json", "previous.json"
DECISION, CARD = "decision.json", "README.md"
FORMAT = {"format": "preference-tuning registry", "version": 1}
CHARTS = "charts/"
"""The card's charts, beside it."""


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


class Champion(BaseModel):
    """The pointer to the version in use."""

    version: str
    since: datetime
    seal: str | None = None
    """Of the evaluation whose verdict promoted it."""


class FolderRegistry:
    """The versions of one name in a registry folder."""

    def __init__(self, config: RegistryConfig) -> None:
        """Open the registry; nothing is written before something is published.

        Raises:
            ConfigError: the folder holds something else, or is not a folder.
        """
        self.root = Path(config.folder).expanduser().absolute()
        self.name = config.name
        self._check_ours()

    @property
    def folder(self) -> Path:
        """The folder of this name."""
        return self.root / self.name

    def path(self, version: str) -> Path:
        """Return the folder of a version."""
        return self.folder / "versions" / version

    def decision(self, version: str, seal: str) -> Path:
        """Return the folder of a later decision on a version, by the seal of its evaluation."""
        return self.folder / "decisions" / f"{version}-{seal[:16]}"

    def find(self, name: str) -> str | None:
        """Return the id of the version that is meant by ``champion``, ``previous``, an id or the beginning of one.

        Raises:
            ConfigError: several ids begin so.
        """
        pointers = {"champion": self.champion, "previous": self.previous}
        if name in pointers:
            pointer = pointers[name]()
            return pointer.version if pointer else None
        found = [version for version in self.ids() if version.startswith(name)]
        if len(found) > 1:
            raise ConfigError(f"registry: {name!r} is the beginning of several versions: {', '.join(found)}")
        return found[0] if found else None

    def ids(self) -> list[str]:
        """Return the ids of all versions."""
        return sorted(path.parent.name for path in self.folder.glob(f"versions/[!.]*/{MANIFEST}"))

    def read(self, name: str) -> str | None:
        """Return a small file of this name's folder, such as a receipt, or None if there is none."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def write(self, name: str, text: str) -> None:
        """Write a small file of this name's folder so that a reader finds the old one or the new one."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        jobs.write_text(path, text)

    def check_writable(self) -> None:
        """Make sure that a version could be written here, leaving no trace if nothing was here before.

        Raises:
            ConfigError: it could not.
        """
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"registry.folder: cannot write {self.root}: no permission in {there}")

    def champion(self) -> Champion | None:
        """Return the pointer to the champion, or None if nothing was promoted yet."""
        return self._pointer(CHAMPION)

    def previous(self) -> Champion | None:
        """Return the pointer to the champion before, or None if there was none."""
        return self._pointer(PREVIOUS)

    def _pointer(self, name: str) -> Champion | None:
        path = self.folder / name
        return Champion.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def version(self, id: str) -> Version:
        """Return the manifest of a version.

        Raises:
            PreferenceTuningError: there is no such version.
        """
        path = self.path(id) / MANIFEST
        if not path.is_file():
            raise PreferenceTuningError(f"registry: no version {id!r} of {self.name!r} in {self.root}")
        return Version.model_validate_json(path.read_text(encoding="utf-8"))

    def publish(
        self, model: Path, evidence: dict[str, Path], card: Mapping[str, str], facts: dict[str, Any]
    ) -> Version:
        """Store a result as a version and return it; the version that already holds this model, if one does.

        Args:
            model: folder of the adapter or full model, its tokenizer and template.
            evidence: folders to keep beside it, by name.
            card: the model card and its charts, by the name that each gets in the model's folder.
            facts: the other fields of ``Version``.

        Raises:
            PreferenceTuningError: the model holds files that must not be published, or cannot be written.
        """
        if refused := contents.problems(model, evidence):
            raise PreferenceTuningError(f"registry: nothing is published: {'; '.join(refused)}")
        new = version_id(model)
        with self._lock():
            self._clear_leftovers()
            if (self.path(new) / MANIFEST).is_file():
                return self.version(new)
            return self._write(new, model, evidence, card, facts)

    def keep_decision(
        self, version: str, evidence: dict[str, Path], config: dict[str, Any], seal: str, verdict: Verdict
    ) -> Path:
        """Store a later evaluation of a version beside it, whole or not at all, and return its folder.

        Args:
            version: id of a published version.
            evidence: folders to keep, by name.
            config: of the run that evaluated it.
            seal: of the evaluation.
            verdict: on the version.
        """
        folder = self.decision(version, seal)
        with self._lock():
            self._clear_leftovers()
            if (folder / DECISION).is_file():
                return folder
            aside = self._aside("decisions", evidence)
            decision = Decision(
                version=version,
                created=datetime.now(UTC),
                evidence_files=fingerprint.manifest(aside / "evidence"),
                config=config,
                seal=seal,
                verdict=verdict,
            )
            _put(aside, folder, DECISION, decision)
        return folder

    def promote(self, id: str, seal: str | None = None) -> None:
        """Make a version the champion; the one before becomes the previous one.

        Args:
            id: of the version.
            seal: of the evaluation whose verdict this is.

        Raises:
            PreferenceTuningError: there is no such version, or its files are not what was published.
        """
        if problems := self.verify(id):
            raise PreferenceTuningError(f"registry: version {id} is not promoted: {'; '.join(problems)}")
        with self._lock():
            current = self.champion()
            if current and current.version == id:
                return
            if current:
                jobs.write_text(self.folder / PREVIOUS, current.model_dump_json(indent=2) + "\n")
            pointer = Champion(version=id, since=datetime.now(UTC), seal=seal)
            jobs.write_text(self.folder / CHAMPION, pointer.model_dump_json(indent=2) + "\n")
            jobs.sync(self.folder)

    def verify(self, id: str) -> list[str]:
        """Return what differs from the manifest of a version, a line for each file; nothing if all is as published."""
        version, folder = self.version(id), self.path(id)
        problems = []
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if version.seal is not None and version.seal != _seal_of(document):
            problems.append(f"{MANIFEST} was changed")
        for part, listed in (("model", version.model_files), ("evidence", version.evidence_files)):
            problems += differences(folder / part, listed)
        return problems

    def _write(
        self, id: str, model: Path, evidence: dict[str, Path], card: Mapping[str, str], facts: dict[str, Any]
    ) -> Version:
        aside = self._aside("versions", evidence)
        shutil.copytree(model, aside / "model")
        for name, text in card.items():
            (aside / "model" / name).parent.mkdir(exist_ok=True)
            (aside / "model" / name).write_text(text, encoding="utf-8")
        version = Version(
            id=id,
            name=self.name,
            created=datetime.now(UTC),
            model_files=fingerprint.manifest(aside / "model"),
            evidence_files=fingerprint.manifest(aside / "evidence"),
            **facts,
        )
        # Of the values as they are read again: JSON has no nan.
        sealed = version.model_copy(update={"seal": _seal_of(json.loads(version.model_dump_json()))})
        _put(aside, self.path(id), MANIFEST, sealed)
        return sealed

    def _aside(self, kind: str, evidence: dict[str, Path]) -> Path:
        """Return a new folder beside those of its kind, with a copy of the evidence."""
        aside = self.folder / kind / f".writing-{uuid.uuid4().hex}"
        for name, folder in evidence.items():
            shutil.copytree(folder, aside / "evidence" / name)
        aside.mkdir(parents=True, exist_ok=True)
        return aside

    def _clear_leftovers(self) -> None:
        for path in self.folder.glob("*/.writing-*"):
            shutil.rmtree(path)

    def _check_ours(self) -> None:
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ConfigError(f"registry.folder: {self.root} is a file, not a folder")
        mark = self.root / MARK
        if mark.is_file():
            try:
                found = json.loads(mark.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != FORMAT:
                raise ConfigError(f"registry.folder: {self.root} is a registry of another kind: {found!r}")
        elif any(self.root.iterdir()):
            raise ConfigError(
                f"registry.folder: {self.root} holds files that are not a registry of ours (it has no {MARK}); "
                "name an empty or a new folder"
            )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            (self.folder / "versions").mkdir(parents=True, exist_ok=True)
            if not (self.root / MARK).is_file():
                jobs.write_json(self.root / MARK, FORMAT)
            stream = (self.folder / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"registry.folder: cannot write {self.root}: {error.strerror}") from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


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


def _seal_of(document: dict[str, Any]) -> str:
    """Return the hash of a manifest without its seal."""
    return fingerprint.of_value({name: value for name, value in document.items() if name != "seal"})


def _put(aside: Path, folder: Path, name: str, manifest: BaseModel) -> None:
    """Complete what was written aside by its manifest, sync it and put it in place in one step."""
    (aside / name).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in sorted(aside.rglob("*")):
        jobs.sync(path)
    jobs.sync(aside)
    aside.rename(folder)
    jobs.sync(folder.parent)
