"""The merged model of a version, by a job of its own, and the proof that it computes what the version did."""

from pathlib import Path

from pydantic import BaseModel

from preference_tuning import jobs
from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation import deciding
from preference_tuning.models.merging import Precision
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import roundtrip
from preference_tuning.registry.folder import Version
from preference_tuning.registry.roundtrip import RoundTrip

MODULE = "preference_tuning.registry.export"
PRECISIONS: dict[str, Precision] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""By the names of GGUF's types."""


class MergeJob(jobs.Job):
    """Which model is merged, and how it is rounded."""

    base_model: BaseModelConfig
    source: ModelSource
    model: Path
    probes: Path | None
    """None: the version is from before there were any."""
    dtype: Precision
    target: Path
    output_dir: Path


class Merged(BaseModel):
    """What came of it."""

    parameters: int
    compared: RoundTrip | None
    """With the probes of the version."""
    quantised_base: bool
    """The adapter learned on a base model in 4 bits, and is merged into the one that it was made from."""

    def __str__(self) -> str:
        if self.compared is None:
            return "not compared: the version has no probes"
        return f"compared with the probes of the version: {self.compared}"


def run(
    version_folder: Path,
    version: Version,
    base_model: BaseModelConfig | None,
    target: Path,
    output_dir: Path,
    dtype: Precision,
) -> Merged:
    """Write the merged model into ``target``, an empty folder.

    Raises:
        ConfigError: the base model is not there, or not the version's.
        PreferenceTuningError: the merged model computes something else than the version did.
    """
    model = (version_folder / "model").absolute()
    config, source = roundtrip.base_of(version, model, base_model)
    probes = version_folder.absolute() / "evidence" / "evaluation" / deciding.PROBES
    job = MergeJob(
        base_model=config,
        source=source,
        model=model,
        probes=probes if probes.is_file() else None,
        dtype=dtype,
        target=target.absolute(),
        output_dir=output_dir.expanduser().absolute(),
    )
    came = jobs.run(MODULE, job.output_dir / "jobs" / f"merge-{version.id}", job, Merged, again=True)
    if came.compared is not None and (problems := _problems(came.compared, came.quantised_base)):
        raise PreferenceTuningError(
            f"export: the merged model is not the version: {'; '.join(problems)}. Nothing was written"
        )
    return came


def _problems(compared: RoundTrip, quantised_base: bool) -> list[str]:
    # Merged into other weights than it learned on, an adapter cannot give the same numbers.
    return [*compared.text, *([] if compared.holds or quantised_base else [str(compared)])]
