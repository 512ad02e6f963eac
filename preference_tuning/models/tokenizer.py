"""The tokenizer of a base model, without its weights: what checking the data needs, and what every job starts with."""

from pathlib import Path

from preference_tuning import hub
from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import chat, gguf
from preference_tuning.models.source import ModelSource


def load_tokenizer(config: BaseModelConfig, source: ModelSource, output_dir: Path) -> chat.Tokenizer:
    """Return the tokenizer with the chat template of the run.

    Raises:
        ConfigError: it cannot be read, or there is no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_folder(source, output_dir))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"base_model.source: cannot read the tokenizer of {config.source}: {reason}") from None
    chat.set_template(tokenizer, config.chat_template)
    return tokenizer


def _folder(source: ModelSource, output_dir: Path) -> Path:
    if source.kind == "hub":
        return hub.download_tokenizer(source.location, source.fingerprint)
    if source.kind == "gguf":
        return gguf.convert_tokenizer(Path(source.location), gguf.folder(output_dir, source.fingerprint))
    return Path(source.location)
