"""A published model loaded as its user loads it: the base model, the adapter on it, and the tokenizer beside that.

A full model is its own base model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import chat, loading, scoring, weights
from preference_tuning.models.compute import Compute
from preference_tuning.models.source import ModelSource


@dataclass
class Published:
    """A model to be read from."""

    model: Any
    tokenizer: chat.Tokenizer
    device: torch.device
    dtype: torch.dtype

    def token_logps(self, prompt: list[int], answers: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probability of every token of each answer to a prompt, in nats."""
        rows = scoring.layout([prompt] * len(answers), answers, shared=False, pad_id=0).to(self.device)
        if not len(rows.targets):
            return [[] for _ in answers]
        with torch.no_grad():
            found = scoring.token_scores(self.model, rows, self.dtype).logps.tolist()
        ends = list(itertools.accumulate(map(len, answers)))
        return [found[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def load(config: BaseModelConfig, source: ModelSource, folder: Path, output_dir: Path, compute: Compute) -> Published:
    """Load the model of a folder.

    Args:
        config: how the base model is loaded.
        source: where it lies; not looked at where the folder holds a full model.
        folder: weights, tokenizer and chat template.
        output_dir: where conversions are kept.
        compute: what it runs on.

    Raises:
        ConfigError: something of it cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    adapter = weights.is_adapter(folder)
    # What is trained whole lies in fp32, and was measured so.
    base = loading.load_base(config, source, output_dir, compute, full=not adapter, tuned=folder, tokenizer=tokenizer)
    model = loading.load_policy(base).eval()
    return Published(model, tokenizer, base.device, base.dtype)


def load_tokenizer(folder: Path) -> chat.Tokenizer:
    """Return the tokenizer of a published model's folder, as it lies there.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the tokenizer of the published model cannot be read: {reason}") from None
