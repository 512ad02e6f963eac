"""Reading a run config: ZenML's YAML, checked whole, every problem with its file and line.

ZenML ignores unknown keys at several levels without a word; nothing here does.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from preference_tuning.config import secrecy
from preference_tuning.config.data import DataConfig
from preference_tuning.config.notify import UNKNOWN_RECEIVER
from preference_tuning.config.registry import UNKNOWN_TARGET
from preference_tuning.config.schema import RunConfig
from preference_tuning.config.section import UNSHOWN, Section
from preference_tuning.errors import ConfigError

KeyPath = tuple[str | int, ...]

STEPS = ("load_preferences", "train_sft", "train_dpo", "evaluate", "register", "push")

# What ZenML 0.98 accepts beside `parameters`. Copied because importing zenml takes seconds; a test compares the
# copies with the installed ZenML.
ZENML_KEYS = (
    "build", "cache_policy", "cleanup_hook_source", "enable_artifact_metadata", "enable_artifact_visualization",
    "enable_cache", "enable_heartbeat", "enable_pipeline_logs", "enable_step_logs", "end_hook_source", "environment",
    "execution_mode", "extra", "failure_hook_source", "init_hook_kwargs", "init_hook_source", "model", "parameters",
    "pause_hook_source", "resume_hook_source", "retry", "run_name", "schedule", "secrets", "settings",
    "start_hook_source", "steps", "substitutions", "success_hook_source", "tags",
)  # fmt: skip
ZENML_MODEL_KEYS = (
    "audience", "description", "ethics", "license", "limitations", "name", "save_models_to_registry", "tags",
    "trade_offs", "use_cases", "version",
)  # fmt: skip
ZENML_SCHEDULE_KEYS = (
    "catchup", "cron_expression", "end_time", "interval_second", "name", "run_once_start_time", "start_time",
)  # fmt: skip
ZENML_STEP_KEYS = (
    "cache_policy", "enable_artifact_metadata", "enable_artifact_visualization", "enable_cache", "enable_step_logs",
    "end_hook_source", "environment", "experiment_tracker", "extra", "failure_hook_source",
    "group", "heartbeat_healthy_threshold", "model", "outputs", "parameters", "retry", "runtime", "secrets",
    "settings", "start_hook_source", "step_operator", "substitutions", "success_hook_source",
)  # fmt: skip

MAX_NODES = 20_000


@dataclass(frozen=True)
class RunFile:
    """A valid run config: typed, and as the document that ZenML reads."""

    config: RunConfig
    document: dict[str, Any]


@dataclass
class _Document:
    """Parsed YAML with the line of every key, and the problems found so far as ``(where, path, message)``."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> None:
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), ())
        where = self.lines.get(known, f"{self.name}:1")
        self.problems.append((where, ".".join(map(str, path)), message))


def load(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read, check and return the run config at ``path``, with ``overrides`` such as ``dpo.beta=0.1`` applied.

    Raises:
        ConfigError: with one line for each problem found, in the order of the file.
    """
    document = _parse(path)
    for override in overrides:
        _apply(document, override)
    config = _validate(document)
    if document.problems or config is None:
        raise ConfigError(_message(document))
    return RunFile(config, document.values)


def load_data(source: str, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the config of a data source that stands alone, with ``overrides`` such as ``data.held_out=0.1`` applied.

    Raises:
        ConfigError: as ``load``.
    """
    document = _Document("the command line")
    # A run config needs a base model; this one is never looked at.
    document.values = {"parameters": {"base_model": {"source": "none"}, "data": {"source": source}}}
    for override in overrides:
        if not override.startswith("data."):
            document.problems.append(("--set", override, "without a run config only data.NAME=VALUE can be set"))
        _apply(document, override)
    config = _validate(document)
    if document.problems or config is None:
        raise ConfigError(_message(document))
    return config.data


def _message(document: _Document) -> str:
    def order(problem: tuple[str, str, str]) -> tuple[int, str]:
        line = re.search(r":(\d+)$", problem[0])
        return (int(line.group(1)) if line else 0, problem[1])

    problems = sorted(dict.fromkeys(document.problems), key=order)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"  {where}: {name + ': ' if name else ''}{message}" for where, name, message in problems]
    return "\n".join([f"{count} in {document.name}", *lines])


# --- YAML -----------------------------------------------------------------------------------------------------------


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


def _parse(path: Path) -> _Document:
    document = _Document(str(path))
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


def _build(document: _Document, loader: _Loader, node: yaml.Node, path: KeyPath, budget: Iterator[int]) -> Any:
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


def _check_empty(document: _Document, path: KeyPath, text: str) -> None:
    """Refuse ``lora:`` with nothing behind it, which YAML takes for null: that must be asked for in so many letters."""
    if path == ("parameters", "lora") and not text.strip():
        document.problem(path, "is empty; write null to train every weight, or leave it out to train a default adapter")


# --- overrides ------------------------------------------------------------------------------------------------------


def _apply(document: _Document, override: str) -> None:
    name, equals, text = override.partition("=")
    keys = [key for key in name.strip().split(".") if key]
    if not equals or not keys:
        document.problems.append(("--set", override, "write it as NAME=VALUE, for example dpo.beta=0.1"))
        return
    path: KeyPath = tuple(keys) if keys[0] in ZENML_KEYS else ("parameters", *keys)
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        document.problems.append(("--set", name, f"{text!r} is not a YAML value"))
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
    _check_empty(document, path, text)


# --- checks ---------------------------------------------------------------------------------------------------------


def _validate(document: _Document) -> RunConfig | None:
    _check_zenml_part(document)
    parameters = document.values.get("parameters")
    if not isinstance(parameters, dict):
        document.problem(("parameters",), "is required: the section that holds base_model, data, sft, dpo, ...")
        return None
    config = _validated(document, parameters)
    if config is not None:
        for loc, message in config.contradictions():
            document.problem(("parameters", *loc), message)
    return config


def _validated(document: _Document, parameters: dict[str, Any]) -> RunConfig | None:
    """Return the config, or what is left of it without the wrong fields so that the cross-field rules still run."""
    for attempt in range(2):
        try:
            return RunConfig.model_validate(parameters)
        except ValidationError as error:
            if attempt:
                return None
            for item in error.errors():
                loc = _key_path(item["loc"], parameters)
                document.problem(("parameters", *loc), _explain(item, loc, parameters))
            parameters = _without(parameters, [_key_path(e["loc"], parameters) for e in error.errors()])
    return None


def _key_path(loc: tuple[int | str, ...], parameters: Any) -> KeyPath:
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


def _explain(item: Any, loc: KeyPath, parameters: Any) -> str:
    if item["type"] == "extra_forbidden":
        key = str(loc[-1])
        elsewhere = [f"{name}.{key}" for name in RunConfig.model_fields if key in _fields((name,), parameters)]
        if elsewhere:
            return f"unknown key here; there is {' and '.join(elsewhere)}"
        return _unknown(key, _fields(loc[:-1], parameters))
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


def _unknown(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
    return f"unknown key; {hint}"


def _without(parameters: dict[str, Any], paths: list[KeyPath]) -> dict[str, Any]:
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


def _check_zenml_part(document: _Document) -> None:
    values = document.values
    for path, message in secrecy.problems(values):
        document.problem(path, message)
    for key in values:
        if key not in ZENML_KEYS:
            hint = f"; it belongs under parameters: {key}" if key in RunConfig.model_fields else ""
            document.problem((key,), "unknown key" + hint if hint else _unknown(key, ZENML_KEYS))
    _check_keys(document, ("model",), ZENML_MODEL_KEYS)
    _check_no_retry(document, ())
    _check_keys(document, ("schedule",), ZENML_SCHEDULE_KEYS)
    _check_keys(document, ("steps",), STEPS)
    if isinstance(values.get("model"), dict) and not values["model"].get("name"):
        document.problem(("model",), "needs a name")
    given = values.get("steps")
    steps: dict[str, Any] = given if isinstance(given, dict) else {}
    for step in steps:
        _check_keys(document, ("steps", step), ZENML_STEP_KEYS)
        _check_no_retry(document, ("steps", step))
        if isinstance(steps[step], dict) and "parameters" in steps[step]:
            document.problem(("steps", step, "parameters"), "set the section under the top-level parameters instead")


def _check_no_retry(document: _Document, path: KeyPath) -> None:
    """Refuse ZenML's own retries: they do everything again, also what a signal, the config or divergence ended."""
    value: Any = document.values
    for key in path:
        value = value[key]
    if isinstance(value, dict) and "retry" in value:
        document.problem(
            (*path, "retry"),
            "ZenML would also retry after a signal, a config error or divergence; "
            "parameters.training.retries repeats what is transient",
        )


def _check_keys(document: _Document, path: KeyPath, known: tuple[str, ...]) -> None:
    value: Any = document.values
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return
    if not isinstance(value, dict):
        document.problem(path, f"{value!r}: must be a mapping")
        return
    for key in value:
        if key not in known:
            document.problem((*path, key), _unknown(key, known))
