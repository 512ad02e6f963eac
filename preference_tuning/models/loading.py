"""Loading the base model and its adapter, and writing an adapter that is the same bytes for the same weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preference_tuning import hub
from preference_tuning.config import BaseModelConfig, LoraConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import chat, gguf
from preference_tuning.models.source import ModelSource
from preference_tuning.models.tokenizer import load_tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass
class Base:
    """A loaded base model without an adapter, and what it runs on."""

    model: nn.Module
    tokenizer: chat.Tokenizer
    device: torch.device
    dtype: torch.dtype
    """Precision of the matrix products; adapter weights and sums stay in fp32."""
    config: BaseModelConfig


def activate_backend(config: BaseModelConfig) -> None:
    """Import unsloth if the config asks for it; it must come before transformers and trl.

    Raises:
        ConfigError: it is not installed, or there is no CUDA device.
    """
    if config.backend != "unsloth":
        return
    if not torch.cuda.is_available():
        raise ConfigError("base_model.backend: unsloth needs a CUDA GPU, and none is visible; use transformers")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"base_model.backend: unsloth cannot be imported ({error}); pip install '.[gpu]'") from None


def pick_device(wanted: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: cuda is asked for and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("base_model.device: cuda is asked for, and torch sees no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the precision for ``auto`` or a named one: bfloat16 where the hardware has instructions for it."""
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    abilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else torch.float32


def model_folder(source: ModelSource, output_dir: Path) -> Path:
    """Return a local directory with the model's files: as they lie, downloaded, or converted from GGUF."""
    if source.kind == "hub":
        return hub.download_model(source.location, source.fingerprint)
    if source.kind == "gguf":
        return gguf.convert(Path(source.location), gguf.folder(output_dir, source.fingerprint))
    return Path(source.location)


def load_base(config: BaseModelConfig, source: ModelSource, output_dir: Path) -> Base:
    """Load the frozen base model in its working precision.

    Raises:
        ConfigError: the device, the backend or the model's files do not allow it.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder = model_folder(source, output_dir)
    model: nn.Module
    if config.backend == "unsloth":
        model = _load_with_unsloth(config, folder, dtype)
    else:
        model = _load_with_transformers(config, folder, device, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if dtype == torch.bfloat16:
        _keep_residual_in_fp32(model)
    return Base(model, load_tokenizer(config, source, output_dir), device, dtype, config)


def _load_with_transformers(
    config: BaseModelConfig, folder: Path, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Measured on a CPU: in bfloat16 eager attention is 1.6 times as fast as SDPA at the lengths of short answers; in
    # fp32 only SDPA gives the same gradients whatever the number of threads (eager's softmax does not).
    eager = device.type == "cpu" and dtype != torch.float32
    extra: dict[str, Any] = {"attn_implementation": "eager" if eager else "sdpa"}
    if config.load_in_4bit:
        if device.type != "cuda":
            raise ConfigError("base_model.load_in_4bit: 4-bit training needs CUDA, and this machine has none")
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        extra["device_map"] = {"": torch.cuda.current_device()}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"base_model.source: cannot load {config.source}: {str(error).splitlines()[0]}") from None
    loaded: nn.Module = model if config.load_in_4bit else model.to(device)
    return loaded


def _load_with_unsloth(config: BaseModelConfig, folder: Path, dtype: torch.dtype) -> nn.Module:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=config.max_seq_length,
        dtype=dtype,
        load_in_4bit=config.load_in_4bit,
    )
    loaded: nn.Module = model
    return loaded


def _keep_residual_in_fp32(model: nn.Module) -> None:
    """Let the residual stream carry fp32: in bf16 a log-probability moves with the number of threads."""

    def widen(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    model.get_input_embeddings().register_forward_hook(widen)  # type: ignore[operator]


def new_adapter(base: Base, lora: LoraConfig, seed: int) -> Any:
    """Return the base model with a fresh LoRA adapter in fp32, drawn from ``seed``.

    Raises:
        ConfigError: the model has none of the modules named in ``lora.target_modules``.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    names = {name.rpartition(".")[2] for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    missing = [module for module in lora.target_modules if module not in names]
    if missing:
        there = ", ".join(sorted(names))
        raise ConfigError(f"lora.target_modules: the model has no {', '.join(missing)}; its linear modules: {there}")
    torch.manual_seed(seed)
    if base.config.backend == "unsloth":
        return _new_adapter_with_unsloth(base, lora, seed)
    model: Any = base.model
    if base.config.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return _nameless(get_peft_model(model, settings))


def _new_adapter_with_unsloth(base: Base, lora: LoraConfig, seed: int) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        base.model,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_gradient_checkpointing=False,
        random_state=seed,
    )


def load_adapter(base: Base, folder: Path, trainable: bool = False, name: str = "default") -> Any:
    """Return the base model with the adapter saved in ``folder``."""
    from peft import PeftModel

    return _nameless(PeftModel.from_pretrained(base.model, str(folder), adapter_name=name, is_trainable=trainable))


def load_adapters(base: Base, folders: dict[str, Path]) -> Any:
    """Return the base model with several named adapters on one set of weights, ready to be read from."""
    (first, folder), *others = folders.items()
    model = load_adapter(base, folder, name=first)
    for name, other in others:
        model.load_adapter(str(other), adapter_name=name)
    model.eval()
    return model


def _nameless(model: Any) -> Any:
    """Forget the base model's name while training: at each save peft would look it up on the hub."""
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = None
    return model


def save_adapter(
    model: Any,
    tokenizer: chat.Tokenizer,
    folder: Path,
    config: BaseModelConfig,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter, its tokenizer and chat template to ``folder``; equal weights give equal bytes.

    ``weights`` is the gathered state of a model that is shared out over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = config.source
    settings["revision"] = config.revision
    # A set in peft: its order follows PYTHONHASHSEED.
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_problem(folder: Path) -> str | None:
    """Return what is wrong with a saved adapter's weights (missing, non-finite, absurdly large), or None."""
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return f"{ADAPTER_WEIGHTS} is missing"
    for name, weight in load_file(path).items():
        if not torch.isfinite(weight).all():
            return f"{name} has values that are not finite"
        if weight.abs().max() > 1e4:
            return f"{name} reaches {weight.abs().max():.3g}, far beyond any healthy adapter weight"
    return None
