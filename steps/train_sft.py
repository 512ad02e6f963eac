"""Supervised fine-tuning: base model + chosen answers -> adapter, or full model."""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import tracked
from preference_tuning.config import BaseModelConfig, LoraConfig, SFTConfig, TrainingConfig
from preference_tuning.data.table import Dataset
from preference_tuning.models.source import locate
from preference_tuning.training import job
from steps.artifacts import DirectoryMaterializer
from steps.context import current_run


@step(output_materializers={"sft_adapter": DirectoryMaterializer, "sft_evidence": DirectoryMaterializer})
def train_sft(
    dataset: Path,
    base_model: BaseModelConfig,
    base_model_fingerprint: str,
    lora: LoraConfig | None,
    sft: SFTConfig,
    training: TrainingConfig,
) -> tuple[Annotated[Path, "sft_adapter"], Annotated[Path, "sft_evidence"], Annotated[HTMLString, "sft_report"]]:
    """Train a fresh adapter, or every weight without ``lora``, on the chosen answers, in processes of its own."""
    run = current_run()
    source = locate(base_model, expected=base_model_fingerprint)
    work = job.from_artifacts(
        "sft",
        base_model,
        source,
        Dataset(dataset),
        run.output_dir,
        training,
        lora=lora,
        sft=sft,
        name=run.model,
    )
    with run.tracking.stage("sft") as tracking:
        trained = job.train(work, again=run.fresh, begun=tracking.follow)
        tracking.add(tracked.of_training(trained.evidence))
    log_metadata({**trained.record.summary(), **run.tracking.links()})
    report = (trained.evidence / job.REPORT).read_text(encoding="utf-8")
    return trained.adapter, trained.evidence, HTMLString(report)
