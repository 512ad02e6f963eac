"""Making the backend of the config ready, before anything imports transformers."""

import os

from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError


def activate(config: BaseModelConfig) -> None:
    """Import unsloth if the config asks for it; it must come before transformers and trl.

    Raises:
        ConfigError: it is not installed, or there is no CUDA device.
    """
    if config.backend != "unsloth":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("base_model.backend: unsloth needs a CUDA GPU, and none is visible; use transformers")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        import unsloth  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"base_model.backend: unsloth cannot be imported ({error}); pip install '.[gpu]'") from None
