"""The config's sections as TRL's arguments: every field arrives, and nothing is left to a default that bites."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import trl

from preference_tuning.config import DPOConfig, SFTConfig, StageConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models.loading import Base


def sft(config: SFTConfig, base: Base, checkpoints: Path, fsdp: str = "off") -> trl.SFTConfig:
    """Return the arguments of the SFT trainer."""
    settings = trl.SFTConfig(
        **_common(config, base, checkpoints, fsdp), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
    )
    return _on_one_device(settings)


def dpo(config: DPOConfig, base: Base, checkpoints: Path, fsdp: str = "off") -> trl.DPOConfig:
    """Return the arguments of the DPO trainer."""
    settings = trl.DPOConfig(
        **_common(config, base, checkpoints, fsdp),
        beta=config.beta,
        loss_type=list(config.loss_type),
        loss_weights=list(config.loss_weights) if config.loss_weights else None,
        label_smoothing=config.label_smoothing,
        # Rows are tokenised and cut before they reach the trainer.
        max_length=None,
    )
    return _on_one_device(settings)


def _on_one_device(settings: Any) -> Any:
    """Keep a process to one device: beside others, transformers would use torch.nn.DataParallel."""
    settings._n_gpu = min(settings.n_gpu, 1)
    if settings.device.type == "cpu":
        # Among several processes it would be "cpu:0", onto which torch.load cannot load a checkpoint.
        settings._setup_devices = torch.device("cpu")
    return settings


def sharding(fsdp: str, model: Any) -> dict[str, Any]:
    """Return the arguments that share out the weights of ``model`` over the processes, a decoder layer at a time.

    Raises:
        ConfigError: the model does not name the class of its layers.
    """
    if fsdp == "off":
        return {}
    layers = sorted(getattr(model, "_no_split_modules", None) or [])
    if not layers:
        raise ConfigError(f"training.fsdp: {type(model).__name__} does not say what its layers are; use fsdp: off")
    settings = {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": layers,
        # The first process gathers what a checkpoint and the adapter are written from.
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": settings}


def _common(config: StageConfig, base: Base, checkpoints: Path, fsdp: str) -> dict[str, Any]:
    on_cpu = base.device.type == "cpu"
    warmup = config.warmup_steps
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "optim": optimizer(config.optim, on_cpu),
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": int(warmup) if warmup >= 1 else warmup,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        # The other kind needs inputs that carry gradients; with frozen embeddings they do not.
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": on_cpu,
        # Our forward pass opens its own autocast. Under FSDP this switch would round the residual stream to 16 bits,
        # which the reference carries in 32.
        "bf16": base.dtype == torch.bfloat16 and fsdp == "off",
        "fp16": base.dtype == torch.float16,
        # Callbacks decide when to evaluate and save (training.callbacks.Shares); every step is logged and watched.
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
        **sharding(fsdp, base.model),
        # Every adapted layer is used in every step.
        "ddp_find_unused_parameters": False,
    }


def optimizer(wanted: str, on_cpu: bool) -> str:
    """Return the optimizer for ``auto``: 8-bit where it saves scarce memory, fused where it is 14 times faster.

    Raises:
        ConfigError: 8-bit steps need bitsandbytes, and it is not installed.
    """
    chosen = ("adamw_torch_fused" if on_cpu else "adamw_8bit") if wanted == "auto" else wanted
    if chosen.endswith("8bit") and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim: {chosen} needs bitsandbytes, which is not installed: pip install '.[gpu]', or choose adamw_torch"
        )
    return chosen
