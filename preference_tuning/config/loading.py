"""Reading a run config: ZenML's YAML, checked whole, every problem with its file and line.

ZenML ignores unknown keys at several levels without a word; nothing here does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from preference_tuning.config import beside
from preference_tuning.config.data import DataConfig
from preference_tuning.config.document import Document, override, parse
from preference_tuning.config.explaining import explain, key_path, without
from preference_tuning.config.schema import RunConfig
from preference_tuning.errors import ConfigError


@dataclass(frozen=True)
class RunFile:
    """A valid run config: typed, and as the document that ZenML reads."""

    config: RunConfig
    document: dict[str, Any]


def load(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read, check and return the run config at ``path``, with ``overrides`` such as ``dpo.beta=0.1`` applied.

    Raises:
        ConfigError: with one line for each problem found, in the order of the file.
    """
    document = parse(path)
    for text in overrides:
        override(document, text, beside.ZENML_KEYS)
    config = _validate(document)
    if document.problems or config is None:
        raise ConfigError(document.message())
    return RunFile(config, document.values)


def load_data(source: str, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the config of a data source that stands alone, with ``overrides`` such as ``data.held_out=0.1`` applied.

    Raises:
        ConfigError: as ``load``.
    """
    document = Document("the command line")
    # A run config needs a base model; this one is never looked at.
    document.values = {"parameters": {"base_model": {"source": "none"}, "data": {"source": source}}}
    for text in overrides:
        if not text.startswith("data."):
            document.problems.append(("--set", text, "without a run config only data.NAME=VALUE can be set"))
        override(document, text, beside.ZENML_KEYS)
    config = _validate(document)
    if document.problems or config is None:
        raise ConfigError(document.message())
    return config.data


def _validate(document: Document) -> RunConfig | None:
    beside.check(document)
    parameters = document.values.get("parameters")
    if not isinstance(parameters, dict):
        document.problem(("parameters",), "is required: the section that holds base_model, data, sft, dpo, ...")
        return None
    config = _validated(document, parameters)
    if config is not None:
        for loc, message in config.contradictions():
            document.problem(("parameters", *loc), message)
    return config


def _validated(document: Document, parameters: dict[str, Any]) -> RunConfig | None:
    """Return the config, or what is left of it without the wrong fields so that the cross-field rules still run."""
    for attempt in range(2):
        try:
            return RunConfig.model_validate(parameters)
        except ValidationError as error:
            if attempt:
                return None
            for item in error.errors():
                loc = key_path(item["loc"], parameters)
                document.problem(("parameters", *loc), explain(item, loc, parameters))
            parameters = without(parameters, [key_path(e["loc"], parameters) for e in error.errors()])
    return None
