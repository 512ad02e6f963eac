"""What may leave the machine as text: nothing that is secret, and no place on this machine."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from preference_tuning.config import place

SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
"""In the name of an environment variable: its value is a secret."""
WITHHELD = re.compile(r"secret|passw", re.IGNORECASE)
"""In the name of a setting: it may hold a key by mistake."""
SHORTEST = 8
"""Characters of what is taken for a secret; shorter values are words such as ``true``."""
HIDDEN = "***"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@\"'<>]+@")


def scrub(text: str) -> str:
    """Return a text without the secrets of the environment and without the users in its addresses."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return _USER.sub(r"\1", text)


def portable(text: str) -> str:
    """Return a setting or a fact as it may be told: addresses bare, and of places on this machine only the name."""
    return place.portable(_URL.sub(lambda found: place.portable(found.group()), scrub(text)))


def flat(values: Any, name: str = "") -> dict[str, str]:
    """Return ``{"dpo/beta": "0.1"}`` for nested settings; lists of plain values are one text."""
    if name and WITHHELD.search(name.rpartition("/")[2]) and values is not None:
        return {name: HIDDEN}
    if isinstance(values, Mapping):
        return {path: text for key, value in values.items() for path, text in flat(value, _joined(name, key)).items()}
    if isinstance(values, Sequence) and not isinstance(values, str):
        if any(isinstance(value, Mapping) for value in values):
            return flat({str(number): value for number, value in enumerate(values)}, name)
        return {name: ", ".join(portable(str(value)) for value in values)}
    return {name: portable(str(values))}


def _joined(name: str, key: Any) -> str:
    return f"{name}/{key}" if name else str(key)


def _secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    # The longest first: one may be a part of another. A path is where a secret lies.
    return sorted((value for value in found if not value.startswith("/")), key=len, reverse=True)
