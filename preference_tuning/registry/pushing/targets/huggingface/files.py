"""What a repository should hold: files with their hashes, and the index that says which of its files are ours."""

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from preference_tuning import fingerprint, progress
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry import contents
from preference_tuning.registry.folder import Version

INDEX = "preference-tuning.json"
"""Lies in every repository that we push to, and lists our files in it."""
FORMAT = "preference-tuning version"
SHOWN_FROM = 50_000_000


class Remote(Protocol):
    """A file in a repository, as huggingface_hub describes it (``RepoFile``)."""

    path: str
    size: int
    blob_id: str
    lfs: Any


Tree = Mapping[str, Remote]


@dataclass(frozen=True)
class File:
    """A file that is to be in a repository; small ones that are made here bring their bytes."""

    source: Path | bytes
    size: int
    sha256: str

    @functools.cached_property
    def blob_id(self) -> str:
        """The name that git gives to the content."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    def is_at(self, remote: Remote) -> bool:
        """Whether a file in a repository has the same bytes: large files are known by their sha256, others by git's."""
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.sha256 and remote.size == self.size)
        return remote.size == self.size and remote.blob_id == self.blob_id

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[io.BufferedIOBase]:
        """Open it to be sent; what takes long shows how far it is.

        A stream and no path: huggingface_hub sends streams by git LFS over HTTP, paths by Xet, which hubs of one's own
        lack, and which waits and tries again by rules of its own.
        """
        if isinstance(self.source, bytes):
            yield io.BytesIO(self.source)
        elif self.size < SHOWN_FROM:
            with self.source.open("rb") as stream:
                yield stream
        else:
            with progress.bar(name, self.size, unit="B") as bar, _Shown(self.source, bar) as shown:
                yield shown


class _Shown(io.BufferedReader):
    """A file whose bar follows how far it was read."""

    def __init__(self, path: Path, bar: Any) -> None:
        super().__init__(io.FileIO(path))
        self._bar = bar

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and move the bar."""
        found = super().read(size)
        self._bar.update(self.tell() - self._bar.n)
        return found


def of_folder(folder: Path, version: Version) -> dict[str, File]:
    """Return the files of a model's folder and their index, by the paths that they will have.

    Raises:
        PreferenceTuningError: there are files that are never published.
    """
    if refused := contents.problems(folder, {}):
        raise PreferenceTuningError(f"nothing is pushed: {'; '.join(refused)}")
    found = fingerprint.manifest(folder)
    files = {name: File(folder / name, entry["bytes"], entry["sha256"]) for name, entry in found.items()}
    return {**files, INDEX: _index(found, version)}


def _index(files: dict[str, dict[str, Any]], version: Version) -> File:
    document = {"format": FORMAT, "name": version.name, "version": version.id, "files": files}
    content = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
    return File(content, len(content), hashlib.sha256(content).hexdigest())


def listed(index: str) -> set[str]:
    """Return the files that an index says are ours, itself included; none if it is no index of ours."""
    try:
        document = json.loads(index)
    except ValueError:
        return set()
    if not isinstance(document, dict) or document.get("format") != FORMAT or not isinstance(document["files"], dict):
        return set()
    return {*document["files"], INDEX}


def differences(tree: Tree, files: Mapping[str, File]) -> list[str]:
    """Return what a repository lacks of the files or has otherwise, a line for each."""
    return [
        f"{name} is missing" if name not in tree else f"{name} has other bytes"
        for name, file in files.items()
        if name not in tree or not file.is_at(tree[name])
    ]


def changed(before: Tree, now: Tree, names: Iterable[str]) -> list[str]:
    """Return which of the names have other content in one tree than in the other, or are in one alone."""

    def content(tree: Tree, name: str) -> Any:
        return tree[name].blob_id if name in tree else None

    return sorted(name for name in names if content(before, name) != content(now, name))
