"""The run config: one default for each setting, ranges, cross-field rules, and a loader that reports every problem.

Imports neither torch nor zenml, so that a typo is answered at once.
"""

from preference_tuning.config.loading import RunFile, load
from preference_tuning.config.schema import (
    BaseModelConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    LoraConfig,
    RegistryConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    TrackingConfig,
)

__all__ = [
    "BaseModelConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "RegistryConfig",
    "RunConfig",
    "RunFile",
    "SFTConfig",
    "StageConfig",
    "TrackingConfig",
    "load",
]
