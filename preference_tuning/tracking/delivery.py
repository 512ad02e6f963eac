"""From a run's folder to a tracker: what is missing there, in the order in which it happened, and never twice."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from preference_tuning import fingerprint
from preference_tuning.tracking.folder import Asset, RunFolder, StageFolder
from preference_tuning.tracking.ledger import Ledger
from preference_tuning.tracking.spool import Point
from preference_tuning.tracking.trackers import Fact, Known, Tracker

BATCH = 500
"""Values that are delivered at once, at most."""
SETTLE_SECONDS = 5.0
"""How long after a delivery of unknown end a tracker is asked what it has: it may take a moment to know."""


@dataclass
class Parcel:
    """What a tracker does not have of a stage."""

    points: list[Point] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    others: dict[str, Fact] = field(default_factory=dict)
    assets: list[Asset] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many records it holds: values of metrics, parameters, facts and files."""
        beside = len(self.parameters) + len(self.others) + len(self.assets)
        return beside + sum(len(point.metrics) for point in self.points)


def missing(stage: StageFolder, points: Sequence[Point], ledger: Ledger) -> Parcel:
    """Return what the ledger does not have of ``points`` and of what else is to be told of a stage."""
    contents = stage.contents()
    parcel = Parcel(points=[left for point in points if (left := _without(point, ledger.has))])
    if contents.parameters and ledger.sent.get(f"parameters/{stage.name}") != fingerprint.of_value(contents.parameters):
        parcel.parameters = contents.parameters
    if contents.others and ledger.sent.get(f"others/{stage.name}") != fingerprint.of_value(contents.others):
        parcel.others = contents.others
    parcel.assets = [asset for asset in contents.assets if ledger.sent.get(asset.name) != asset.sha256]
    return parcel


def deliver(stage: StageFolder, parcel: Parcel, tracker: Tracker, ledger: Ledger, known: Known) -> None:
    """Give a parcel to a tracker, and note each part of it in the ledger when it has arrived."""
    for batch in _batches(parcel.points):
        new = [left for point in batch if (left := _without(point, lambda n, s: s in known.steps.get(n, ())))]
        if new:
            ledger.begin()
            tracker.metrics(new)
        ledger.delivered(batch)
    if parcel.parameters:
        tracker.parameters(parcel.parameters)
        ledger.delivered(sent={f"parameters/{stage.name}": fingerprint.of_value(parcel.parameters)})
    if parcel.others:
        tracker.others(parcel.others)
        ledger.delivered(sent={f"others/{stage.name}": fingerprint.of_value(parcel.others)})
    for asset in parcel.assets:
        if asset.name in ledger.sent or asset.name not in known.assets:
            ledger.begin()
            tracker.asset(stage.path / asset.file, asset.name, asset.kind)
        ledger.delivered(sent={asset.name: asset.sha256})


class Session:
    """A connection to a tracker, from asking what it has to its end."""

    def __init__(self, run: RunFolder, tracker: Tracker, ledger: Ledger) -> None:
        self._run, self._tracker, self._ledger = run, tracker, ledger
        self._stages: dict[str, StageFolder] = {}
        if ledger.unsure_since is not None:
            time.sleep(max(0.0, min(SETTLE_SECONDS, ledger.unsure_since + SETTLE_SECONDS - time.time())))
        self._known = tracker.known(self._asked())

    def send(self) -> int:
        """Deliver what is new, and return how many records that was."""
        count = 0
        for found in self._run.stages():
            stage = self._stages.setdefault(found.name, found)
            parcel = missing(stage, stage.news(), self._ledger)
            if parcel.size:
                deliver(stage, parcel, self._tracker, self._ledger, self._known)
                count += parcel.size
        return count

    def beat(self) -> None:
        """Say that the run lives."""
        self._tracker.beat()

    def end(self, failed: bool) -> None:
        """Say that this was all, and how it ended."""
        self._tracker.end(failed)
        self._ledger.complete, self._ledger.problem = True, None
        self._ledger.save()

    def _asked(self) -> set[str]:
        """Return the metrics of which something is to be delivered."""
        parcels = (missing(stage, stage.points(), self._ledger) for stage in self._run.stages())
        return {name for parcel in parcels for point in parcel.points for name in point.metrics}


def _without(point: Point, has: Callable[[str, int], bool]) -> Point | None:
    """Return a point without the metrics that are there already, or None if all of them are."""
    left = {name: value for name, value in point.metrics.items() if not has(name, point.step)}
    return point.model_copy(update={"metrics": left}) if left else None


def _batches(points: Sequence[Point]) -> Iterator[list[Point]]:
    batch: list[Point] = []
    size = 0
    for point in points:
        if batch and size + len(point.metrics) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += len(point.metrics)
    if batch:
        yield batch
