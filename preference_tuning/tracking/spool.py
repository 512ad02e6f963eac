"""The metrics spool: every metric as one line of JSON, on disk before training goes on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from preference_tuning import jobs


class Point(BaseModel):
    """Metrics of one moment of a stage, under their full names such as ``sft/train/loss``."""

    step: int
    epoch: float | None = None
    metrics: dict[str, float]


class Spool:
    """An append-only metrics.jsonl."""

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        """Open ``path``; points after step ``resume_at`` (the checkpoint that training continues from) are dropped."""
        kept = [point for point in read(path) if point.step <= resume_at] if path.is_file() else []
        jobs.write_text(path, "".join(_line(point) for point in kept))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, point: Point) -> None:
        """Write one point and flush it."""
        self._stream.write(_line(point))
        self._stream.flush()

    def sync(self) -> None:
        """Return when every point is on disk, whatever happens to the machine."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _line(point: Point) -> str:
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
