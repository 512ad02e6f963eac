"""Log-probabilities of pairs, kept by what they depend on: computed by one job, read by itself again and by others."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from preference_tuning import fingerprint


def place(output_dir: Path, key: str) -> Path:
    """Return the file for the log-probabilities that ``key_of`` names, where every job looks for them."""
    return output_dir / "scores" / f"{key}.safetensors"


def key_of(rows: str, weights: str, base_model: str, dtype: torch.dtype, shared: bool, batch_size: int) -> str:
    """Return the key of a model's log-probabilities on rows.

    What decides them is in it. Threads and attention kernels, which may move last bits, are not: jobs of one output
    folder share them (``models.compute``).

    Args:
        rows: the key of the token rows (content, tokenizer and template, room).
        weights: hash of the tuned weights.
        base_model: fingerprint of the base model.
        dtype: precision of the matrix products.
        shared: whether rows run as a token tree.
        batch_size: pairs at once.
    """
    code = fingerprint.of_sources("preference_tuning.models.scoring")
    return fingerprint.of_value([rows, weights, base_model, str(dtype), shared, batch_size, code])[:32]


def read(path: Path, key: str) -> Tensor | None:
    """Return the log-probabilities [rows, 2] of chosen and rejected, or None where there are none under this key."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as stored:
        values: Tensor = stored.get_tensor("logps")
        return values if (stored.metadata() or {}).get("key") == key else None


def write(path: Path, key: str, logps: Tensor) -> None:
    """Write log-probabilities aside and put them in place in one step; two jobs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    save_file({"logps": logps}, aside, metadata={"key": key})
    aside.replace(path)
