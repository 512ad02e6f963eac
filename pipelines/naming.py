"""What a run is called in ZenML, and its tags: the same for every run, whatever started it."""

import os
import re
from pathlib import PurePosixPath

from preference_tuning.config import RunConfig, portable
from preference_tuning.config.place import ENVIRONMENT
from preference_tuning.errors import ConfigError

TRIGGER = "PREFERENCE_TUNING_TRIGGER"
"""The environment variable that says who or what starts a run."""
WORD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
LONGEST = 60
"""Characters of a tag that comes from a file's name."""
SOURCES = 3
"""So many of the data's sources are tags."""


def check_trigger(trigger: str, where: str = TRIGGER) -> str:
    """Return a trigger that can be part of a run's name.

    Raises:
        ConfigError: it cannot.
    """
    if not WORD.match(trigger):
        raise ConfigError(f"{where}: {trigger!r} must be a word of letters, digits, '.', '_' and '-', 64 at most")
    return trigger


def trigger(otherwise: str = "manual") -> str:
    """Return who or what starts a run in this process; errors are those of ``check_trigger``."""
    return check_trigger(os.environ.get(TRIGGER) or otherwise)


def name(config: RunConfig, trigger: str) -> str:
    """Return the name of a run, in which ZenML puts the time."""
    return f"{config.registry.name}-{trigger}-{{date}}-{{time}}"


def tags(config: RunConfig, trigger: str) -> list[str]:
    """Return how it is tuned, which model, on what data and by what trigger; the verdict comes when it is known."""
    sources = [_short(origin.source) for origin in config.data.all_sources()[:SOURCES]]
    return list(dict.fromkeys([config.finetuning_type, config.registry.name, *sources, trigger]))


def _short(source: str) -> str:
    place = PurePosixPath(portable(source.removeprefix(ENVIRONMENT)))
    return (place.name.partition(".")[0] or place.name)[:LONGEST]
