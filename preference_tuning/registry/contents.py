"""Which files a version may hold: weights as safetensors, JSON, text, templates, tables; by name and by content.

Loading a pickle runs what is in it, and a file that is not what its name says is nobody's to trust. So what is allowed
is listed, and everything else is refused.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pyarrow.parquet as pq

from preference_tuning.models import weights

LICENCES = ("LICENSE", "NOTICE")
"""Texts that go without an ending."""


def problems(model: Path, evidence: Mapping[str, Path]) -> list[str]:
    """Return why files must not be published, a line each.

    Args:
        model: folder of the weights, tokenizer and templates.
        evidence: folders to keep beside it, by name.
    """
    found = [f"model/{line}" for line in _problems(model, (*weights.KEPT, ".md", ".svg"))]
    return found + [f"{name}/{line}" for name, folder in evidence.items() for line in _problems(folder, _READABLE)]


def _problems(folder: Path, allowed: Collection[str]) -> list[str]:
    found = ((path, _problem(path, allowed)) for path in sorted(folder.rglob("*")))
    return [f"{path.relative_to(folder).as_posix()} {problem}" for path, problem in found if problem]


def _problem(path: Path, allowed: Collection[str]) -> str | None:
    if path.is_symlink():
        return "is a link, which leads out of the folder"
    if path.is_dir():
        return None
    suffix = ".txt" if path.name in LICENCES else path.suffix
    if suffix not in allowed:
        return "is of a kind that is not published"
    try:
        _READABLE[suffix](path)
    except Exception as error:  # each format has errors of its own
        return f"is not what its name says: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def _safetensors(path: Path) -> None:
    """Read the header, which says what lies where in the whole file."""
    from safetensors import safe_open

    with safe_open(path, "numpy"):
        pass


def _text(path: Path) -> None:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if "\0" in line:
                raise ValueError("it holds a zero byte, as no text does")


def _json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> None:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            json.loads(line)


def _parquet(path: Path) -> None:
    pq.read_metadata(path)


_READABLE: dict[str, Callable[[Path], None]] = {
    ".safetensors": _safetensors,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    **dict.fromkeys((".jinja", ".txt", ".md", ".svg", ".html"), _text),
}
