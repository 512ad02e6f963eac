"""Content hashes: of files, directories, values and of this library's own sources.

Evidence is bound to content, never to names or times, so every identity in the project comes from here.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest(folder: Path, skip: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"bytes": size, "sha256": hex}}`` of every file below ``folder``, sorted by path."""
    skipped = set(skip)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: {"bytes": path.stat().st_size, "sha256": of_file(path)}
        for name, path in named.items()
        if name not in skipped
    }


def of_directory(folder: Path) -> str:
    """Return one hash over the relative paths and bytes of all files below ``folder``."""
    return of_value(manifest(folder))


def of_path(path: Path) -> str:
    """Return the content hash of a file or of a directory."""
    return of_directory(path) if path.is_dir() else of_file(path)


def of_value(value: Any) -> str:
    """Return the sha256 of a JSON-like value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sources(*modules: str) -> list[Path]:
    """Return the source files that ``modules`` of this library run on: their own and, transitively, their imports.

    Found by reading the import statements, so no list has to be kept: a step whose cache key holds these files is
    run again after an edit of any code it executes, and only then.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = _module_file(module)
        if module in found or path is None:
            continue
        found[module] = path
        waiting.extend(_imported(path))
        if path.name == "__init__.py" and module in modules:
            waiting.extend(f"{module}.{child.stem}" for child in path.parent.glob("*.py") if child.stem != "__init__")
    return sorted(set(found.values()))


def of_sources(*modules: str) -> str:
    """Return one hash over the sources of ``modules``, as ``sources`` finds them."""
    return of_value({path.relative_to(PACKAGE).as_posix(): of_file(path) for path in sources(*modules)})


@functools.cache
def _module_file(module: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file() and PACKAGE in candidate.parents:
            return candidate
    return None


@functools.cache
def _imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import name` may name a module or something inside one; try both.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith(PACKAGE.name)]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements below a node, however deep; expressions are most of a tree, and import nothing."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, block, ()):
            yield node
            yield from _statements(node)
