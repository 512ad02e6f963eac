"""The one pipeline: load preferences -> SFT -> DPO (only for finetuning_type dpo) -> evaluate -> register.

Wiring and cache policy, nothing else. It starts with `python run.py train CONFIG`, or with ZenML's own
`zenml pipeline run pipelines.training.training -c CONFIG`; both check the whole config first.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from zenml.config import CachePolicy
from zenml.enums import ExecutionMode
from zenml.pipelines.pipeline_definition import Pipeline

from pipelines import stack
from pipelines.runs import alive
from preference_tuning import fingerprint, interruption, preflight
from preference_tuning.config import (
    BaseModelConfig,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    LoraConfig,
    RegistryConfig,
    RunConfig,
    SFTConfig,
    TrackingConfig,
    TrainingConfig,
    load,
)
from preference_tuning.data.job import fingerprints_of
from preference_tuning.errors import find
from preference_tuning.evaluation.job import inputs_of
from preference_tuning.models.source import locate
from steps.evaluate import evaluate
from steps.load_preferences import load_preferences
from steps.register import register
from steps.train_dpo import train_dpo
from steps.train_sft import train_sft


def covering(*modules: str) -> CachePolicy:
    """Return the cache policy of a step that runs on ``modules``: an edit of any code they use runs it again."""
    root = fingerprint.PACKAGE.parent
    return CachePolicy(file_dependencies=[str(path.relative_to(root)) for path in fingerprint.sources(*modules)])


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
) -> None:
    """Tune a base model on preference pairs; each parameter is a section of the run config."""
    # Steps read output_dir and tracking from the run: where things go does not decide what is cached.
    model: dict[str, Any] = {"base_model": base_model, "base_model_fingerprint": locate(base_model).fingerprint}

    dataset, _ = load_preferences.with_options(cache_policy=covering("preference_tuning.data"))(
        data=data,
        source_fingerprints=fingerprints_of(data),
        max_length=dpo.length(base_model),
        **model,
    )
    policy = covering("preference_tuning.training")
    sft_adapter, sft_evidence, _ = train_sft.with_options(cache_policy=policy)(
        dataset=dataset, lora=lora, sft=sft, training=training, **model
    )
    tuned: dict[str, Any] = {}
    if finetuning_type == "dpo":
        dpo_adapter, dpo_evidence, _ = train_dpo.with_options(cache_policy=policy)(
            dataset=dataset, sft_adapter=sft_adapter, dpo=dpo, training=training, **model
        )
        tuned = {"dpo_adapter": dpo_adapter, "dpo_evidence": dpo_evidence}
    scores, _ = evaluate.with_options(cache_policy=covering("preference_tuning.evaluation"))(
        dataset=dataset,
        sft_adapter=sft_adapter,
        dpo_adapter=tuned.get("dpo_adapter"),
        evaluation=evaluation,
        evaluation_inputs=inputs_of(evaluation),
        beta=dpo.beta,
        max_length=dpo.length(base_model),
        **model,
    )
    register(
        dataset=dataset,
        sft_adapter=sft_adapter,
        sft_evidence=sft_evidence,
        evaluation=scores,
        registry=registry,
        **tuned,
        **model,
    )


class CheckedPipeline(Pipeline):
    """A pipeline that reads its config with our loader first: ZenML ignores many unknown keys without a word."""

    output_dir = Path(str(RunConfig.model_fields["output_dir"].default))

    def with_options(self, *args: Any, **kwargs: Any) -> Pipeline:
        """Check the config and what it points to, then let ZenML apply it."""
        with told():
            config_path = kwargs.get("config_path")
            loaded = load(Path(config_path)) if config_path else None
            config = loaded.config if loaded else None
            if loaded and config:
                more = (("stack", lambda _: stack.look(loaded.document, loaded.config)),)
                print(preflight.check(config, more=more))
            pipeline = super().with_options(*args, **kwargs)
            if config and isinstance(pipeline, CheckedPipeline):
                pipeline.output_dir = Path(config.output_dir)
            return pipeline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline; a failure that the user can act on ends with its exit code, without a traceback."""
        with told(), alive(self.name, self.output_dir) as extra:
            self.configure(extra=extra)
            return super().__call__(*args, **kwargs)


class _Unexplained(logging.Filter):
    """Keeps ZenML from printing the traceback of a failure that is told in one message."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and find(record.exc_info[1]))


_unexplained = _Unexplained()


@contextmanager
def told() -> Iterator[None]:
    """Turn our errors, and signals, into a message and their exit code."""
    interruption.watch()
    for handler in (*logging.getLogger().handlers, *logging.getLogger("zenml").handlers):
        handler.addFilter(_unexplained)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        known = find(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        raise SystemExit(known.exit_code) from None


# FAIL_FAST hands on what a step raised; ZenML's default hides it behind "failure in step(s)".
training = CheckedPipeline(name="training", entrypoint=_training, execution_mode=ExecutionMode.FAIL_FAST)
