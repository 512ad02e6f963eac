"""The first step: rows of the sources become one checked, canonical, split dataset."""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import tracked
from preference_tuning.config import BaseModelConfig, DataConfig
from preference_tuning.data import findings, job, report
from preference_tuning.models.source import locate
from steps.artifacts import DirectoryMaterializer
from steps.context import current_run


@step(output_materializers={"dataset": DirectoryMaterializer})
def load_preferences(
    data: DataConfig,
    source_fingerprints: list[str] | None,
    base_model: BaseModelConfig,
    base_model_fingerprint: str,
    max_length: int,
) -> tuple[Annotated[Path, "dataset"], Annotated[HTMLString, "data_report"]]:
    """Read, check and split the preference data, in a process of its own.

    Without ``source_fingerprints`` the data is taken as it is now: a schedule was made before it grew.
    """
    run = current_run()
    tokens = job.Tokens(
        base_model=base_model,
        source=locate(base_model, expected=base_model_fingerprint),
        max_length=max_length,
        sft_length=base_model.max_seq_length,
    )
    work = job.DataJob(
        config=data,
        fingerprints=job.fingerprints_of(data) if source_fingerprints is None else source_fingerprints,
        tokens=tokens,
        output_dir=run.output_dir.absolute(),
    )
    with run.tracking.stage("data") as tracking:
        dataset = job.prepare_for_run(work, again=run.fresh)
        tracking.add(tracked.of_data(dataset))
    of_run = list(findings.of_run(dataset.manifest, run.config))
    log_metadata({**dataset.manifest.metadata(), **run.tracking.links()})
    print(report.text(dataset.manifest, of_run))
    return dataset.folder, HTMLString(report.render(dataset, of_run))
