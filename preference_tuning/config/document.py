"""A run config as a document: YAML with the line of every key, overrides, and the problems found so far."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from preference_tuning.errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_NODES = 20_000
"""Values in a file; aliases can multiply without end."""


@dataclass
class Document:
    """Parsed YAML with the line of every key, and the problems found so far as ``(where, path, message)``."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> None:
        """Note a problem of what lies at ``path``, with the line of the nearest key that is there."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), ())
        where = self.lines.get(known, f"{self.name}:1")
        self.problems.append((where, ".".join(map(str, path)), message))

    def message(self) -> str:
        """Return all problems, one a line, in the order of the file."""

        def order(problem: tuple[str, str, str]) -> tuple[int, str]:
            line = re.search(r":(\d+)$", problem[0])
            return (int(line.group(1)) if line else 0, problem[1])

        problems = sorted(dict.fromkeys(self.problems), key=order)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {where}: {name + ': ' if name else ''}{message}" for where, name, message in problems]
        return "\n".join([f"{count} in {self.name}", *lines])


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where 2e-6 is text and `on` is a truth value; this one reads numbers as people do."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def parse(path: Path) -> Document:
    """Return the file as a document.

    Raises:
        ConfigError: there is none, or it is not YAML of the right kind.
    """
    document = Document(str(path))
    text = _read(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(error, "problem", None) or "it is nested too deeply or not YAML"
        raise ConfigError(f"1 problem in {path}\n  {path}:{line}: not valid YAML: {reason}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"1 problem in {path}\n  {path}:1: a run config is a mapping with a `parameters` section")
    budget = iter(range(MAX_NODES))
    try:
        document.values = _build(document, loader, root, (), budget)
    except (StopIteration, RecursionError):
        raise ConfigError(f"1 problem in {path}\n  {path}:1: aliases expand to more than {MAX_NODES} values") from None
    return document


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no such run config: {path}{_nearby(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the run config {path}: {error}") from None


def _nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = sorted(str(candidate) for candidate in folder.glob("*.yaml"))
    return f" (there are {', '.join(found)})" if found else ""


def _build(document: Document, loader: _Loader, node: yaml.Node, path: KeyPath, budget: Iterator[int]) -> Any:
    next(budget)
    document.lines.setdefault(path, f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))  # type: ignore[no-untyped-call]
            here = (*path, key)
            line = f"{document.name}:{key_node.start_mark.line + 1}"
            if key in values:
                first = document.lines[here].rpartition(":")[2]
                document.problems.append(
                    (line, ".".join(map(str, here)), f"appears twice (first on line {first}); keep one")
                )
            document.lines[here] = line
            values[key] = _build(document, loader, value_node, here, budget)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, loader, item, (*path, i), budget) for i, item in enumerate(node.value)]
    _check_empty(document, path, node.value)
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as error:
        document.problem(path, f"not a plain value: {getattr(error, 'problem', None) or error}")
        return None


def _check_empty(document: Document, path: KeyPath, text: str) -> None:
    """Refuse ``lora:`` with nothing behind it, which YAML takes for null: that must be asked for in so many letters."""
    if path == ("parameters", "lora") and not text.strip():
        document.problem(path, "is empty; write null to train every weight, or leave it out to train a default adapter")


def override(document: Document, text: str, outside: Container[str]) -> None:
    """Set a value of the document.

    Args:
        document: is changed, and told of problems.
        text: such as ``dpo.beta=0.1``; the section ``parameters`` need not be named.
        outside: keys that stand beside that section.
    """
    name, equals, given = text.partition("=")
    keys = [key for key in name.strip().split(".") if key]
    if not equals or not keys:
        document.problems.append(("--set", text, "write it as NAME=VALUE, for example dpo.beta=0.1"))
        return
    path: KeyPath = tuple(keys) if keys[0] in outside else ("parameters", *keys)
    try:
        value = yaml.load(given, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        document.problems.append(("--set", name, f"{given!r} is not a YAML value"))
        return
    parent = document.values
    for key in path[:-1]:
        child = parent.setdefault(str(key), {})
        if not isinstance(child, dict):
            document.problems.append(("--set", name, f"{key} is not a section"))
            return
        parent = child
    parent[str(path[-1])] = value
    document.lines[path] = "--set"
    _check_empty(document, path, given)
