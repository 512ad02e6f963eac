"""Ollama's Modelfile: the GGUF file, the template in Go's syntax, and the tokens that end an answer."""

import json
from dataclasses import dataclass
from pathlib import Path

from preference_tuning.errors import ConfigError
from preference_tuning.models import published
from preference_tuning.registry.export import templates
from preference_tuning.registry.folder import Version

MODELFILE = "Modelfile"
SETTINGS = "tokenizer_config.json"
QUOTES = '"""'


@dataclass(frozen=True)
class Prepared:
    """What the tokenizer of a version alone decides."""

    name: str
    template: str
    """In Go's syntax."""
    system: str
    """Of conversations that have none of their own; empty: none."""
    bos: bool | None
    """Whether the runtime puts the first token before a conversation; None: as the converter says."""
    stops: list[str]


def prepare(model: Path, template: Path | None) -> Prepared:
    """Find the Go template of a model.

    Args:
        model: the folder of its tokenizer.
        template: a file with one, used as it is.

    Raises:
        ConfigError: there is no known one that renders as the model's own, or the file is none.
    """
    tokenizer = published.load_tokenizer(model)
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if template is not None:
        return Prepared("as given", _read(template), "", None, stops)
    family, bos = templates.fit(tokenizer)
    end = family.assistant.after.strip()
    if end in tokenizer.get_vocab():
        stops = list(dict.fromkeys([end, *stops]))
    return Prepared(family.name, family.go(), family.default, bos, stops)


def _read(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"export: --template: cannot read {path}: {error}") from None
    if not any(name in text for name in (".Messages", ".Prompt")) or QUOTES in text:
        raise ConfigError(
            f"export: --template: {path} is no Go template for Ollama: it must use .Messages or .Prompt, and have no "
            f"{QUOTES} in it"
        )
    return text


def end_tokens(model: Path) -> list[str]:
    """Return the tokens that end an answer by the generation config of a merged model."""
    path = model / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = named if isinstance(named, list) else [named] if named is not None else []
    found: list[str] = published.load_tokenizer(model).convert_ids_to_tokens(ids)
    return [token for token in found if token]


def say_bos(model: Path, wanted: bool) -> None:
    """Make the settings of a tokenizer say whether its first token is added, so that a converter writes it down."""
    path = model / SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "add_bos_token" not in settings:
        path.write_text(json.dumps({**settings, "add_bos_token": wanted}, indent=2), encoding="utf-8")


def render(version: Version, prepared: Prepared, stops: list[str], file: str) -> str:
    """Return the Modelfile.

    Args:
        version: whose model it is.
        prepared: template and system text.
        stops: tokens that end an answer.
        file: name of the GGUF file beside it.
    """
    if QUOTES in prepared.system:
        raise ConfigError(
            f"export: the system text of the chat template holds {QUOTES}; give a template with --template"
        )
    lines = [
        f"# Version {version.id} of {version.name}; template: {prepared.name}.",
        f"FROM ./{file}",
        f"TEMPLATE {QUOTES}{prepared.template}{QUOTES}",
        *([f"SYSTEM {QUOTES}{prepared.system}{QUOTES}"] if prepared.system else []),
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    return "\n".join([*lines, ""])
