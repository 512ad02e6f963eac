"""The one pipeline: load preferences -> SFT -> DPO (only for finetuning_type dpo) -> evaluate -> register -> push.

Wiring and cache policy, nothing else. It starts with `python run.py train CONFIG`, or with ZenML's own
`zenml pipeline run pipelines.training.training -c CONFIG`; both check the whole config first.
"""

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from zenml.client import Client
from zenml.config import CachePolicy
from zenml.enums import ExecutionMode
from zenml.pipelines.pipeline_definition import Pipeline

from pipelines import naming, stack, startup  # noqa: F401 (startup takes effect when it is imported)
from pipelines.recording import written_down
from pipelines.runs import alive
from pipelines.telling import told
from preference_tuning import fingerprint, preflight
from preference_tuning.config import (
    BaseModelConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    LoraConfig,
    Receiver,
    RegistryConfig,
    RetrainConfig,
    RunConfig,
    SFTConfig,
    TrackingConfig,
    TrainingConfig,
    load,
)
from preference_tuning.data.job import fingerprints_of
from preference_tuning.evaluation.job import inputs_of
from preference_tuning.models.source import locate, template_file
from preference_tuning.tracking import recording
from steps.context import give_secrets
from steps.evaluate import evaluate
from steps.load_preferences import load_preferences
from steps.push import push
from steps.register import register
from steps.train_dpo import train_dpo
from steps.train_sft import train_sft

OPTIONS = "options"
"""In the ``extra`` of a run: what its file said to ZenML, for whoever resumes it."""
OWN = ("parameters", "run_name", "schedule")
"""Of a file: what a run has in its own right, or for itself alone."""

_runs_later: ContextVar[bool] = ContextVar("runs_later", default=False)
"""Whether the pipeline is compiled for a schedule."""


def covering(base_model: BaseModelConfig, *modules: str) -> CachePolicy:
    """Return the cache policy of a step that runs on ``modules``: an edit of any code they use runs it again.

    So does an edit of the chat template's file, of which the step's parameters hold the name only.
    """
    root, template = fingerprint.PACKAGE.parent, template_file(base_model)
    files = [*fingerprint.sources(*modules), *([template] if template else [])]
    return CachePolicy(file_dependencies=[os.path.relpath(path, root) for path in files])


def _training(
    base_model: BaseModelConfig,
    data: DataConfig,
    finetuning_type: Literal["sft", "dpo"] = "sft",
    output_dir: str = "outputs",
    lora: LoraConfig | None = LoraConfig(),
    sft: SFTConfig = SFTConfig(),
    dpo: DPOConfig = DPOConfig(),
    training: TrainingConfig = TrainingConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    registry: RegistryConfig = RegistryConfig(),
    tracking: TrackingConfig = TrackingConfig(),
    retrain: RetrainConfig = RetrainConfig(),
    notify: tuple[Receiver, ...] = (),
) -> None:
    """Tune a base model on preference pairs; each parameter is a section of the run config."""
    # Steps read output_dir and tracking from the run: where things go does not decide what is cached.
    model: dict[str, Any] = {"base_model": base_model, "base_model_fingerprint": locate(base_model).fingerprint}

    # A schedule compiles the pipeline once, long before its runs: what changes until then is looked at by the steps.
    now: dict[str, Any] = {"enable_cache": False} if _runs_later.get() else {}
    dataset, _ = load_preferences.with_options(cache_policy=covering(base_model, "preference_tuning.data"), **now)(
        data=data,
        source_fingerprints=None if now else fingerprints_of(data),
        max_length=dpo.length(base_model),
        **model,
    )
    policy = covering(base_model, "preference_tuning.training")
    sft_adapter, sft_evidence, _ = train_sft.with_options(cache_policy=policy)(
        dataset=dataset, lora=lora, sft=sft, training=training, **model
    )
    tuned: dict[str, Any] = {}
    if finetuning_type == "dpo":
        dpo_adapter, dpo_evidence, _ = train_dpo.with_options(cache_policy=policy)(
            dataset=dataset, sft_adapter=sft_adapter, dpo=dpo, training=training, **model
        )
        tuned = {"dpo_adapter": dpo_adapter, "dpo_evidence": dpo_evidence}
    scores, _ = evaluate.with_options(cache_policy=covering(base_model, "preference_tuning.evaluation"), **now)(
        dataset=dataset,
        sft_adapter=sft_adapter,
        dpo_adapter=tuned.get("dpo_adapter"),
        evaluation=evaluation,
        evaluation_inputs=inputs_of(evaluation),
        beta=dpo.beta,
        max_length=dpo.length(base_model),
        **model,
    )
    version, _ = register(
        dataset=dataset,
        sft_adapter=sft_adapter,
        sft_evidence=sft_evidence,
        evaluation=scores,
        registry=registry,
        **tuned,
        **model,
    )
    if registry.push:
        push(version=version, registry=registry)


class CheckedPipeline(Pipeline):
    """A pipeline that reads its config with our loader first: ZenML ignores many unknown keys without a word."""

    output_dir = Path(str(RunConfig.model_fields["output_dir"].default))
    scheduled = False
    run_config: RunConfig | None = None
    commanded = False
    """Whether a command runs it that writes down what becomes of it, and tells of failures."""
    trigger: str | None = None
    """Who or what starts it; None: as the environment says."""
    options: Mapping[str, Any] = MappingProxyType({})
    """What the file says to ZenML beside the parameters."""

    def with_options(self, *args: Any, **kwargs: Any) -> Pipeline:
        """Check the config and what it points to, then let ZenML apply it."""
        with told(self.commanded):
            config_path = kwargs.get("config_path")
            loaded = load(Path(config_path)) if config_path else None
            if loaded is None:
                return super().with_options(*args, **kwargs)
            config, document = loaded.config, loaded.document
            give_secrets(config.registry)
            recording.expect(config.tracking)
            more = (("stack", lambda _: stack.look(document, config)),)
            print(preflight.check(config, more=more))
            scheduled = bool(kwargs.get("schedule") or document.get("schedule"))
            trigger = self.trigger or naming.trigger("schedule" if scheduled else "manual")
            if "run_name" not in document:
                kwargs.setdefault("run_name", naming.name(config, trigger))
            tags = [*kwargs.pop("tags", []), *document.get("tags", []), *naming.tags(config, trigger)]
            pipeline = super().with_options(*args, tags=tags, **kwargs)
            assert isinstance(pipeline, CheckedPipeline)
            pipeline.output_dir, pipeline.run_config = Path(config.output_dir), config
            pipeline.scheduled, pipeline.trigger = scheduled, trigger
            pipeline.options = {name: value for name, value in document.items() if name not in OWN}
            return pipeline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline; a failure that the user can act on ends with its exit code, without a traceback."""
        config = None if self.commanded else self.run_config
        with (
            told(self.commanded),
            written_down(config, self.trigger) as ended,
            alive(self.name, self.output_dir) as extra,
            stack.images_explained(),
        ):
            kept = {OPTIONS: dict(self.options)} if self.options else {}
            self.configure(extra={**extra, **kept}, execution_mode=_execution_mode())
            token = _runs_later.set(self.scheduled)
            try:
                return ended(super().__call__(*args, **kwargs))
            finally:
                _runs_later.reset(token)


def _execution_mode() -> ExecutionMode:
    """Return FAIL_FAST, which hands on what a step raised where ZenML's default hides it, if the stack can do it."""
    supported = Client().active_stack.orchestrator.supported_execution_modes
    return ExecutionMode.FAIL_FAST if ExecutionMode.FAIL_FAST in supported else ExecutionMode.CONTINUE_ON_FAILURE


training = CheckedPipeline(name="training", entrypoint=_training)
