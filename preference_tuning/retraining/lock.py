"""Never two retrainings of one name in one ``output_dir``: a lock that ends with its holder, on this host and others.

On one host the kernel knows: it holds the lock (flock) for as long as the process lives. A folder that hosts share may
be on a disk where the kernel of another host knows nothing of it, so the file also says who holds it, and its time is
renewed while the holder lives. What another host wrote counts until that time is old.
"""

import contextlib
import fcntl
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from preference_tuning.errors import AlreadyRunningError, ConfigError

FOLDER = "retrain"

BEAT_SECONDS = 20.0
OLD_SECONDS = 300.0
"""After so long without a beat the holder on another host counts as dead."""


class Holder(BaseModel):
    """Who holds the lock."""

    pid: int
    host: str
    since: datetime

    def __str__(self) -> str:
        """Name it for people."""
        return f"pid {self.pid} on {self.host}, since {self.since.astimezone():%Y-%m-%d %H:%M:%S}"


@contextlib.contextmanager
def held(output_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock of a name.

    Raises:
        AlreadyRunningError: another process holds it.
        ConfigError: the folder cannot be written.
    """
    path = output_dir / FOLDER / f"{name}.lock"
    with _open(path) as stream:
        if not _take(stream):
            raise AlreadyRunningError(f"already running: {_holder(path) or 'another process'}")
        _check_elsewhere(path)
        holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=datetime.now(UTC))
        _write(stream, holder.model_dump_json() + "\n")
        try:
            with _beating(stream.fileno()):
                yield
        finally:
            _write(stream, "")


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write {path.absolute()}: {error.strerror}") from None


def _take(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> Holder | None:
    """Return who is written in the file; None if nobody is, or it was just being written."""
    try:
        return Holder.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        return None


def _check_elsewhere(path: Path) -> None:
    """Refuse a lock that a process of another host may still hold; of this host the kernel has just told."""
    holder = _holder(path)
    if holder is None or holder.host == socket.gethostname():
        return
    # Both times are those of the disk's own clock, which the hosts' may differ from.
    with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
        silent = os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime
    if silent < OLD_SECONDS:
        raise AlreadyRunningError(
            f"already running: {holder}; if it died, its lock is free {OLD_SECONDS - silent:.0f} s from now"
        )


def _write(stream: IO[str], text: str) -> None:
    stream.truncate(0)
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _beating(descriptor: int) -> Iterator[None]:
    """Renew the file's time while the block runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(
                OSError
            ):  # a disk that is gone for a moment; the lock itself does not depend on it
                os.utime(descriptor)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
