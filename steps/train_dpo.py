"""Direct preference optimisation: the SFT result goes on, with the SFT policy as its reference."""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import tracked
from preference_tuning.config import BaseModelConfig, DPOConfig, TrainingConfig
from preference_tuning.data.table import Dataset
from preference_tuning.models.source import locate
from preference_tuning.training import job
from steps.artifacts import DirectoryMaterializer
from steps.context import current_run


@step(output_materializers={"dpo_adapter": DirectoryMaterializer, "dpo_evidence": DirectoryMaterializer})
def train_dpo(
    dataset: Path,
    sft_adapter: Path,
    base_model: BaseModelConfig,
    base_model_fingerprint: str,
    dpo: DPOConfig,
    training: TrainingConfig,
) -> tuple[Annotated[Path, "dpo_adapter"], Annotated[Path, "dpo_evidence"], Annotated[HTMLString, "dpo_report"]]:
    """Continue what SFT left on the pairs, in processes of its own."""
    run = current_run()
    source = locate(base_model, expected=base_model_fingerprint)
    work = job.from_artifacts(
        "dpo",
        base_model,
        source,
        Dataset(dataset),
        run.output_dir,
        training,
        dpo=dpo,
        adapter=sft_adapter,
        name=run.model,
    )
    with run.tracking.stage("dpo") as tracking:
        trained = job.train(work, again=run.fresh, begun=tracking.follow)
        tracking.add(tracked.of_training(trained.evidence))
    log_metadata({**trained.record.summary(), **run.tracking.links()})
    report = (trained.evidence / job.REPORT).read_text(encoding="utf-8")
    return trained.adapter, trained.evidence, HTMLString(report)
