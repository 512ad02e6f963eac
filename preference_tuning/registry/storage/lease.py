"""A lock in an object store: an object that says who holds it, renewed while he lives, taken over when he does not.

Acquiring, renewing and releasing are each one conditional write, so that of several who try exactly one succeeds. A
holder is taken for dead when his object has not changed for the length of his lease on the clock of whoever waits; the
clocks of two machines are never compared.
"""

import contextlib
import threading
import time
import uuid
from typing import Protocol

from pydantic import BaseModel

from preference_tuning.errors import PreferenceTuningError, TransientError
from preference_tuning.registry.storage import locking
from preference_tuning.registry.storage.locking import Holder

LEASE = 30.0
"""Seconds that a holder may be silent."""


class Swapping(Protocol):
    """What a lease needs of a storage."""

    def read(self, name: str) -> bytes | None:
        """Return a file, or None if there is none."""

    def swap(self, name: str, before: bytes | None, after: bytes) -> bool:
        """Write a file if it is still as it was, and return whether it was written."""


class _Object(BaseModel):
    """What lies in the store; ``holder`` is None when the lock is free."""

    token: str
    """Of the holder."""
    renewed: int = 0
    lease: float
    holder: Holder | None

    def bytes(self) -> bytes:
        return (self.model_dump_json() + "\n").encode()


class Lease:
    """The lock ``name`` of a storage, for one ``with``."""

    def __init__(self, storage: Swapping, name: str, place: str) -> None:
        """Prepare it; ``place`` is what is locked, for messages."""
        self._storage, self._name, self._place = storage, name, place
        self._mine = _Object(token=uuid.uuid4().hex, lease=LEASE, holder=Holder.this())
        self._seen: tuple[bytes | None, float] = (None, 0.0)
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._good_until = 0.0

    def __enter__(self) -> "Lease":
        locking.wait(self._attempt, self._holder, self._place)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewer.join()
        free = _Object(token="", lease=LEASE, holder=None)
        with contextlib.suppress(PreferenceTuningError):  # then it ends by itself
            self._storage.swap(self._name, self._mine.bytes(), free.bytes())

    def check(self) -> None:
        """Make sure that the lock is still held.

        Raises:
            TransientError: it was not renewed in time, so that another process may hold it.
        """
        if time.monotonic() > self._good_until:
            raise TransientError(
                f"registry: {self._place} was held by this process and could not be renewed for {LEASE:.0f} s, so "
                "another one may be writing; nothing was published, run it again"
            )

    def _attempt(self) -> bool:
        content = self._storage.read(self._name)
        found = _parsed(content)
        now = time.monotonic()
        if content != self._seen[0]:
            self._seen = (content, now)
        free = content is None or (found is not None and found.holder is None)
        if not free and now - self._seen[1] < (found.lease if found else LEASE):
            return False
        taken = self._storage.swap(self._name, content, self._mine.bytes())
        self._good_until = now + LEASE if taken else 0.0
        return taken

    def _renew(self) -> None:
        while not self._ended.wait(LEASE / 3):
            began, renewed = time.monotonic(), self._mine.model_copy(update={"renewed": self._mine.renewed + 1})
            try:
                if not self._storage.swap(self._name, self._mine.bytes(), renewed.bytes()):
                    self._good_until = 0.0
                    return
            except PreferenceTuningError:
                continue  # the store is out of reach for now; `check` knows how long that may last
            self._mine, self._good_until = renewed, began + LEASE

    def _holder(self) -> Holder | None:
        found = _parsed(self._seen[0])
        return found.holder if found else None


def _parsed(content: bytes | None) -> _Object | None:
    """Return what lies there, or None if it cannot be read."""
    try:
        return _Object.model_validate_json(content or b"")
    except ValueError:
        return None
