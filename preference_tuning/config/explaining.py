"""What pydantic found wrong in the parameters of a run config, in words for who wrote it."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from preference_tuning.config import secrecy
from preference_tuning.config.document import KeyPath
from preference_tuning.config.notify import UNKNOWN_RECEIVER
from preference_tuning.config.registry import UNKNOWN_TARGET
from preference_tuning.config.schema import RunConfig
from preference_tuning.config.section import UNSHOWN, Section


def key_path(loc: tuple[int | str, ...], parameters: Any) -> KeyPath:
    """Strip the parts that pydantic adds to a location (names of union members)."""
    path: list[int | str] = []
    value = parameters
    for place, part in enumerate(loc, 1):
        last = place == len(loc)
        if isinstance(value, Mapping) and (part in value or last or _known(tuple(path), part, parameters)):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _known(path: KeyPath, key: int | str, parameters: Any) -> bool:
    section = _section(path, parameters)
    return section is not None and key in section.model_fields


def _section(path: KeyPath, parameters: Any) -> type[BaseModel] | None:
    """Return the section that lies at ``path`` of the parameters, if one does."""
    section: type[BaseModel] = RunConfig
    value = parameters
    for place, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
        if isinstance(key, int):
            continue  # a place in a list of sections
        # What an item of a list is, the item says.
        item = path[place + 1] if place + 1 < len(path) else None
        given = value[item] if isinstance(value, list) and isinstance(item, int) and item < len(value) else value
        field_ = section.model_fields.get(key)
        inner = _chosen(_sections_in(field_.annotation), given) if field_ else None
        if inner is None:
            return None
        section = inner
    return section


def _chosen(sections: list[type[Section]], value: Any) -> type[Section] | None:
    """Return the section that a value is meant to be: of several, the one with its ``to``."""
    if len(sections) < 2:
        return sections[0] if sections else None
    to = value.get("to") if isinstance(value, Mapping) else None
    return next((section for section in sections if to in get_args(section.model_fields["to"].annotation)), None)


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field may hold: itself, one or none, a list of them, or one of several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def explain(item: Any, loc: KeyPath, parameters: Any) -> str:
    """Return what is wrong at a place: an item of ``ValidationError.errors()``."""
    if item["type"] == "extra_forbidden":
        key = str(loc[-1])
        elsewhere = [f"{name}.{key}" for name in RunConfig.model_fields if key in _fields((name,), parameters)]
        if elsewhere:
            return f"unknown key here; there is {' and '.join(elsewhere)}"
        return unknown(key, _fields(loc[:-1], parameters))
    if item["type"] == "missing":
        return "is required"
    if item["type"] == UNSHOWN:
        return str(item["msg"])
    if item["type"] in (UNKNOWN_TARGET, UNKNOWN_RECEIVER):
        to = item["input"].get("to") if isinstance(item["input"], dict) else None
        return f"to {to!r}: {item['msg']}" if to is not None else str(item["msg"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "must start with a letter or digit and hold only letters, digits, '.', '_' and '-' (96 at most)"
    shown = repr(item["input"])
    if secrecy.looks_like(shown):
        shown = "(not shown)"
    return f"{shown}: {message[0].lower() + message[1:]}"


def _fields(path: KeyPath, parameters: Any) -> Iterable[str]:
    section = _section(path, parameters)
    return section.model_fields if section else ()


def unknown(key: str, known: Iterable[str]) -> str:
    """Return that a key is unknown, with the one that was meant."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
    return f"unknown key; {hint}"


def without(parameters: dict[str, Any], paths: list[KeyPath]) -> dict[str, Any]:
    """Return the parameters without what lies at ``paths``; what is required gets a value that means nothing."""
    result: dict[str, Any] = _copy(parameters)
    for path in paths:
        # A wrong item takes its whole list with it.
        names = list(itertools.takewhile(lambda key: isinstance(key, str), path))
        if names in (["base_model"], ["data"]):
            result[str(names[0])] = {"source": "missing"}
        elif names:
            parent: Any = result
            for key in names[:-1]:
                parent = parent[key]
            parent.pop(names[-1], None)
            if names[-1] == "source":
                parent["source"] = "missing"
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
