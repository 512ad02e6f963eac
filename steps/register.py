"""Registration: every result becomes a version; only one with evidence becomes champion.

Never cached: it is idempotent and quick, and what it changes lies outside the artifact store.
"""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import tracked
from preference_tuning.config import BaseModelConfig, RegistryConfig
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import job
from preference_tuning.models.source import locate
from preference_tuning.registry import answers, result, summary
from steps import models
from steps.answers import answer
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
        output_dir=run.output_dir.absolute(),
        run=run.names(),
    )
    give_secrets(run.config.evaluation.judge)
    with run.tracking.stage("registry"):
        registered = result.register(outcome, registry)
        tracked.complete(run.tracking, outcome, registered)
    run.tracking.close(wait=False)
    log_metadata({**registered.metadata(), **run.tracking.links()})
    links = run.tracking.links()
    answer({**answers.of_run(outcome, registered), **links}, registered.verdict.decision)
    models.record(registered, registry)
    print(summary.render(outcome, registered, run.tracking.told()))
    report = (registered.evaluation / job.REPORT).read_text(encoding="utf-8")
    return registered.version.id, HTMLString(report)
