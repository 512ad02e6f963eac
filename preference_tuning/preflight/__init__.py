"""Everything of a run that can be known before it costs anything: one module an area, all findings at once.

An area is a function of the ``World`` that yields findings, or a plain look at the config (``findings.of_look``). None
of them stops the others.
"""

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from preference_tuning.config import RunConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.preflight import (
    disk,
    duration,
    findings,
    fit,
    model,
    packages,
    places,
    probe,
    rows,
)
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import World

Looks = Callable[[World], Iterator[Finding]]


def _plain(name: str, look: Callable[[RunConfig], str]) -> tuple[str, Looks]:
    return name, lambda world: findings.of_look(name, look, world.config)


AREAS: tuple[tuple[str, Looks], ...] = (
    ("model", model.model),
    ("versions", packages.areas),
    _plain("training", places.training),
    ("data", rows.data),
    ("lengths", rows.lengths),
    ("steps", rows.steps),
    ("template", model.template),
    ("device", model.device),
    ("shapes", model.architecture),
    ("memory", fit.areas),
    ("time", duration.areas),
    ("disk", disk.areas),
    _plain("judges", places.judges),
    ("resume", places.resume),
    _plain("outputs", places.outputs),
    _plain("registry", places.registry),
    _plain("pushes", places.pushes),
    _plain("tracking", places.tracking),
    _plain("notify", places.notify),
)
TO_EVALUATE = ("model", "judges", "outputs", "registry")
"""What has to be right where nothing is trained."""
PATIENCE = 10.0
"""Seconds after which it is said what is being looked at."""


def check(config: RunConfig, only: Collection[str] = (), more: Sequence[tuple[str, Looks]] = ()) -> str:
    """Check the config against the world and return the findings, a line each.

    Args:
        config: of a run.
        only: names of what is looked at; empty: everything.
        more: areas beside those here.

    Raises:
        PreferenceTuningError: with every finding that stops a run; config errors outrank data errors in the exit code.
    """
    found = look(config, only, more)
    if error := findings.failure(found):
        raise error
    return findings.lines(found)


def look(
    config: RunConfig, only: Collection[str] = (), more: Sequence[tuple[str, Looks]] = (), probed: bool = False
) -> list[Finding]:
    """Return everything that is found; arguments as of ``check``.

    ``probed``: run a few rows through every job, for measured instead of computed time.
    """
    areas = [(name, area) for name, area in (*AREAS, *more) if not only or name in only]
    world, told = World(config, ahead=not only), dict[str, str]()
    if probed:
        areas = [(name, probe.areas if name == "time" else area) for name, area in areas]
    found: list[Finding] = []
    for name, area in areas:
        with _told_after(PATIENCE, f"  checking: {name} ..."):
            found += _findings(name, area, world, told)
    return found


def _findings(name: str, area: Looks, world: World, told: dict[str, str]) -> Iterator[Finding]:
    """Yield the findings of an area; an error that another area has told is not told again."""
    try:
        for finding in area(world):
            if finding.level == "error" and finding.text in told:
                yield Area(name).warning(f"not looked at: see {told[finding.text]}")
                return
            if finding.level == "error":
                told[finding.text] = name
            yield finding
    except PreferenceTuningError as error:
        if str(error) in told:
            yield Area(name).warning(f"not looked at: see {told[str(error)]}")
        else:
            told[str(error)] = name
            yield Area(name).error(error)


@contextmanager
def _told_after(seconds: float, text: str) -> Iterator[None]:
    """Say what is going on if it takes longer."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
