"""Where the files of a registry lie: a folder on a disk, or a prefix in an object store.

    local.py     a local or shared disk: written aside, synced, renamed; locked by flock
    remote.py    any fsspec URL, such as s3://bucket/prefix: everything first, the manifest last; locked by a lease
    locking.py   who holds a lock, and waiting for it

What a reader sees is the old state or the new one, in both. docs/registry.md says where their guarantees differ.
"""

import re
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Protocol

from preference_tuning.errors import ConfigError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PART = re.compile(r"[^\\/\x00-\x1f\x7f]+")


class Storage(Protocol):
    """Files below one root. Names are relative to it, with slashes; those of hidden files are the storage's own.

    A name that could lead out of the root is a ConfigError everywhere.
    """

    @property
    def place(self) -> str:
        """The root, for messages."""

    @property
    def local(self) -> Path:
        """The root on this machine: the folder itself, or where copies lie."""

    def read(self, name: str) -> bytes | None:
        """Return a file, or None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that a reader finds the old one or the new one."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one, whole or not at all, and return whether it was written."""

    def swap(self, name: str, before: bytes | None, after: bytes) -> bool:
        """Write a file if it is still as it was (None: not there), and return whether it was written."""

    def names(self, folder: str, holding: str | None = None) -> list[str]:
        """Return the names in a folder, sorted; with ``holding`` those of the folders that hold such a file."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every file below a folder, by its name from there."""

    def aside(self, name: str) -> Path:
        """Return an empty folder on this machine in which ``name`` can be prepared; needs the lock."""

    def publish(self, aside: Path, name: str, last: str) -> None:
        """Put a prepared folder in its place: readers find all of it or nothing. Needs the lock.

        Args:
            aside: from ``aside``; it is used up.
            name: of the new folder.
            last: its manifest; a folder without it does not exist.
        """

    def folder(self, name: str, fresh: bool = False) -> Path:
        """Return a folder as it can be read here.

        Args:
            name: of the folder; what does not exist has a path too.
            fresh: look at the store again, although this process has a copy.
        """

    def remove(self, name: str, last: str) -> None:
        """Remove a folder: readers find all of it or nothing. Needs the lock; ``last`` is its manifest.

        Without one ("") it goes file by file, and readers may find some of it.
        """

    def lock(self, folder: str) -> AbstractContextManager[None]:
        """Hold the lock of a folder (of this root with ""), after clearing what killed writers left in it.

        Raises:
            ConfigError: it cannot be written or locked.
            TransientError: another process holds it for too long.
        """

    def check(self, folder: str) -> None:
        """Try whether a folder can be written and locked, leaving no trace.

        Raises:
            ConfigError: it cannot.
        """


def at(folder: str) -> Storage:
    """Return the storage of ``registry.folder``; nothing is read or written yet.

    Raises:
        ConfigError: a URL that nothing here can open.
    """
    if _URL.match(folder):
        from preference_tuning.registry.storage.remote import RemoteStorage

        return RemoteStorage(folder)
    from preference_tuning.registry.storage.local import LocalStorage

    return LocalStorage(Path(folder).expanduser().absolute())


def checked(name: str) -> str:
    """Return a name as it is, if it stays below the folder that it is relative to.

    Raises:
        ConfigError: it is absolute, has ``..`` in it, or characters that mean something to a path or URL.
    """
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or any(p in (".", "..") or not _PART.fullmatch(p) for p in parts):
        raise ConfigError(f"registry: {name!r} is not a name that a file in a registry can have")
    return name
