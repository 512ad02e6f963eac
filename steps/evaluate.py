"""Evaluation: base, SFT and DPO on the same held-out pairs, and the verdict."""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import tracked
from preference_tuning.config import BaseModelConfig, EvaluationConfig
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import job
from preference_tuning.models.source import locate
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import FolderRegistry, version_id
from steps.artifacts import DirectoryMaterializer
from steps.context import current_run, give_secrets


@step(output_materializers={"evaluation": DirectoryMaterializer})
def evaluate(
    dataset: Path,
    sft_adapter: Path,
    base_model: BaseModelConfig,
    base_model_fingerprint: str,
    evaluation: EvaluationConfig,
    evaluation_inputs: list[str],
    beta: float,
    max_length: int,
    dpo_adapter: Path | None = None,
) -> tuple[Annotated[Path, "evaluation"], Annotated[HTMLString, "evaluation_report"]]:
    """Score every model on the held-out pairs, in a process of its own."""
    run = current_run()
    source = locate(base_model, expected=base_model_fingerprint)
    adapters = {"sft": sft_adapter} | ({"dpo": dpo_adapter} if dpo_adapter else {})
    work = job.from_artifacts(
        base_model,
        source,
        Dataset(dataset),
        adapters,
        evaluation,
        run.output_dir,
        # Read now and no parameter: the cache would take another champion for another evaluation of this model, while
        # `register` looks at it once more.
        champion=to_beat(FolderRegistry(run.config.registry), version_id(dpo_adapter or sft_adapter)),
        beta=beta,
        max_length=max_length,
        retries=run.config.training.retries,
    )
    give_secrets(evaluation.judge)
    with run.tracking.stage("evaluation") as tracking:
        evaluated = job.evaluate(work, again=run.fresh, begun=tracking.follow)
        tracking.add(tracked.of_evaluation(evaluated.evidence))
    log_metadata({**evaluated.evaluation.metadata(), **run.tracking.links()})
    report = (evaluated.evidence / job.REPORT).read_text(encoding="utf-8")
    return evaluated.evidence, HTMLString(report)
