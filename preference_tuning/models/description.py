"""What a base model says of itself: its licence and its languages, where it names them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from preference_tuning import hub
from preference_tuning.models import gguf
from preference_tuning.models.source import ModelSource

CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
KNOWN = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"\bMIT License\b"}
"""Licences that are known by their text."""


class Description(BaseModel):
    """What is known of a base model; nothing is guessed."""

    licence: str | None = None
    """As the hub calls it; ``other``: it has one, of its own."""
    languages: list[str] = []
    """As the hub calls them."""


def describe(source: ModelSource) -> Description:
    """Return what a base model says of itself: in its card's metadata, its GGUF header, or its licence's text."""
    if source.kind == "gguf":
        told = gguf.general(Path(source.location))
        return _described(told.get("license"), told.get("languages"))
    if source.kind == "hub":
        card = hub.model_card(source.location, source.fingerprint)
        return _of_card(card) if card else Description()
    folder = Path(source.location)
    found = _of_card(folder / CARD) if (folder / CARD).is_file() else Description()
    return found if found.licence else found.model_copy(update={"licence": next(_by_text(folder), None)})


def _of_card(path: Path) -> Description:
    text = FRONT_MATTER.search(path.read_text(encoding="utf-8", errors="replace"))
    try:
        told = yaml.safe_load(text.group(1)) if text else None
    except yaml.YAMLError:
        told = None
    return _described(told.get("license"), told.get("language")) if isinstance(told, dict) else Description()


def _described(licence: Any, languages: Any) -> Description:
    spoken = [languages] if isinstance(languages, str) else languages
    return Description(
        licence=licence if isinstance(licence, str) else None,
        languages=[language for language in spoken if isinstance(language, str)] if isinstance(spoken, list) else [],
    )


def _by_text(folder: Path) -> Iterator[str]:
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            yield next((licence for licence, words in KNOWN.items() if re.search(words, text)), "other")
