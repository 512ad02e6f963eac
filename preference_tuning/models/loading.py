"""Loading the base model, and the policy on it: a LoRA adapter, or every weight."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preference_tuning import hub
from preference_tuning.config import BaseModelConfig, LoraConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import chat, fused, gguf, kernels, weights
from preference_tuning.models.compute import Compute
from preference_tuning.models.source import ModelSource
from preference_tuning.models.tokenizer import load_tokenizer


@dataclass
class Base:
    """A loaded base model without an adapter, or the full model tuned from it, and what it runs on."""

    model: nn.Module
    tokenizer: chat.Tokenizer
    compute: Compute
    config: BaseModelConfig
    tuned: Path | None
    """The folder of the policy that goes on it, or of the full model that was loaded in its place."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return torch.device(self.compute.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the matrix products; trained weights and sums stay in fp32."""
        named: torch.dtype = getattr(torch, self.compute.dtype)
        return named


def model_folder(source: ModelSource, output_dir: Path) -> Path:
    """Return a local directory with the model's files: as they lie, downloaded, or converted from GGUF."""
    if source.kind == "hub":
        return hub.download_model(source.location, source.fingerprint)
    if source.kind == "gguf":
        return gguf.convert(Path(source.location), gguf.folder(output_dir, source.fingerprint))
    return Path(source.location)


def load_base(
    config: BaseModelConfig,
    source: ModelSource,
    output_dir: Path,
    compute: Compute,
    full: bool = False,
    tuned: Path | None = None,
    tokenizer: chat.Tokenizer | None = None,
) -> Base:
    """Load the frozen base model in its working precision, and give this process its number of threads.

    Args:
        config: the section of the run config.
        source: where the model lies.
        output_dir: where conversions are kept.
        compute: what it runs on.
        full: keep the weights in fp32, for training all of them and for comparison with models trained so.
        tuned: the folder of a policy; a full model there is loaded in place of the base model, also in fp32.
        tokenizer: that goes with the weights; None: the base model's, with the chat template of the config.

    Raises:
        ConfigError: the backend or the model's files do not allow it.
    """
    torch.set_num_threads(compute.threads)
    replaced = tuned is not None and not weights.is_adapter(tuned)
    folder = tuned if tuned is not None and replaced else model_folder(source, output_dir)
    kept_in = torch.float32 if full or replaced else getattr(torch, compute.dtype)
    model: nn.Module
    if config.backend == "unsloth":
        model = _load_with_unsloth(config, folder, compute)
    else:
        model = _load_with_transformers(config, folder, compute, kept_in)
    if compute.kernels == "liger" and not kernels.apply_liger(model):
        compute = compute.model_copy(update={"kernels": "torch"})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if compute.dtype == "bfloat16":
        _keep_residual_in_fp32(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(config, source, output_dir)
    return Base(model, tokenizer, compute, config, tuned)


def _load_with_transformers(config: BaseModelConfig, folder: Path, compute: Compute, kept_in: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    extra: dict[str, Any] = {"attn_implementation": compute.attention}
    if config.load_in_4bit:
        if compute.device != "cuda":
            raise ConfigError("base_model.load_in_4bit: 4-bit training needs CUDA, and this machine has none")
        if find_spec("bitsandbytes") is None:
            raise ConfigError("base_model.load_in_4bit: needs bitsandbytes, which is missing: pip install '.[gpu]'")
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute.dtype),
        )
        extra["device_map"] = {"": torch.cuda.current_device()}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kept_in, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"base_model.source: cannot load {config.source}: {str(error).splitlines()[0]}") from None
    loaded: nn.Module = model if config.load_in_4bit else model.to(compute.device)
    return loaded


def _load_with_unsloth(config: BaseModelConfig, folder: Path, compute: Compute) -> nn.Module:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=config.max_seq_length,
        dtype=getattr(torch, compute.dtype),
        load_in_4bit=config.load_in_4bit,
    )
    loaded: nn.Module = model
    return loaded


def _keep_residual_in_fp32(model: nn.Module) -> None:
    """Let the residual stream carry fp32: in bf16 a log-probability moves with the number of threads."""

    def widen(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    model.get_input_embeddings().register_forward_hook(widen)  # type: ignore[operator]


def new_policy(base: Base, lora: LoraConfig | None, seed: int) -> Any:
    """Return the policy that training starts from: a fresh adapter on the base model, or the base model whole.

    Raises:
        ConfigError: the model has no such modules to adapt, or cannot be saved.
    """
    return _train_all(base.model) if lora is None else new_adapter(base, lora, seed)


def load_policy(base: Base, trainable: bool = False) -> Any:
    """Return the policy of the folder that the base was loaded for (``Base.tuned``)."""
    assert base.tuned is not None
    if weights.is_adapter(base.tuned):
        return load_adapter(base, base.tuned, trainable)
    return _train_all(base.model) if trainable else base.model


def _train_all(model: Any) -> Any:
    """Make every weight trainable, embeddings and norms included; tied ones stay tied."""
    if getattr(model.config, "quantization_config", None):
        raise ConfigError(
            "base_model.source: the model's weights are quantised, and lora is null; such weights do not train. Give a "
            "lora section, or the model before it was quantised"
        )
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        # It would come up at the first checkpoint.
        raise ConfigError(
            f"base_model.source: the model could not be saved, its generation_config.json is invalid: {error}"
        ) from None
    return model.requires_grad_(True)


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
    return _ready(get_peft_model(model, settings))


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

    return _ready(PeftModel.from_pretrained(base.model, str(folder), adapter_name=name, is_trainable=trainable))


def load_adapters(base: Base, folders: dict[str, Path]) -> Any:
    """Return the base model with several named adapters on one set of weights, ready to be read from."""
    (first, folder), *others = folders.items()
    model = load_adapter(base, folder, name=first)
    for name, other in others:
        model.load_adapter(str(other), adapter_name=name)
    model.eval()
    return model


def _ready(model: Any) -> Any:
    """Fuse the adapter's layers, and forget the base model's name: at each save peft would look it up on the hub."""
    fused.fuse(model)
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = None
    return model
