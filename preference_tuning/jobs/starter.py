"""Who started a job: written in the job's lock, and watched by its processes, so that none is left behind for long.

A starter that is killed cannot stop its job. The job notices, saves what it has and ends; until then it holds the lock,
so that the same job cannot be started beside it.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from preference_tuning.errors import PreferenceTuningError

VARIABLE = "PREFERENCE_TUNING_STARTER"
"""Of the environment of a job's processes: the mark of the process to watch."""

LOOK_SECONDS = 1.0

ORPHAN_SECONDS = 600.0
"""How long a starter waits for a job that lost its own, which may have a step to finish and a checkpoint to write."""


def mark() -> str:
    """Return what tells this process from all others: host, number and, on Linux, the time of its start."""
    return f"{socket.gethostname()} {os.getpid()} {_began(os.getpid()) or '-'}"


def is_gone(marked: str) -> bool:
    """Return whether a process of this host no longer runs; of another host's nothing is known, so it is not gone."""
    host, number, began = [*marked.split(), "", "", ""][:3]
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return began != "-" and _began(int(number)) != began


def _began(process: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it ended, or where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended and only waits for somebody to ask how.
    return None if state in "ZX" else fields[18]


def watch() -> None:
    """Let this process stop, as by SIGTERM, when its starter is gone."""
    marked = os.environ.get(VARIABLE)
    if marked:
        threading.Thread(target=_watch, args=(marked,), daemon=True).start()


def _watch(marked: str) -> None:
    while not is_gone(marked):
        time.sleep(LOOK_SECONDS)
    # Who read the output may be gone too, and a write that fails must not come between here and the checkpoint.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def lock(path: Path, where: Path) -> Iterator[int]:
    """Hold the lock of the job in ``where`` and yield its file descriptor, which the job's process is to inherit.

    Raises:
        PreferenceTuningError: the same job is running.
    """
    with path.open("a+", encoding="utf-8") as stream:
        _take(stream.fileno(), path, where)
        stream.truncate(0)
        stream.write(mark() + "\n")
        stream.flush()
        yield stream.fileno()


def _take(descriptor: int, path: Path, where: Path) -> None:
    deadline, told = time.monotonic() + ORPHAN_SECONDS, False
    while not _try(descriptor):
        if not is_gone(path.read_text(encoding="utf-8")):
            raise PreferenceTuningError(f"the same job is already running in {where}; wait for it, or stop it")
        if time.monotonic() > deadline:
            raise PreferenceTuningError(
                f"the job in {where} lost what started it and has not ended within {ORPHAN_SECONDS:.0f} s; stop it"
            )
        if not told:
            print(f"  what started the job in {where} is gone; waiting for it to save and end", file=sys.stderr)
        told = True
        time.sleep(LOOK_SECONDS / 4)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
