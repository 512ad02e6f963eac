"""What was delivered: the last step of each metric, and the content of everything else."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, PrivateAttr

from preference_tuning import jobs
from preference_tuning.tracking.spool import Point


class Ledger(BaseModel):
    """A record of acknowledged deliveries to one destination; on disk after each of them.

    Steps of a metric only rise, so the last one stands for all before it.
    """

    metrics: dict[str, int] = {}
    sent: dict[str, str] = {}
    """Parameters and facts of each stage, and assets, by the hash of what was sent."""
    unsure_since: float | None = None
    """When a delivery began whose end is not known: its process was killed, or the connection broke."""
    url: str | None = None
    problem: str | None = None
    """Why nothing can be delivered now."""
    complete: bool = False
    """Everything of a run that is over was delivered."""
    _path: Path | None = PrivateAttr(None)

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Return the record at ``path``; an empty one if there is none."""
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = cls()
        found._path = path
        return found

    def save(self) -> None:
        """Write it to where it was read from."""
        if self._path is not None:
            jobs.write_json(self._path, self.model_dump(mode="json", exclude_defaults=True))

    def aside(self) -> "Ledger":
        """Return a copy that is not written before it is ``kept``."""
        copy = self.model_copy(deep=True)
        copy._path = None
        return copy

    def keep(self, other: "Ledger") -> None:
        """Take over what ``aside`` gave out, and write it."""
        self.metrics, self.sent = other.metrics, other.sent
        self.save()

    def begin(self) -> None:
        """Note that a delivery begins, before it does."""
        if self.unsure_since is None:
            self.unsure_since = time.time()
            self.save()

    def delivered(self, points: Iterable[Point] = (), sent: Mapping[str, str] | None = None) -> None:
        """Note what has arrived."""
        for point in points:
            for name in point.metrics:
                self.metrics[name] = max(point.step, self.metrics.get(name, -1))
        self.sent.update(sent or {})
        self.unsure_since = None
        self.save()

    def has(self, name: str, step: int) -> bool:
        """Return whether a metric was delivered up to ``step``."""
        return step <= self.metrics.get(name, -1)
