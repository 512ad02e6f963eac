"""The metrics spool: every metric as one line of JSON, on disk before training goes on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from preference_tuning import jobs

FILE = "metrics.jsonl"


class Point(BaseModel):
    """Metrics of one moment of a stage, under their full names such as ``sft/train/loss``."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    step: int
    epoch: float | None = None
    metrics: dict[str, float]


class Spool:
    """An append-only metrics.jsonl."""

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        """Open ``path``; points after step ``resume_at`` (the checkpoint that training continues from) are dropped."""
        kept = [point for point in read(path) if point.step <= resume_at] if path.is_file() else []
        jobs.write_text(path, "".join(line_of(point) for point in kept))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, point: Point) -> None:
        """Write one point and flush it."""
        self._stream.write(line_of(point))
        self._stream.flush()

    def sync(self) -> None:
        """Return when every point is on disk, whatever happens to the machine."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Follower:
    """Reads a spool while it grows, each line once; one that was cut and written anew is read from its beginning."""

    def __init__(self) -> None:
        self._file, self._position = -1, 0

    def news(self, path: Path) -> list[Point]:
        """Return the points that were added since the last call; none if there is no file yet."""
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            about = os.fstat(stream.fileno())
            if about.st_ino != self._file or about.st_size < self._position:
                self._file, self._position = about.st_ino, 0
            stream.seek(self._position)
            whole, _, _ = stream.read().rpartition(b"\n")
        self._position += len(whole) + 1 if whole else 0
        return [Point.model_validate_json(line) for line in whole.splitlines()]


def line_of(point: Point) -> str:
    """Return a point as a line of a spool."""
    return point.model_dump_json(exclude_none=True) + "\n"


def read(path: Path) -> Iterator[Point]:
    """Yield the points of a spool; a last line cut short by a crash is left out."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield Point.model_validate(json.loads(line))


def series(points: list[Point], name: str) -> list[tuple[int, float]]:
    """Return ``(step, value)`` of one metric."""
    return [(point.step, point.metrics[name]) for point in points if name in point.metrics]
