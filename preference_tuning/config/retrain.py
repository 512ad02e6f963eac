"""The section about scheduled retraining: when a start of `run.py retrain` trains, and when it skips."""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from preference_tuning.config.section import Section

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
DURATION = re.compile(r"^(\d{1,6}(?:\.\d{1,6})?)([mhdw])$")


def _duration(value: Any) -> Any:
    if not isinstance(value, str) or not DURATION.match(value) or not duration(value):
        raise ValueError("must be a number with m, h, d or w behind it, such as 90m, 12h or 7d")
    return value


Duration = Annotated[str, BeforeValidator(_duration)]
"""A length of time as people write it: 90m, 12h, 7d, 2w."""


def duration(text: str) -> timedelta:
    """Return the length of time that a ``Duration`` names."""
    found = DURATION.match(text)
    assert found
    return timedelta(**{UNITS[found[2]]: float(found[1])})


class RetrainConfig(Section):
    """When `run.py retrain` trains; always, it skips a run that would be the last completed one again."""

    min_new_rows: int = Field(0, ge=0)
    """How many preference pairs must be new since the last completed run, where nothing but the data changed. 0: any
    change of the data will do, also pairs that were taken out."""
    min_interval: Duration | None = None
    """How long after the start of the last completed run nothing is trained, such as ``20h``."""
    max_age: Duration | None = None
    """How long after the start of the last completed run one is due whatever else holds, such as ``30d``."""

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together."""
        if self.min_interval and self.max_age and duration(self.max_age) < duration(self.min_interval):
            yield ("retrain", "max_age"), f"{self.max_age} is less than retrain.min_interval ({self.min_interval})"
