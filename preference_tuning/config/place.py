"""Settings that say where something lies: what may be written down of them, and what may be published.

A place on this machine is published by its last name alone, an address without user and query. Base model, data and
template are bound to hashes of their content, so the same work has the same identity wherever it lies.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, SerializationInfo
from pydantic_core import PydanticCustomError

from preference_tuning.config.section import PORTABLE, UNSHOWN, Text

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")
ENVIRONMENT = "env:"
"""How a source begins that is the name of an environment variable, which holds the address."""
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

_IN_TEXT = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+|(?<![\w./~-])(?:~|/[^\s/'\"`,;:()\[\]{}<>|]+)(?:/[^\s/'\"`,;:()\[\]{}<>|]+)+"
)
"""An address, or a path of two names or more."""


def address_alone(address: str) -> str:
    """Return an address without user, password, query and fragment, which may be secrets; a path as it is."""
    if not SCHEME.match(address):
        return address
    scheme, _, rest = address.partition(":")
    netloc, slash, path = _parts(rest)
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{re.split('[?#]', path)[0]}"


def portable(place: str) -> str:
    """Return a place without what is of this machine, or of its user, only."""
    if SCHEME.match(place):
        place = address_alone(place)
        scheme, _, rest = place.partition("://")
        # A file on this machine: file:///home/me/runs, sqlite:////home/me/runs.db.
        return f"{scheme}:///{PurePosixPath(rest).name}" if rest.startswith("/") else place
    if place.startswith("~") and "/" not in place:
        return "~"
    return PurePosixPath(place).name or place if place.startswith(("/", "~")) else place


def portable_text(text: str) -> str:
    """Return a text that others wrote, such as an error's, with every absolute path and address in it made portable."""
    return _IN_TEXT.sub(lambda found: portable(found.group()), text)


def holds_secret(address: str) -> bool:
    """Return whether an address names a user, or has a query: a signed one is as good as a key."""
    if not SCHEME.match(address):
        return False
    netloc, _, path = _parts(address.partition(":")[2])
    return "@" in netloc or "?" in netloc + path


def _parts(rest: str) -> tuple[str, str, str]:
    """Return host, slash and path of what follows a scheme; file:///x and sqlite:////x have no host."""
    return rest.removeprefix("//").partition("/") if rest.startswith("//") else rest.lstrip("/").partition("/")


def _alone(place: str) -> str:
    if holds_secret(place):
        raise PydanticCustomError(
            UNSHOWN, "must be an address alone, without a user, a key or a query in it: it is stored with every run"
        )
    return place


def _alone_or_named(place: str) -> str:
    if place.startswith(ENVIRONMENT) and not VARIABLE.fullmatch(place.removeprefix(ENVIRONMENT)):
        raise PydanticCustomError(UNSHOWN, "after `env:` comes the name of an environment variable, in capitals")
    if holds_secret(place):
        raise PydanticCustomError(
            UNSHOWN,
            "a user, a key or a query in an address would be stored with every run; put the whole address into an "
            "environment variable, such as ROWS_URL, and write env:ROWS_URL here",
        )
    return place


def _written(place: str, info: SerializationInfo[Any]) -> str:
    return portable(place) if info.context == PORTABLE else place


_WRITTEN = PlainSerializer(_written, return_type=str)
Place = Annotated[Text, AfterValidator(_alone), _WRITTEN]
"""A path, a hub id or an address."""
Source = Annotated[Text, AfterValidator(_alone_or_named), _WRITTEN]
"""The same, or the name of an environment variable."""
