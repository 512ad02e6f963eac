"""The run config: one default for each setting, ranges, cross-field rules, and a loader that reports every problem.

Imports neither torch nor zenml, so that a typo is answered at once.
"""

from preference_tuning.config.data import Columns, DataConfig, Origin, Problems, SFTSourceConfig, SourceConfig
from preference_tuning.config.evaluation import EvaluationConfig, GateConfig
from preference_tuning.config.harness import HarnessConfig
from preference_tuning.config.judge import JudgeConfig
from preference_tuning.config.loading import RunFile, load, load_data
from preference_tuning.config.notify import AlerterNotify, CommandNotify, Receiver, WebhookNotify
from preference_tuning.config.place import portable
from preference_tuning.config.registry import CometPush, HuggingFacePush, MLflowPush, PushTarget, RegistryConfig
from preference_tuning.config.retrain import RetrainConfig
from preference_tuning.config.schema import (
    BaseModelConfig,
    DPOConfig,
    LoraConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    TrackingConfig,
)
from preference_tuning.config.section import PORTABLE
from preference_tuning.config.training import TrainingConfig

__all__ = [
    "PORTABLE",
    "AlerterNotify",
    "BaseModelConfig",
    "Columns",
    "CometPush",
    "CommandNotify",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateConfig",
    "HarnessConfig",
    "HuggingFacePush",
    "JudgeConfig",
    "LoraConfig",
    "MLflowPush",
    "Origin",
    "Problems",
    "PushTarget",
    "Receiver",
    "RegistryConfig",
    "RetrainConfig",
    "RunConfig",
    "RunFile",
    "SFTConfig",
    "SFTSourceConfig",
    "SourceConfig",
    "StageConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WebhookNotify",
    "load",
    "load_data",
    "portable",
]
