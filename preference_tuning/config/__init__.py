"""The run config: one default for each setting, ranges, cross-field rules, and a loader that reports every problem.

Imports neither torch nor zenml, so that a typo is answered at once.
"""

from preference_tuning.config.loading import RunFile, load, load_data
from preference_tuning.config.schema import (
    BaseModelConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    LoraConfig,
    Origin,
    Problems,
    RegistryConfig,
    RunConfig,
    SFTConfig,
    SFTSourceConfig,
    SourceConfig,
    StageConfig,
    TrackingConfig,
)

__all__ = [
    "BaseModelConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "Origin",
    "Problems",
    "RegistryConfig",
    "RunConfig",
    "RunFile",
    "SFTConfig",
    "SFTSourceConfig",
    "SourceConfig",
    "StageConfig",
    "TrackingConfig",
    "load",
    "load_data",
]
