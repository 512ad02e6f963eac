"""The first step: rows of a source become one checked, canonical, split dataset."""

from pathlib import Path
from typing import Annotated

from zenml import log_metadata, step
from zenml.types import HTMLString

from preference_tuning import fingerprint
from preference_tuning.config import DataConfig
from preference_tuning.data import prepare, table
from steps.artifacts import DirectoryMaterializer
from steps.context import current_run


@step(output_materializers={"dataset": DirectoryMaterializer})
def load_preferences(
    data: DataConfig, source_fingerprint: str
) -> tuple[Annotated[Path, "dataset"], Annotated[HTMLString, "data_report"]]:
    """Read, check and split the preference data."""
    identity = fingerprint.of_value([data.model_dump(mode="json"), source_fingerprint])
    folder = current_run().output_dir / "data" / identity[:16]
    dataset = prepare.prepare(data, source_fingerprint, folder)
    log_metadata(dataset.manifest.model_dump(mode="json", exclude={"topics"}))
    return dataset.folder, HTMLString((dataset.folder / table.REPORT).read_text(encoding="utf-8"))
