"""A tuned model as one set of weights: the adapter merged into its base model in fp32, then rounded once."""

import json
import math
import shutil
import struct
import sys
from pathlib import Path
from typing import Any, Literal

from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.jobs import machine_memory
from preference_tuning.models import loading, published, weights
from preference_tuning.models.compute import Compute
from preference_tuning.models.source import ModelSource
from preference_tuning.progress import bar

Precision = Literal["bfloat16", "float16", "float32"]
SIZE: dict[Precision, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes a parameter."""
GB = 1e9


def merge(
    config: BaseModelConfig, source: ModelSource, folder: Path, output_dir: Path, dtype: Precision, target: Path
) -> int:
    """Write the model of a folder as a whole one, with its tokenizer and chat template; return its parameters.

    Args:
        config: of the base model.
        source: where it lies; not looked at where the folder holds a full model, which is only rounded.
        folder: an adapter, or a full model.
        output_dir: where conversions are kept.
        dtype: of the written weights.
        target: a new or empty folder.

    Raises:
        ConfigError: the base model cannot be loaded, or not be merged with.
        PreferenceTuningError: memory or disk are too small, or what was written is not healthy.
    """
    import torch

    parts = folder if not weights.is_adapter(folder) else loading.model_folder(source, output_dir)
    count = sum(parameters(parts / name) for name in weights.files(parts) if name.endswith(".safetensors"))
    _check_room(count, dtype, target)
    plain = config.model_copy(update={"backend": "transformers", "load_in_4bit": False})
    model = _whole(published.load(plain, source, folder, output_dir, exact()).model, config)
    tokenizer = published.load_tokenizer(folder)
    _stop_where_it_learned_to(model, tokenizer)
    model.to(getattr(torch, dtype))
    # The trainer switches the cache off; whoever loads the model wants to generate with it.
    model.config.use_cache = True
    with bar("writing the merged model", 1):
        model.save_pretrained(target, max_shard_size=weights.SHARD_SIZE)
        tokenizer.save_pretrained(target)
    if problem := weights.problem(target):
        raise PreferenceTuningError(f"the merged model in {dtype} is not healthy: {problem}")
    return count


def exact() -> Compute:
    """Return what whole models are made and looked at on: fp32, where sums do not depend on the machine."""
    import torch

    return Compute(device="cpu", dtype="float32", attention="sdpa", threads=torch.get_num_threads(), reason="exact")


def parameters(path: Path) -> int:
    """Return how many values the tensors of a safetensors file have; reads its header only."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _whole(model: Any, config: BaseModelConfig) -> Any:
    """Return the model with its adapter, if it has one, merged into the weights."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    if getattr(inner.config, "quantization_config", None):
        raise ConfigError(
            f"base_model.source: the weights of {config.source} are quantised, and an adapter cannot be merged into "
            "them; publish the adapter, or name the model before it was quantised"
        )
    try:
        inner.generation_config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"base_model.source: the merged model could not be saved, generation_config.json is invalid: {error}"
        ) from None
    return model.merge_and_unload(progressbar=False, safe_merge=True) if inner is not model else model


def _stop_where_it_learned_to(model: Any, tokenizer: Any) -> None:
    """Let generation also stop at the end token of the chat template, which the base model may not have known."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def _check_room(count: int, dtype: Precision, target: Path) -> None:
    """Say what merging needs, and refuse what the machine does not have.

    Raises:
        PreferenceTuningError: too little memory or disk.
    """
    memory, disk = 4 * count / GB, SIZE[dtype] * count / GB
    print(f"  merging {count:,} parameters: {memory:.1f} GB of memory, {disk:.1f} GB of disk", file=sys.stderr)
    there, free = machine_memory.of_machine() / GB, shutil.disk_usage(target.parent).free / GB
    if memory > there:
        raise PreferenceTuningError(
            f"merging needs {memory:.1f} GB of memory for the weights in fp32, and this machine has {there:.1f} GB"
        )
    if disk > free:
        raise PreferenceTuningError(f"merging needs {disk:.1f} GB of disk, and {target.parent} has {free:.1f} GB free")
