"""The registry: content-addressed versions, complete or absent, and the champion as a pointer file.

    registry.json                              marks the folder as ours
    <name>/versions/<id>/model/                adapter or full model, tokenizer, chat template, model card
    <name>/versions/<id>/evidence/             reports, records, metrics, scores, the data's manifest
    <name>/versions/<id>/manifest.json         hashes of every file, figures, verdict, provenance
    <name>/decisions/<id>-<seal>/              later evaluations of a version, with the verdict of each
    <name>/receipts/<id>/                      how far its pushes came
    <name>/champion.json  previous.json        pointers, replaced in one step; history/ has every change

It lies in a folder or in an object store (``storage``). A version's id is a hash of the model's files, so publishing
the same model again changes nothing. So is a decision. Whoever changes something holds the lock of the name.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.config import RegistryConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry import contents, storage
from preference_tuning.registry.pointers import ANYONE, Anyone, Champion, Change, How, Pointer, Pointers
from preference_tuning.registry.versions import (
    CARD,
    DECISION,
    ID,
    MANIFEST,
    Decision,
    Version,
    checked_id,
    decision_id,
    differences,
    read_decision,
    read_version,
    seal_of,
    version_id,
    weights_hash,
)

# What callers of a registry speak of.
__all__ = [
    "CARD",
    "DECISION",
    "MANIFEST",
    "Champion",
    "Decision",
    "FolderRegistry",
    "Version",
    "differences",
    "version_id",
    "weights_hash",
]

MARK = "registry.json"
FORMAT = {"format": "preference-tuning registry", "version": 1}


class FolderRegistry:
    """The versions of one name in a registry."""

    def __init__(self, config: RegistryConfig) -> None:
        """Open the registry; nothing is written before something is published.

        Raises:
            ConfigError: the folder holds something else, or is not a folder, or cannot be reached.
        """
        self.storage = storage.at(config.folder)
        self.name = config.name
        self.pointers = Pointers(self.storage, self.name)
        self._marked = self._check_ours()

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return self.storage.place

    @property
    def root(self) -> Path:
        """The registry on this machine: the folder, or where copies of a remote one lie."""
        return self.storage.local

    @property
    def folder(self) -> Path:
        """The folder of this name in ``root``."""
        return self.root / self.name

    def path(self, version: str) -> Path:
        """Return the folder of a version, to be read; of a remote registry a copy."""
        return self.storage.folder(self._at("versions", checked_id(version)))

    def decision(self, version: str, seal: str) -> Path:
        """Return the folder of a later decision on a version, by the seal of its evaluation."""
        return self.storage.folder(self._at("decisions", decision_id(version, seal)))

    def find(self, name: str) -> str | None:
        """Return the id of the version that is meant by ``champion``, ``previous``, an id or the beginning of one.

        Raises:
            ConfigError: several ids begin so.
        """
        pointers = {"champion": self.champion, "previous": self.previous}
        if name in pointers:
            pointer = pointers[name]()
            return pointer.version if pointer else None
        found = [version for version in self.ids() if name and version.startswith(name)]
        if len(found) > 1:
            raise ConfigError(f"registry: {name!r} is the beginning of several versions: {', '.join(found)}")
        return found[0] if found else None

    def ids(self) -> list[str]:
        """Return the ids of all versions."""
        return list(filter(ID.fullmatch, self.storage.names(self._at("versions"), holding=MANIFEST)))

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder of this name, such as ``receipts``."""
        return self.storage.names(self._at(folder))

    def read(self, name: str) -> str | None:
        """Return a small file of this name's folder, such as a receipt, or None if there is none."""
        content = self.storage.read(self._at(name))
        return None if content is None else content.decode("utf-8")

    def write(self, name: str, text: str) -> None:
        """Write a small file of this name's folder so that a reader finds the old one or the new one."""
        with self.exclusive():
            self.storage.write(self._at(name), text.encode("utf-8"))

    def check_writable(self) -> None:
        """Make sure that a version could be written here, leaving no trace.

        Raises:
            ConfigError: it could not.
        """
        self.storage.check(self.name)

    def champion(self) -> Champion | None:
        """Return the pointer to the champion, or None if nothing was promoted yet."""
        return self.pointers.champion()

    def previous(self) -> Pointer | None:
        """Return the pointer to the champion before, or None if there was none."""
        return self.pointers.previous()

    def history(self) -> list[Change]:
        """Return every change of the champion, the first one first."""
        return self.pointers.history()

    def version(self, id: str) -> Version:
        """Return the manifest of a version.

        Raises:
            PreferenceTuningError: there is no such version, or its manifest is not one of ours.
        """
        return read_version(self._manifest(id), id)

    def decisions(self, version: str) -> list[Decision]:
        """Return the later decisions on a version, the oldest first."""
        folders = self.storage.names(self._at("decisions"), holding=DECISION)
        found = [name for name in folders if name.startswith(f"{version}-")]
        read = [read_decision(self.read(f"decisions/{name}/{DECISION}") or "", name) for name in found]
        return sorted(read, key=lambda decision: decision.created)

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
        with self.exclusive():
            if new in self.ids():
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
        place = self._at("decisions", decision_id(version, seal))
        with self.exclusive():
            if self.storage.read(f"{place}/{DECISION}") is None:
                aside = self._aside(place, evidence)
                decision = Decision(
                    version=version,
                    created=datetime.now(UTC),
                    evidence_files=fingerprint.manifest(aside / "evidence"),
                    config=config,
                    seal=seal,
                    verdict=verdict,
                )
                self._put(aside, place, DECISION, decision)
        return self.storage.folder(place)

    def promote(
        self,
        id: str,
        seal: str | None = None,
        expected: str | Anyone | None = ANYONE,
        how: How = "verdict",
        reason: str | None = None,
    ) -> None:
        """Make a version the champion; the one before becomes the previous one.

        Args:
            id: of the version.
            seal: of the evaluation whose verdict this is.
            expected: the champion that the verdict was made against; None: none reigned.
            how: and ``reason``: for the history.
            reason: in words.

        Raises:
            OvertakenError: another champion reigns than the expected one; nothing is changed.
            PreferenceTuningError: there is no such version, or its files are not what was published.
        """
        if problems := self.verify(id):
            raise PreferenceTuningError(f"registry: version {id} is not promoted: {'; '.join(problems)}")
        with self.exclusive():
            self._manifest(id)  # it may have been removed since
            self.pointers.move(id, how, seal, reason, expected)

    def rollback(self, reason: str | None = None) -> Champion:
        """Make the previous champion the champion again, and this one the previous one, and return the pointer.

        Raises:
            ConfigError: there is no previous one.
            OvertakenError: another process changed the champion meanwhile.
            PreferenceTuningError: its files are not what was published.
        """
        now, previous = self.champion(), self.previous()
        if now is None or previous is None:
            raise ConfigError(f"registry: {self.name!r} in {self.place} has no previous champion")
        if problems := self.verify(previous.version):
            raise PreferenceTuningError(
                f"registry: version {previous.version} does not become champion again: {'; '.join(problems)}"
            )
        with self.exclusive():
            self._manifest(previous.version)
            return self.pointers.move(previous.version, "rollback", previous.seal, reason, now.version)

    def taken_back(self, id: str) -> Change | None:
        """Return the rollback that ended a version's time as champion, if nobody has promoted it since."""
        last = [change for change in self.history() if id in (change.before, change.after)][-1:]
        return last[0] if last and last[0].how == "rollback" and last[0].before == id else None

    def verify(self, id: str) -> list[str]:
        """Return what differs from the manifest of a version, a line for each file; nothing if all is as published."""
        version, document = self.version(id), json.loads(self._manifest(id))
        folder = self.storage.folder(self._at("versions", id), fresh=True)
        problems = []
        if version.seal is not None and version.seal != seal_of(document):
            problems.append(f"{MANIFEST} was changed")
        for part, listed in (("model", version.model_files), ("evidence", version.evidence_files)):
            problems += differences(folder / part, listed)
        return problems

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock of this name: nobody else changes anything, and what killed writers left is put right.

        Raises:
            ConfigError: nothing can be written there.
            TransientError: somebody else holds it for too long.
            PreferenceTuningError: writing failed, as on a full disk.
        """
        try:
            if not self._marked:
                with self.storage.lock(""):
                    self.storage.create(MARK, json.dumps(FORMAT, indent=2).encode() + b"\n")
                self._marked = True
            with self.storage.lock(self.name):
                self.pointers.complete()
                yield
        except OSError as error:
            said = error.strerror or str(error)
            raise PreferenceTuningError(
                f"registry: cannot write {self.place}: {said}; nothing is half published, the same command completes it"
            ) from error

    def _at(self, *parts: str) -> str:
        return "/".join((self.name, *parts))

    def _manifest(self, id: str) -> str:
        text = self.read(f"versions/{checked_id(id)}/{MANIFEST}")
        if text is None:
            raise PreferenceTuningError(f"registry: no version {id!r} of {self.name!r} in {self.place}")
        return text

    def _write(
        self, id: str, model: Path, evidence: dict[str, Path], card: Mapping[str, str], facts: dict[str, Any]
    ) -> Version:
        aside = self._aside(self._at("versions", id), evidence)
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
        sealed = version.model_copy(update={"seal": seal_of(json.loads(version.model_dump_json()))})
        self._put(aside, self._at("versions", id), MANIFEST, sealed)
        return sealed

    def _aside(self, place: str, evidence: dict[str, Path]) -> Path:
        """Return a new folder for what is to be put in a place, with a copy of the evidence."""
        aside = self.storage.aside(place)
        for name, folder in evidence.items():
            shutil.copytree(folder, aside / "evidence" / name)
        return aside

    def _put(self, aside: Path, place: str, name: str, manifest: BaseModel) -> None:
        """Complete what was written aside by its manifest, and put it in place in one step."""
        (aside / name).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        self.storage.publish(aside, place, name)

    def _check_ours(self) -> bool:
        """Return whether the mark is there already."""
        mark = self.storage.read(MARK)
        if mark is None:
            if not self.storage.names(""):
                return False
            # Another process may have begun the registry between the two looks.
            mark = self.storage.read(MARK)
        if mark is None:
            raise ConfigError(
                f"registry.folder: {self.place} holds files that are not a registry of ours (it has no {MARK}); "
                "name an empty or a new folder"
            )
        try:
            found = json.loads(mark)
        except ValueError:
            found = None
        if found != FORMAT:
            raise ConfigError(f"registry.folder: {self.place} is a registry of another kind: {found!r}")
        return True
