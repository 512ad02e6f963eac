"""Other kernels in a loaded model: Liger's, or compiled ones. The only module that knows liger_kernel."""

from typing import Any

from preference_tuning.errors import ConfigError
from preference_tuning.models import head


def apply_liger(model: Any) -> bool:
    """Put Liger's normalisation, rotary embedding and gated MLP into the model, if it knows the type of the model.

    Its fused losses stay off: they would replace the model's forward, and the head is applied to answer tokens only.

    Returns:
        Whether they are in place.

    Raises:
        ConfigError: the kernels cannot be imported.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ConfigError(f"liger-kernel cannot be imported ({error}); repair the package or remove it") from None
    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    monkey_patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def compile_decoder(model: Any) -> None:
    """Compile the stack of decoder layers in place, adapter included, with symbolic batch sizes and lengths.

    The head stays out of it: how many answer tokens it is applied to differs from batch to batch. ``TrainingArguments.
    torch_compile`` would wrap the whole model instead, and a forward that unwraps it then compiles nothing.
    """
    head.unwrap(model).base_model.compile(dynamic=True)
