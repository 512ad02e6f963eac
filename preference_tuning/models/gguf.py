"""GGUF files, made into ordinary model directories once and kept by content hash.

transformers reads the weights rightly; the tokenizer it builds has the wrong special tokens and, for some models, the
wrong pre-tokenizer. Both are set here from the file's own metadata. The result carries the file's quantised weights,
rounded as they are: good for trying things out, no measure of the original model.
"""

import functools
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from preference_tuning.errors import ConfigError

_TEXT, _LIST = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of values in a GGUF file, as ``struct`` calls them."""


def folder(output_dir: Path, fingerprint: str) -> Path:
    """Return where the conversion of the file with this content hash is kept."""
    return output_dir / "models" / fingerprint[:16]


def convert(path: Path, target: Path) -> Path:
    """Write the model of a GGUF file as safetensors to ``target`` unless it is there, and return ``target``.

    Raises:
        ConfigError: the file's tokenizer is of a kind whose repair is not known, or the file cannot be read.
    """
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM

    print(f"  converting {path.name} to safetensors, once (about 20 s) ...", file=sys.stderr)
    with _told(path), read_once():
        tokenizer = _tokenizer(path)
        read = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    # save_pretrained refuses a model that remembers coming from a quantised file.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    return _write(target, tokenizer, model.to(torch.bfloat16))


def convert_tokenizer(path: Path, target: Path) -> Path:
    """Return a folder with the tokenizer of a GGUF file: that of the whole conversion if it is there, else its own.

    Raises:
        ConfigError: as ``convert``.
    """
    own = target.with_name(f"{target.name}-tokenizer")
    for there in (target, own):
        if (there / "tokenizer_config.json").is_file():
            return there
    with _told(path), read_once():
        return _write(own, _tokenizer(path))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
        raise ConfigError(f"base_model.source: cannot read {path}: {error}") from None


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    metadata = _metadata(path)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _repair(tokenizer, metadata, path)
    return tokenizer


def _write(target: Path, *parts: Any) -> Path:
    """Save a tokenizer, and a model if there is one, so that ``target`` is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    for part in parts:
        part.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:
        # Another process finished the same conversion first; the content is the same.
        shutil.rmtree(aside)
    return target


@contextmanager
def read_once() -> Iterator[None]:
    """Let one parsed file serve every reader: transformers parses the whole vocabulary anew four times, in Python."""
    import gguf

    original = gguf.GGUFReader
    if isinstance(original, type):  # the outermost of these blocks
        gguf.GGUFReader = functools.lru_cache(maxsize=1)(lambda path, *args: original(path, *args))
    try:
        yield
    finally:
        gguf.GGUFReader = original


def general(path: Path) -> dict[str, Any]:
    """Return what a GGUF file says of itself in general, such as its licence.

    Its description begins with it, and the vocabulary comes last, which gguf's own reader takes seconds to read. The
    form is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 and 3.
    """
    found: dict[str, Any] = {}
    with path.open("rb") as stream:
        magic, version, _, count = struct.unpack("<4sIQQ", stream.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            return found
        for _ in range(count):
            name = _string(stream)
            if name.startswith("tokenizer."):
                break
            value = _value(stream, *struct.unpack("<I", stream.read(4)))
            if name.startswith("general."):
                found[name.removeprefix("general.")] = value
    return found


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _string(stream)
    if kind == _LIST:
        inner, length = struct.unpack("<IQ", stream.read(12))
        return [_value(stream, inner) for _ in range(length)]
    form = f"<{_NUMBERS[kind]}"
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    return stream.read(length).decode("utf-8", "replace")


def _metadata(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise ConfigError(f"base_model.source: {path} is not a readable GGUF file: {error}") from None
    names = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "pre", "model")
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in names}
    fields["context"] = next((f for key, f in reader.fields.items() if key.endswith(".context_length")), None)
    return {name: field.contents() for name, field in fields.items() if field is not None}


def _repair(tokenizer: Any, metadata: dict[str, Any], path: Path) -> None:
    from tokenizers import decoders, pre_tokenizers

    kind = metadata.get("pre", metadata.get("model"))
    if kind != "smollm":
        raise ConfigError(
            f"base_model.source: {path} has a tokenizer of the kind {kind!r}; only 'smollm' is known to be read "
            "rightly from GGUF. Use the model's own directory or hub id"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        if key in metadata:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(metadata[key])))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = int(metadata.get("context", 2048))
