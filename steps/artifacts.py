"""Artifacts are directories, copied plainly and identified by their content."""

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from zenml.enums import ArtifactType
from zenml.io import fileio
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.metadata.metadata_types import MetadataType
from zenml.utils import io_utils

from preference_tuning import fingerprint


class DirectoryMaterializer(BaseMaterializer):
    """Stores a directory as it is: no archive, no pickle. Equal content hits the step cache."""

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (Path,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA
    SKIP_REGISTRATION: ClassVar[bool] = True
    FOLDER = "content"

    def load(self, data_type: type[Any]) -> Path:
        """Return the directory: where it lies in a local store (to be read only), else a copy."""
        stored = f"{self.uri}/{self.FOLDER}"  # may be the address of an object store
        if self.artifact_store.config.is_local:
            return Path(stored)
        copy = tempfile.mkdtemp(prefix="artifact-")
        io_utils.copy_dir(stored, copy, overwrite=True)
        return Path(copy)

    def save(self, data: Path) -> None:
        """Copy the directory into the store."""
        fileio.makedirs(self.uri)
        io_utils.copy_dir(str(data), f"{self.uri}/{self.FOLDER}", overwrite=True)

    def compute_content_hash(self, data: Path) -> str:
        """Return the hash that the step cache compares."""
        return fingerprint.of_directory(data)

    def extract_metadata(self, data: Path) -> dict[str, MetadataType]:
        """Return what the dashboard shows beside the artifact."""
        files = fingerprint.manifest(data)
        return {
            "files": len(files),
            "bytes": sum(int(file["bytes"]) for file in files.values()),
            "sha256": fingerprint.of_value(files),
        }
