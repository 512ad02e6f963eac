"""A run's tracking folder: which stages belong to the run, and everything that is to be told of them.

``<output_dir>/tracking/<run id>/`` has

- ``run.json``: the run, where it goes in Comet, and who runs it;
- ``stages/<stage>/``: ``live.json`` while the stage runs, which says where its spool grows; ``metrics.jsonl`` when it
  is over, the same spool, linked; ``contents.json`` and ``files/``: parameters, facts, tables, charts, reports;
- ``closed.json``: how the run ended;
- ``comet.json`` and ``archives.json``: what Comet has acknowledged, and what lies in archives;
- ``archives/<stage>.zip``: Comet's own offline archives.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.jobs import starter
from preference_tuning.tracking import spool
from preference_tuning.tracking.ledger import Ledger
from preference_tuning.tracking.spool import Follower, Point
from preference_tuning.tracking.trackers import Fact, Kind

RUN, CLOSED, LOCK = "run.json", "closed.json", "lock"
COMET, ARCHIVED, ARCHIVES = "comet.json", "archives.json", "archives"
STAGES = ("run", "data", "sft", "dpo", "evaluation", "registry")
"""In the order in which they are told."""


class About(BaseModel):
    """A run, and where it goes."""

    id: str
    """Of the run in ZenML, and the key of the experiment in Comet."""
    name: str
    mode: Literal["online", "offline", "off"]
    project: str
    workspace: str | None = None
    tags: tuple[str, ...] = ()
    starter: str = ""
    """The mark of the process that runs it (``jobs.starter``)."""


class Closed(BaseModel):
    """How a run ended."""

    failed: bool = False
    reason: str = ""


class Asset(BaseModel):
    """A file that belongs to a stage."""

    name: str
    """In Comet, such as ``sft/report.html``."""
    file: str
    """Below the stage's folder."""
    kind: Kind
    sha256: str


class Contents(BaseModel):
    """What is to be told of a stage beside its metrics."""

    parameters: dict[str, str] = {}
    others: dict[str, Fact] = {}
    assets: list[Asset] = []


class StageFolder:
    """A stage of a run."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._follower = Follower()

    def begin(self, spool_file: Path) -> None:
        """Note where the spool of the stage grows."""
        self.path.mkdir(parents=True, exist_ok=True)
        jobs.write_json(self._live, {"spool": str(spool_file)})

    def settle(self) -> None:
        """Keep the spool as it is now: what comes to lie in its place belongs to another run."""
        grows = self._grows()
        if grows is not None:
            if grows.is_file():
                _link(grows, self._kept)
            self._live.unlink()

    def keep(self, points: list[Point]) -> None:
        """Keep points of a stage that did not run now; those of another making go on behind the last step."""
        known = self.points()
        told = {(name, point.step): repr(value) for point in known for name, value in point.metrics.items()}
        news = {(name, point.step): repr(value) for point in points for name, value in point.metrics.items()}
        if news.items() <= told.items():
            return
        behind = max((point.step for point in known), default=-1) + 1 if known else 0
        added = [point.model_copy(update={"step": point.step + behind}) for point in points]
        self.path.mkdir(parents=True, exist_ok=True)
        jobs.write_text(self._kept, "".join(map(spool.line_of, [*known, *added])))

    def points(self) -> list[Point]:
        """Return all points so far."""
        path = self._grows() or self._kept
        return list(spool.read(path)) if path.is_file() else []

    def news(self) -> list[Point]:
        """Return the points since the last call."""
        return self._follower.news(self._grows() or self._kept)

    def contents(self) -> Contents:
        """Return what is to be told beside the metrics."""
        try:
            return Contents.model_validate_json((self.path / "contents.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Contents()

    def tell(self, contents: Contents) -> None:
        """Add to what is to be told; the files are there already."""
        known = self.contents()
        names = {asset.name for asset in contents.assets}
        known.parameters.update(contents.parameters)
        known.others.update(contents.others)
        known.assets = [asset for asset in known.assets if asset.name not in names] + contents.assets
        self.path.mkdir(parents=True, exist_ok=True)
        jobs.write_json(self.path / "contents.json", known.model_dump(mode="json"))

    def add_file(self, name: str, kind: Kind, content: str | bytes) -> Asset:
        """Write a file of the stage, and return it as what it is in Comet."""
        file = self.path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return Asset(name=name, file=str(file.relative_to(self.path)), kind=kind, sha256=fingerprint.of_file(file))

    @property
    def _live(self) -> Path:
        return self.path / "live.json"

    @property
    def _kept(self) -> Path:
        return self.path / spool.FILE

    def _grows(self) -> Path | None:
        """Return where the spool grows, while it does."""
        try:
            return Path(json.loads(self._live.read_text(encoding="utf-8"))["spool"])
        except FileNotFoundError:
            return None


class RunFolder:
    """The tracking folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def about(self) -> About:
        """The run."""
        return About.model_validate_json((self.path / RUN).read_text(encoding="utf-8"))

    def stage(self, name: str) -> StageFolder:
        """Return a stage, whether or not it has begun."""
        return StageFolder(self.path / "stages" / name)

    def stages(self) -> list[StageFolder]:
        """Return the stages that have begun."""
        return [self.stage(name) for name in STAGES if (self.path / "stages" / name).is_dir()]

    def closed(self) -> Closed | None:
        """Return how the run ended; a run whose process is gone was killed."""
        path = self.path / CLOSED
        if path.is_file():
            return Closed.model_validate_json(path.read_text(encoding="utf-8"))
        return Closed(failed=True, reason="its process was killed") if starter.is_gone(self.about.starter) else None

    def ledger(self, name: str = COMET) -> Ledger:
        """Return the record of what was delivered."""
        return Ledger.read(self.path / name)

    def archives(self) -> list[Path]:
        """Return Comet's offline archives."""
        return sorted((self.path / ARCHIVES).glob("*.zip"))

    @contextlib.contextmanager
    def sole(self, patience: float = 0.0) -> Iterator[bool]:
        """Be the only one who delivers to Comet, and yield whether that is so; who only looks goes in a moment."""
        until = time.monotonic() + patience
        with (self.path / LOCK).open("a") as stream:
            while not _taken(stream):
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(0.05)
            yield True


def _taken(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def runs(root: Path) -> list[RunFolder]:
    """Return the tracking folders below ``root``, the oldest first."""
    found = [path.parent for path in root.glob(f"*/{RUN}")]
    return [RunFolder(path) for path in sorted(found, key=lambda path: (path / RUN).stat().st_mtime)]


def settle_dead(root: Path) -> None:
    """Keep the spools of runs that were killed, before another run writes in their place."""
    for run in runs(root):
        for stage in run.stages():
            if run.closed():
                stage.settle()


def _link(source: Path, target: Path) -> None:
    """Put a file in a second place; whoever rewrites it in the first writes a new one there."""
    aside = target.with_suffix(".new")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, aside)
    aside.replace(target)
