"""Train or skip, from facts alone."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from preference_tuning.config import RetrainConfig
from preference_tuning.config.retrain import duration
from preference_tuning.retraining.fingerprints import Fingerprints


@dataclass(frozen=True)
class Completed:
    """The last run that came to its end: trained, and registered."""

    started: datetime
    fingerprints: Fingerprints
    version: str
    kept: bool
    """Whether the version is still in the registry."""


@dataclass(frozen=True)
class Decision:
    """What is done, and why."""

    train: bool
    reason: str


def decide(
    now: Fingerprints, new_rows: int | None, last: Completed | None, settings: RetrainConfig, clock: datetime
) -> Decision:
    """Return whether a run that would start now is worth it.

    Args:
        now: what it would be made of.
        new_rows: pairs that the last completed run did not have; None: not known.
        last: the last completed run of this name, or None if there is none.
        settings: of the config.
        clock: the time.
    """
    if last is None:
        return Decision(True, "no run was completed yet")
    if not last.kept:
        return Decision(True, f"version {last.version} of the last run is not in the registry")
    age, changed = clock - last.started, now.changed_since(last.fingerprints)
    if settings.max_age and age >= duration(settings.max_age):
        return Decision(True, f"the last run is {words(age)} old (retrain.max_age: {settings.max_age})")
    if not changed:
        return Decision(False, f"data, config, code and base model are those of the run of {at(last.started)}")
    if settings.min_interval and age < duration(settings.min_interval):
        return Decision(False, f"the last run is {words(age)} old (retrain.min_interval: {settings.min_interval})")
    if changed == ["data"] and new_rows is not None:
        if new_rows < settings.min_new_rows:
            return Decision(False, f"{_pairs(new_rows)} (retrain.min_new_rows: {settings.min_new_rows})")
        return Decision(True, _pairs(new_rows) if new_rows else "the data changed, without a new pair")
    return Decision(True, f"changed: {', '.join(changed)}")


def _pairs(count: int) -> str:
    return "1 new pair" if count == 1 else f"{count} new pairs"


def words(age: timedelta) -> str:
    """Return a length of time in the unit that suits it."""
    seconds = age.total_seconds()
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def at(time: datetime) -> str:
    """Return a time as people here write it."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
