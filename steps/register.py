"""Registration: every result becomes a version; only one with evidence becomes champion.

Never cached: it is idempotent and quick, and what it changes lies outside the artifact store.
"""

from pathlib import Path
from typing import Annotated

from zenml import get_step_context, log_metadata, step
from zenml.enums import ModelStages
from zenml.types import HTMLString

from preference_tuning.config import BaseModelConfig, RegistryConfig
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import job
from preference_tuning.models.source import locate
from preference_tuning.registry import result, summary
from steps.context import current_run, give_secrets


@step(enable_cache=False)
def register(
    dataset: Path,
    sft_adapter: Path,
    sft_evidence: Path,
    evaluation: Path,
    base_model: BaseModelConfig,
    base_model_fingerprint: str,
    registry: RegistryConfig,
    dpo_adapter: Path | None = None,
    dpo_evidence: Path | None = None,
) -> tuple[Annotated[str, "version"], Annotated[HTMLString, "decision_report"]]:
    """Store the run's result, decide on promotion, and print the summary."""
    run = current_run()
    outcome = result.Result(
        finetuning_type=run.config.finetuning_type,
        base_model=base_model,
        source=locate(base_model, expected=base_model_fingerprint),
        dataset=Dataset(dataset),
        adapters={"sft": sft_adapter} | ({"dpo": dpo_adapter} if dpo_adapter else {}),
        training={"sft": sft_evidence} | ({"dpo": dpo_evidence} if dpo_evidence else {}),
        evaluation=evaluation,
        config=run.config,
        comet=run.comet,
        output_dir=run.output_dir.absolute(),
        run={"zenml_run": run.name, "zenml_run_id": run.id, "comet_experiment": run.comet.experiment_key},
    )
    give_secrets(run.config.evaluation.judge)
    registered = result.register(outcome, registry)
    result.track(outcome, registered)
    log_metadata(registered.metadata())
    if get_step_context().pipeline_run.config.model:
        measured = job.load_summary(registered.evaluation).metadata()
        log_metadata(metadata={**measured, **registered.metadata()}, infer_model=True)
        if registered.promoted:
            get_step_context().model.set_stage(ModelStages.PRODUCTION, force=True)
    print(summary.render(outcome, registered))
    report = (registered.evaluation / job.REPORT).read_text(encoding="utf-8")
    return registered.version.id, HTMLString(report)
