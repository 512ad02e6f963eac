"""A registry in an object store, through fsspec; the only module that knows it.

A store has no rename. A folder exists once its manifest does, which is written last and removed first; what is begun is
noted beforehand, so that the next writer can clear what a killed one left. On S3 every decision is a conditional write
(If-Match, If-None-Match). Other stores have only what fsspec offers for all: an exclusive creation.

What is read as files is copied to this machine, each file once for each content (by ETag), and hashed there.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from preference_tuning import fingerprint, jobs
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.registry.storage import checked
from preference_tuning.registry.storage.lease import Lease

LOCK, BEGUN, COPIES = ".lock", ".begun", ".copies.json"
CONDITIONAL = ("s3", "s3a")
"""Protocols whose writes take a condition on what they replace."""


class RemoteStorage:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        """Take the URL.

        Raises:
            ConfigError: what opens it is not installed, or nothing does.
        """
        self.place = url.rstrip("/")
        server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self.local = _copies() / fingerprint.of_value([self.place, server])[:16]
        self._lease: Lease | None = None
        self._looked_at: set[str] = set()
        protocol = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.url_to_fs(self.place, use_listings_cache=False)
        except ImportError as error:
            extra = "; install the s3 extra: pip install 'preference-tuning[s3]'" if protocol in CONDITIONAL else ""
            raise ConfigError(f"registry.folder: {self.place} cannot be opened: {error}{extra}") from None
        except ValueError as error:
            raise ConfigError(f"registry.folder: {self.place} cannot be opened: {error}") from None
        self._conditional = protocol in CONDITIONAL

    def read(self, name: str) -> bytes | None:
        """See ``Storage``."""
        content: bytes | None = self._ask("cat_file", self._at(name), missing=None)
        return content

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage``; one PUT."""
        self._guard()
        self._ask("pipe_file", self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """See ``Storage``; If-None-Match."""
        return self._wrote(name, content, mode="create")

    def swap(self, name: str, before: bytes | None, after: bytes) -> bool:
        """See ``Storage``; If-Match on S3, elsewhere only as good as the lock."""
        if before is None:
            return self.create(name, after)
        info = self._ask("info", self._at(name), missing=None)
        if info is None or self.read(name) != before:
            return False
        return self._wrote(name, after, **({"IfMatch": info["ETag"]} if self._conditional else {}))

    def names(self, folder: str, holding: str | None = None) -> list[str]:
        """See ``Storage``."""
        if holding is None:
            paths = self._ask("ls", self._at(folder), missing=[], detail=False)
            found = {path.rstrip("/").removeprefix(f"{self._at(folder)}/") for path in paths}
        else:
            parts = [name.split("/") for name in self._listed(folder)]
            found = {part[0] for part in parts if part[1:] == [holding]}
        return sorted(name for name in found if name and name[0] != "." and "/" not in name)

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        return {name: int(info["size"]) for name, info in self._listed(folder).items()}

    def aside(self, name: str) -> Path:
        """See ``Storage``; among the copies, of which it becomes one."""
        aside = self.local / checked(name).partition("/")[0] / f".writing-{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        return aside

    def publish(self, aside: Path, name: str, last: str) -> None:
        """See ``Storage``; all files, then the manifest."""
        note = self._begin(name, last)
        self._clear(name)
        files = fingerprint.manifest(aside)
        for relative in sorted(files, key=lambda relative: relative == last):
            self._guard()
            how = {"mode": "create"} if relative == last else {}
            self._ask("put_file", str(aside / relative), self._at(f"{name}/{relative}"), **how)
        self._ask("rm_file", self._at(note))
        with self._copying():
            copy = self.local / name
            shutil.rmtree(copy, ignore_errors=True)
            copy.parent.mkdir(parents=True, exist_ok=True)
            aside.rename(copy)
            marks = {relative: _mark(info) for relative, info in self._listed(name).items()}
            known = {relative: [mark, files[relative]["sha256"]] for relative, mark in marks.items()}
            jobs.write_json(_book(copy), known)
        self._looked_at.add(name)

    def folder(self, name: str, fresh: bool = False) -> Path:
        """See ``Storage``; a copy that equals what lies in the store, file by file."""
        copy = self.local / checked(name)
        if fresh or name not in self._looked_at:
            with self._copying():
                self._copy(name, copy)
            self._looked_at.add(name)
        return copy

    def remove(self, name: str, last: str) -> None:
        """See ``Storage``; the manifest, then all files."""
        note = self._begin(name, last)
        self._guard()
        if last:
            self._ask("rm_file", self._at(f"{name}/{last}"), missing=None)
        self._clear(name)
        self._ask("rm_file", self._at(note))
        with self._copying():
            self._looked_at.discard(name)
            shutil.rmtree(self.local / name, ignore_errors=True)
            _book(self.local / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, folder: str) -> Iterator[None]:
        """See ``Storage``; an object with a lease."""
        lock = f"{folder}/{LOCK}" if folder else LOCK
        with Lease(self, lock, f"{self.place}/{folder}".rstrip("/")) as self._lease:
            try:
                self._finish(folder)
                yield
            finally:
                self._lease = None

    def check(self, folder: str) -> None:
        """See ``Storage``; an object is made, made again (which must fail), read and removed."""
        name = f"{folder}/.trying-{uuid.uuid4().hex}"
        try:
            self.create(name, b"1")
            exclusive = not self.create(name, b"2")
            kept = self.read(name)
            self._ask("rm_file", self._at(name))
        except PreferenceTuningError as error:
            raise ConfigError(f"registry.folder: cannot write {self.place}: {error}") from None
        if not exclusive or kept != b"1":
            raise ConfigError(
                f"registry.folder: {self.place} overwrites an object although it was told not to (If-None-Match), so "
                "that two runs at once would destroy each other's work"
            )

    def _at(self, name: str) -> str:
        # Hidden names are the storage's own, but a name from outside may lead nowhere else either.
        return f"{self._root}/{checked(name)}" if name else self._root

    def _listed(self, folder: str) -> dict[str, dict[str, Any]]:
        """Return every file below a folder: one request for a thousand of them."""
        start = f"{self._at(folder)}/"
        found = self._ask("find", start, missing={}, detail=True)
        # A key may have any characters; a name that leads elsewhere ends here.
        return {checked(path.removeprefix(start)): info for path, info in sorted(found.items()) if path != start}

    def _wrote(self, name: str, content: bytes, **condition: str) -> bool:
        self._guard()
        try:
            self._fs.pipe_file(self._at(name), content, **condition)
        except Exception as error:
            if not _refused(error):
                raise _said(error, self.place) from error
            # A write that arrived, whose answer was lost, is repeated by the client and refused then.
            return self.read(name) == content
        return True

    def _ask(self, method: str, *what: Any, missing: Any = ..., **how: Any) -> Any:
        """Return what the store answers, or ``missing`` if there is no such object."""
        try:
            return getattr(self._fs, method)(*what, **how)
        except Exception as error:
            if missing is not ... and isinstance(error, FileNotFoundError) and not _no_bucket(error):
                return missing
            raise _said(error, self.place) from error

    def _guard(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _begin(self, name: str, last: str) -> str:
        """Note what is begun, before any of it is done; return where the note lies."""
        note = f"{name.partition('/')[0]}/{BEGUN}/{fingerprint.of_value(name)[:16]}.json"
        self.write(note, json.dumps({"name": name, "last": last}).encode())
        return note

    def _finish(self, folder: str) -> None:
        """Clear what killed writers began: a folder without its manifest, and what was prepared here."""
        for name in self._listed(f"{folder}/{BEGUN}") if folder else ():
            note = f"{folder}/{BEGUN}/{name}"
            begun = json.loads(self.read(note) or b"{}")
            if begun and (not begun["last"] or self.read(f"{begun['name']}/{begun['last']}") is None):
                self._clear(begun["name"])
            self._ask("rm_file", self._at(note))
        for path in (self.local / folder).glob(".writing-*") if folder else ():
            shutil.rmtree(path)

    def _clear(self, name: str) -> None:
        for relative in self._listed(name):
            self._guard()
            self._ask("rm_file", self._at(f"{name}/{relative}"))
        if not self._conditional:  # a store with folders
            self._ask("rm", self._at(name), missing=None, recursive=True)

    def _copy(self, name: str, copy: Path) -> None:
        found, book = self._listed(name), _book(copy)
        known = json.loads(book.read_text(encoding="utf-8")) if book.is_file() else {}
        for relative, info in found.items():
            path = copy / relative
            held = fingerprint.of_file(path) if path.is_file() else None
            if held is None or known.get(relative) != [_mark(info), held]:
                known[relative] = [_mark(info), self._fetch(f"{name}/{relative}", path, int(info["size"]))]
                jobs.write_json(book, known)
        for path in [path for path in copy.rglob("*") if path.is_file()]:
            if path.relative_to(copy).as_posix() not in found:
                path.unlink()

    def _fetch(self, name: str, path: Path, size: int) -> str:
        """Copy a file here and return its hash."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.local / ".getting"
        self._ask("get_file", self._at(name), str(aside))
        if aside.stat().st_size != size:
            raise TransientError(f"registry: {self.place}/{name} came with {aside.stat().st_size} of {size} bytes")
        aside.replace(path)
        return fingerprint.of_file(path)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Let one process of this machine change the copies at a time."""
        self.local.mkdir(parents=True, exist_ok=True)
        with (self.local / LOCK).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _copies() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-tuning" / "registry"


def _book(copy: Path) -> Path:
    """Return where it is noted which contents the copies of a folder are."""
    return copy.with_name(f".{copy.name}{COPIES}")


def _mark(info: dict[str, Any]) -> str:
    """Return what changes when an object does."""
    return str(info.get("ETag") or [info["size"], info.get("mtime") or info.get("created")])


def _refused(error: Exception) -> bool:
    """Return whether a condition on a write did not hold, or another write was at it."""
    return isinstance(error, FileExistsError) or _code(error) in ("PreconditionFailed", "ConditionalRequestConflict")


def _no_bucket(error: Exception) -> bool:
    return _code(error) == "NoSuchBucket"


def _code(error: Exception) -> str:
    """Return what S3 calls an error."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def _said(error: Exception, place: str) -> PreferenceTuningError:
    """Return what a failure of the store means to the user; the message of a client never holds a key."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, PreferenceTuningError):
        return error
    if _no_bucket(error):
        return ConfigError(f"registry.folder: {place}: there is no such bucket")
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "ProfileNotFound"):
        return ConfigError(f"registry.folder: {place}: no permission: {line}; credentials come from the environment")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return PreferenceTuningError(f"registry: no space for the copy of a version: {line}")
    return TransientError(f"registry: {place}: {line}")
