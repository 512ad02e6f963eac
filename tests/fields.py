"""The fields of a config section by their paths, and pointers to tests that prove one."""

import ast
from functools import cache
from pathlib import Path
from typing import Any, get_args

from preference_tuning.config.section import Section

TESTS = Path(__file__).parent


def paths(section: type[Section], prefix: str = "") -> list[str]:
    """Return ``data.columns.prompt`` and the like for every field of a section and of the sections in it."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        # A section that can be left out, or that comes as a list, is a setting in itself.
        found += [f"{prefix}{name}"] if inner != [field.annotation] else []
        found += dict.fromkeys(path for section in inner for path in paths(section, f"{prefix}{name}."))
    return found


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section that a field holds: itself, one or none, or a list of them."""
    return next(iter(sections_in(annotation)), None)


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field may hold; several where a list has items of several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


@cache
def tests_in(file: str) -> set[str]:
    """Return the names of the tests of a file."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def exists(pointer: str) -> bool:
    """Return whether ``test_data.py::test_name`` names a test that is there."""
    file, _, name = pointer.partition("::")
    return (TESTS / file).is_file() and name in tests_in(file)
