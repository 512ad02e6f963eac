"""What a training stage leaves in its folder: a LoRA adapter or a full model, told apart, saved, restored, examined.

Importing this module needs no torch: the registry and the checkpoints ask it about files only.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from preference_tuning.config import BaseModelConfig, portable

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"

SHARD_SIZE = "5GB"
"""Largest file of a saved full model; a larger model lies in several, listed in its index."""

KEPT = (".safetensors", ".json", ".jinja", ".txt")
"""What is kept of all that libraries save: weights, settings, tokenizer and templates. No pickle, no model card that
peft makes up, no second form of a vocabulary that ``tokenizer.json`` has."""

LARGEST = 1e4
"""No healthy weight is larger."""

OF_NUMPY = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Types of tensors in a file that numpy has as well; bfloat16 is not among them."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter; else it holds a full model."""
    return (folder / ADAPTER_CONFIG).is_file()


def files(folder: Path) -> list[str]:
    """Return the names of the files that must hold the weights; those of a large model are listed in its index."""
    if is_adapter(folder):
        return [ADAPTER]
    if not (folder / INDEX).is_file():
        return [MODEL]
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [INDEX, *sorted(set(index["weight_map"].values()))]


def save(
    model: Any, tokenizer: Any, folder: Path, config: BaseModelConfig, gathered: dict[str, Any] | None = None
) -> None:
    """Write an adapter or a full model, its tokenizer and chat template; equal weights give equal bytes.

    Args:
        model: a PeftModel, whose adapter is written, or a transformers model, written whole in its own precision.
        tokenizer: with the chat template of the run.
        folder: made if it is not there.
        config: where the base model comes from, a hub id at its commit; an adapter's settings say so.
        gathered: the weights of a model that is shared out over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, config, gathered)
    else:
        # The trainer switches the cache off; whoever loads the model wants to generate with it.
        model.config.use_cache = True
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE, state_dict=gathered)
    tokenizer.save_pretrained(folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()


def _save_adapter(model: Any, folder: Path, config: BaseModelConfig, gathered: dict[str, Any] | None) -> None:
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=gathered)
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = portable(config.source)
    settings["revision"] = config.revision
    # A set in peft: its order follows PYTHONHASHSEED.
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def restore(model: Any, folder: Path) -> None:
    """Set every weight of a full model to that of a checkpoint.

    transformers' own way skips names that do not match without an error. Some architectures are saved under other
    names than they have in memory, so the files are read as a model first, which for a moment is a second one.

    Raises:
        RuntimeError: the weights are not those of this model.
    """
    stored = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(stored.state_dict())


def largest(model: Any) -> float:
    """Return the largest magnitude among the trained weights of a model; NaN if one of them is NaN."""
    import torch

    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return float(torch.nn.utils.get_total_norm(trained, norm_type=math.inf))


def problem(folder: Path) -> str | None:
    """Return what is wrong with saved weights (missing, cut off, non-finite, absurdly large), or None."""
    from safetensors import SafetensorError

    names = files(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        return f"{', '.join(missing)} is missing"
    for name in names:
        if name == INDEX:
            continue
        try:
            told = _sick(folder / name)
        except SafetensorError as error:
            return f"{name} cannot be read: {error}"
        if told:
            return told
    return None


def _sick(path: Path) -> str | None:
    from safetensors import safe_open

    framework = _framework(path)
    library = importlib.import_module({"np": "numpy", "pt": "torch"}[framework])
    with safe_open(path, framework) as stored:
        for key in stored.keys():  # noqa: SIM118 (not a dict)
            weight = stored.get_tensor(key)
            if not library.isfinite(weight).all():
                return f"{key} has values that are not finite"
            if abs(weight).max() > LARGEST:
                return f"{key} reaches {abs(weight).max():.3g}, far beyond any healthy weight"
    return None


def _framework(path: Path) -> Literal["np", "pt"]:
    """Return what to read weights with: numpy, as torch takes seconds to import, unless it lacks their types."""
    from safetensors import safe_open

    with safe_open(path, "np") as stored:
        types = {stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118 (not a dict)
    return "np" if types <= OF_NUMPY else "pt"
