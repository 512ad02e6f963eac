"""A registry on a local or shared disk.

Files are written aside, synced and renamed, folders too, and the name of each in its folder is synced: after a power
cut there is the old state or the new one. A lock is flock's, which ends with its process; on NFS it needs version 4, or
a lock daemon.
"""

import contextlib
import fcntl
import functools
import io
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from preference_tuning import jobs
from preference_tuning.errors import ConfigError
from preference_tuning.registry.storage import checked, locking
from preference_tuning.registry.storage.locking import Holder

LOCK, WRITING, REMOVING = ".lock", ".writing-", ".removing-"
DEPTHS = ("", "*/", "*/*/")
"""Where killed writers may have left something in a folder that is locked."""


class LocalStorage:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        """Take the folder, which need not exist yet.

        Raises:
            ConfigError: it is no folder.
        """
        self.local = root
        if root.exists() and not root.is_dir():
            raise ConfigError(f"registry.folder: {root} is a file, not a folder")

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.local)

    def read(self, name: str) -> bytes | None:
        """See ``Storage``."""
        try:
            return self._at(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage``."""
        path = self._at(name)
        _make(path.parent)
        aside = path.parent / f"{WRITING}{uuid.uuid4().hex}"
        aside.write_bytes(content)
        jobs.sync(aside)
        aside.replace(path)
        jobs.sync(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        """See ``Storage``; here the lock of its folder is what makes it exclusive."""
        return self.swap(name, None, content)

    def swap(self, name: str, before: bytes | None, after: bytes) -> bool:
        """See ``Storage``; here the lock of its folder is what makes it exclusive."""
        if self.read(name) != before:
            return False
        self.write(name, after)
        return True

    def names(self, folder: str, holding: str | None = None) -> list[str]:
        """See ``Storage``."""
        place = self._at(folder)
        found = [path for path in place.iterdir() if path.name[0] != "."] if place.is_dir() else []
        return sorted(path.name for path in found if holding is None or (path / holding).is_file())

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        place = self._at(folder)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        return {path.relative_to(place).as_posix(): path.stat().st_size for path in files}

    def aside(self, name: str) -> Path:
        """See ``Storage``; beside its place, so that it can be renamed."""
        aside = self._at(name).parent / f"{WRITING}{uuid.uuid4().hex}"
        _make(aside.parent)
        aside.mkdir()
        return aside

    def publish(self, aside: Path, name: str, last: str) -> None:
        """See ``Storage``; one rename."""
        for path in sorted(aside.rglob("*")):
            jobs.sync(path)
        jobs.sync(aside)
        folder = self._at(name)
        if folder.exists() and not (folder / last).is_file():
            self.remove(name, last)
        aside.rename(folder)
        jobs.sync(folder.parent)

    def folder(self, name: str, fresh: bool = False) -> Path:
        """See ``Storage``; the folder itself."""
        return self._at(name)

    def remove(self, name: str, last: str) -> None:
        """See ``Storage``; one rename, then what it is made of."""
        folder = self._at(name)
        aside = folder.parent / f"{REMOVING}{uuid.uuid4().hex}"
        folder.rename(aside)
        jobs.sync(folder.parent)
        shutil.rmtree(aside)

    @contextlib.contextmanager
    def lock(self, folder: str) -> Iterator[None]:
        """See ``Storage``."""
        place = self._at(folder)
        try:
            _make(place)
            stream = (place / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"registry.folder: cannot write {self.place}: {error.strerror}") from None
        with stream:
            attempt = functools.partial(_take, stream, self.place)
            locking.wait(attempt, functools.partial(_holder, place / LOCK), str(place))
            stream.truncate(0)
            stream.write(Holder.this().model_dump_json() + "\n")
            stream.flush()
            _clear(place, DEPTHS if folder else DEPTHS[:1])
            yield

    def check(self, folder: str) -> None:
        """See ``Storage``; in the nearest folder that exists, what writing needs is done once and undone."""
        wanted = self._at(folder)
        there = next(path for path in (wanted, *wanted.parents) if path.exists())
        name = there / f".trying-{uuid.uuid4().hex}"
        try:
            with name.open("w", encoding="utf-8") as held, name.open(encoding="utf-8") as other:
                jobs.sync(name)
                if not _take(held, self.place) or _take(other, self.place):
                    raise ConfigError(f"registry.folder: {self.place} cannot be locked: its disk knows no flock")
            name.replace(name.with_name(f"{name.name}-renamed"))
        except OSError as error:
            said = "no permission" if isinstance(error, PermissionError) else error.strerror
            raise ConfigError(f"registry.folder: cannot write {self.place}: {said} in {there}") from None
        finally:
            for path in (name, name.with_name(f"{name.name}-renamed")):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _at(self, name: str) -> Path:
        return self.local / checked(name) if name else self.local


def _make(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        jobs.sync(folder.parent)


def _take(stream: io.TextIOWrapper, place: str) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(f"registry.folder: {place} cannot be locked: {error.strerror}") from None
    return True


def _holder(path: Path) -> Holder | None:
    try:
        return Holder.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _clear(place: Path, depths: tuple[str, ...]) -> None:
    """Remove what killed writers left; whoever holds the lock knows that nobody writes."""
    for path in [path for depth in depths for kind in (WRITING, REMOVING) for path in place.glob(f"{depth}{kind}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
