"""What a GGUF file says of itself, against the model that it was made of."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning.errors import PreferenceTuningError

ADD_BOS = "tokenizer.ggml.add_bos_token"


class Found(BaseModel):
    """The facts of a GGUF file."""

    architecture: str
    vocabulary: int
    tensors: int
    bytes: int


def check(path: Path, model: Path) -> Found:
    """Compare a GGUF file with the directory of the model that it was made of.

    Raises:
        PreferenceTuningError: it is not a GGUF file, or not that of the model.
    """
    reader = _open(path)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    vocabulary, layers = len(tokens.data) if tokens else 0, config["num_hidden_layers"]
    names = {tensor.name for tensor in reader.tensors}
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("blk.")}
    wrong = []
    if vocabulary != config["vocab_size"]:
        wrong.append(f"it has {vocabulary} tokens, and the model {config['vocab_size']}")
    if not blocks >= set(range(layers)):
        wrong.append(f"it has {len(blocks)} layers, and the model {layers}")
    if "token_embd.weight" not in names:
        wrong.append("it has no embeddings")
    if _value(reader, "tokenizer.chat_template") != _template(model):
        wrong.append("its chat template is not the model's")
    if wrong:
        raise PreferenceTuningError(f"export: the GGUF file is not the model: {'; '.join(wrong)}")
    architecture = str(_value(reader, "general.architecture"))
    size = path.stat().st_size
    return Found(architecture=architecture, vocabulary=vocabulary, tensors=len(reader.tensors), bytes=size)


def set_bos(path: Path, wanted: bool) -> None:
    """Make a GGUF file say, in place, whether a runtime puts the first token before a text.

    Raises:
        PreferenceTuningError: the file says nothing of it, and runtimes then differ.
    """
    reader = _open(path, "r+")
    field = reader.get_field(ADD_BOS)
    if field is None:
        raise PreferenceTuningError(f"export: the GGUF file does not say whether a first token is added ({ADD_BOS})")
    field.parts[field.data[0]][0] = wanted
    reader.data.flush()


def _open(path: Path, mode: Any = "r") -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path, mode)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise PreferenceTuningError(f"export: what was written is not a GGUF file: {error}") from None


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field else None


def _template(model: Path) -> str | None:
    path = model / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    template: str | None = settings.get("chat_template")
    return template
