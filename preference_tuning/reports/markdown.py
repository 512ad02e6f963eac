"""Markdown in which words from data or models stay words: no markup, no HTML, no line of their own."""

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]|~<>&$]|:(?=//))")


def plain(value: object) -> str:
    """Return a value as text that no reader of Markdown takes for anything else."""
    return _SPECIAL.sub(r"\\\1", _one_line(value))


def code(value: object) -> str:
    """Return a value as inline code; in a table too."""
    shown = _one_line(value).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown else "` `"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of cells that are Markdown already."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _one_line(value: object) -> str:
    return re.sub(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+", " ", str(value)).strip()
