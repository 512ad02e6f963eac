"""What the steps of a run say to tracking: a stage begins, this belongs to it, the run is over."""

import contextlib
import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preference_tuning import jobs, reports
from preference_tuning.config import TrackingConfig
from preference_tuning.jobs import starter
from preference_tuning.tracking import account, asked, guard, overview, sending, spool
from preference_tuning.tracking.folder import (
    ARCHIVES,
    CLOSED,
    RUN,
    About,
    Closed,
    Contents,
    RunFolder,
    StageFolder,
    settle_dead,
)

GRACE_SECONDS = 2.5
"""How long the end of a run waits for Comet."""


@dataclass
class Told:
    """What is known of a stage: its settings, facts, tables by name, and reports, whose charts are taken apart."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Sequence[object]]] = field(default_factory=dict)
    reports: Mapping[str, Path] = field(default_factory=dict)
    spool: Path | None = None


class Stage:
    """A stage that runs now."""

    def __init__(self, folder: StageFolder) -> None:
        self._folder = folder

    def follow(self, evidence: Path) -> None:
        """Take the metrics of the stage from the spool that will grow in ``evidence``."""
        self._folder.begin(evidence / spool.FILE)

    def add(self, told: Told) -> None:
        """Tell what is known of it; nothing secret and no place of this machine is kept."""
        contents = Contents(
            parameters=guard.flat(told.parameters),
            others={name: _fact(value) for name, value in told.others.items() if value not in (None, [], {})},
        )
        for name, rows in told.tables.items():
            contents.assets.append(self._folder.add_file(name, "file", guard.scrub(_csv(rows))))
        for name, path in told.reports.items():
            page = guard.scrub(path.read_text(encoding="utf-8"))
            contents.assets.append(self._folder.add_file(name, "file", page))
            for title, drawing in reports.drawings(page).items():
                chart = f"{Path(name).parent}/{title}.svg"
                contents.assets.append(self._folder.add_file(chart, "chart", drawing))
        self._folder.tell(contents)
        if told.spool is not None and told.spool.is_file():
            self._folder.keep(list(spool.read(told.spool)))


def expect(config: TrackingConfig) -> None:
    """Prepare for a run that may be over in seconds; call it as soon as its settings are known."""
    if account.mode_of(config) == "offline":
        sending.start_ahead()


class Tracking:
    """The tracking of a run, as its steps see it."""

    def __init__(
        self, root: Path, config: TrackingConfig, run: str, name: str = "", settings: Any = None, url: str | None = None
    ) -> None:
        """Take a run.

        Args:
            root: of all tracking folders.
            config: the section of the run's config.
            run: its id, which is the key of the experiment.
            name: what it is called.
            settings: the whole config, as plain values.
            url: where ZenML shows it.
        """
        self.root, self.config, self.key = root, config, run
        self.run = RunFolder(root / run)
        self._name, self._settings, self._url = name, settings or {}, url
        self._mode = account.mode_of(config)
        self._begun = False
        self._archives: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Track a stage while it runs; if it fails, what there is until then is kept, and the run is over."""
        self.begin()
        folder = self.run.stage(name)
        output = folder.path / "files" / name / asked.OUTPUT
        try:
            with asked.copied(output) if "output" in self.config.log else contextlib.nullcontext():
                yield Stage(folder)
        except BaseException as error:
            self._settle(folder, output)
            self.close(failed=True, reason=str(error))
            raise
        self._settle(folder, output)

    def add(self, name: str, told: Told) -> None:
        """Tell of a stage that did not run now: it came from the step cache."""
        self.begin()
        Stage(self.run.stage(name)).add(told)

    def begin(self) -> None:
        """Make the run's folder, and start sending if there is somebody to send to; once in each process."""
        if self._begun:
            return
        self._begun = True
        self.run.path.mkdir(parents=True, exist_ok=True)
        settle_dead(self.root)
        about = About(
            id=self.key, name=self._name, mode=self._mode, project=self.config.project,
            workspace=self.config.workspace, tags=self.config.tags, starter=starter.mark(),
        )  # fmt: skip
        jobs.write_json(self.run.path / RUN, about.model_dump(mode="json"))
        first = self.run.stage("run")
        if not first.path.is_dir():
            links = {"Name": self._name, "zenml/run": self._name, "zenml/run_id": self.key, "zenml/url": self._url}
            Stage(first).add(Told(parameters=self._settings, others=links))
            asked.gather(self.config, first)
        if self._mode == "online":
            sending.start(self.run)

    def close(self, failed: bool = False, reason: str = "", wait: bool = True) -> None:
        """Say that the run is over: write archives, or give the sender a moment to end.

        Without ``wait`` archives are written meanwhile, and ``told`` waits for them.
        """
        if (self.run.path / CLOSED).is_file():
            return
        status = {"run/status": "failed" if failed else "finished", "run/reason": reason or None}
        Stage(self.run.stage("run")).add(Told(others=status))
        closed = Closed(failed=failed, reason=guard.scrub(reason))
        jobs.write_json(self.run.path / CLOSED, closed.model_dump(mode="json"))
        if self._mode == "online":
            self._await_sender()
        elif self._mode == "offline":
            self._archives = sending.start_archives(self.run)
            if wait:
                self._await_archives()

    def links(self) -> dict[str, str]:
        """Return what leads from ZenML to the run's metrics."""
        if self._mode == "off":
            return {}
        found = {"comet/experiment": self.key}
        if self._mode == "offline":
            return {**found, "comet/archives": overview.short(self.run.path / ARCHIVES)}
        url = self.run.ledger().url
        return {**found, **({"comet/url": url} if url else {})}

    def told(self) -> str:
        """Return, in a line, where the run's metrics are."""
        self._await_archives()
        return overview.line(self.run)

    def _settle(self, folder: StageFolder, output: Path) -> None:
        if output.is_file():
            text = guard.scrub(output.read_text(encoding="utf-8", errors="replace"))
            folder.tell(Contents(assets=[folder.add_file(f"{folder.name}/{asked.OUTPUT}", "file", text)]))
        folder.settle()

    def _await_archives(self) -> None:
        if self._archives is not None and not sending.written(self._archives):
            print("warning: Comet's archives could not be written; `run.py track upload` needs none", file=sys.stderr)
        self._archives = None

    def _await_sender(self) -> None:
        """Wait until everything arrived, the sender knows of a problem, or time is up."""
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            ledger = self.run.ledger()
            if ledger.complete or ledger.problem:
                return
            time.sleep(0.1)


def _fact(value: Any) -> str | int | float | bool:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return guard.portable("; ".join(map(str, value)))
    return guard.portable(str(value))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows(rows)
    return made.getvalue()
