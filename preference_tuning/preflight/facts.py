"""What only torch and transformers can tell before a run, asked in a process of their own and kept by content.

The pipeline's process stays free of torch. What is asked once for the same model, settings, versions and machine is
not asked again.
"""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig, RunConfig
from preference_tuning.models import machine
from preference_tuning.models.compute import Compute
from preference_tuning.models.devices import DRIVERS
from preference_tuning.models.shapes import Shapes
from preference_tuning.models.source import ModelSource, template_of

MODULE = "preference_tuning.preflight"
VERSIONS = ("torch", "transformers", "tokenizers", "peft")


class Device(BaseModel):
    """A CUDA device."""

    name: str
    total: int
    """Bytes of its memory."""


class Template(BaseModel):
    """What the tokenizer and its chat template do."""

    hash: str
    pad: str
    eos: str
    same: bool
    """Whether a conversation that is trained on begins as the prompt that is answered."""
    closes: bool
    """Whether the end token follows an answer that is trained on."""
    bytes: int
    """Of the tokenizer's vocabulary, as it is saved with each checkpoint."""


class Problem(BaseModel):
    """Why a part of the facts is not known."""

    area: str
    message: str


class Facts(BaseModel):
    """What was found."""

    compute: Compute | None = None
    shapes: Shapes | None = None
    template: Template | None = None
    devices: list[Device] = []
    tflops: float | None = None
    """Of plain matrix products in the precision of the run, measured here, in 10^12 operations a second."""
    problems: list[Problem] = []


class FactsJob(jobs.Job):
    """What is asked about."""

    base_model: BaseModelConfig
    source: ModelSource
    output_dir: Path
    here: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Return what the answers depend on."""
        return {
            "base_model": self.base_model.model_dump(mode="json", exclude={"revision", "source", "chat_template"}),
            "template": template_of(self.base_model),
            "source": self.source.fingerprint,
            "here": self.here,
            "code": fingerprint.of_sources(f"{MODULE}.__main__"),
        }


def job_of(config: RunConfig, source: ModelSource) -> FactsJob:
    """Return the question about a run's model on this machine."""
    return FactsJob(
        base_model=config.base_model,
        source=source,
        output_dir=Path(config.output_dir).expanduser().absolute(),
        here={
            "host": platform.node(),
            "cpus": machine.usable_cpus(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "driver": [path for path in DRIVERS if Path(path).exists()],
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        },
    )


def ask(job: FactsJob) -> Facts:
    """Return the facts; those with a problem are asked for anew the next time.

    Raises:
        PreferenceTuningError: the process failed as a whole.
    """
    folder = job.output_dir / "checks" / fingerprint.of_value(job.identity())[:16]
    facts = jobs.run(MODULE, folder, job, Facts)
    if facts.problems:
        (folder / jobs.RESULT).unlink(missing_ok=True)
    return facts
