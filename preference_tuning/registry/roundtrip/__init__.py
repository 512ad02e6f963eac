"""The round trip: a published model is loaded from the registry and must compute what was measured before.

Hashes prove that files are what was published. The round trip proves that what was published is the model: base model,
adapter, tokenizer and chat template together give the stored probes the log-probabilities that the evaluation saw.

    __init__    where the base model is, and the job
    comparing   the comparison, in the job's process
"""

from pathlib import Path

from pydantic import BaseModel

from preference_tuning import jobs
from preference_tuning.config import BaseModelConfig, RunConfig
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.evaluation import deciding
from preference_tuning.models import weights
from preference_tuning.models.source import ModelSource, locate
from preference_tuning.registry import verification
from preference_tuning.registry.folder import FolderRegistry, Version, weights_hash
from preference_tuning.registry.verification import Verification

MODULE = "preference_tuning.registry.roundtrip"
TEXT, NUMBERS = "tokenizer and chat template, loaded again", "log-probabilities, computed again"


class RoundTripJob(jobs.Job):
    """A published model and its probes."""

    base_model: BaseModelConfig
    source: ModelSource
    model: Path
    probes: Path
    output_dir: Path


class RoundTrip(BaseModel):
    """What came of it."""

    device: str
    dtype: str
    measured_in: str
    """Precision of the evaluation."""
    tokens: int
    """Of all answers."""
    largest: float
    """Difference of a token's log-probability, nats."""
    mean: float
    """Over the tokens."""
    tolerance: float
    """Of the largest; the mean has ``scoring.OF_MEAN`` of it."""
    mean_tolerance: float
    text: list[str]
    """What the published tokenizer and template make of the prompts otherwise, a line each."""

    @property
    def holds(self) -> bool:
        """Whether the log-probabilities are those that were measured; NaN never is."""
        return self.largest <= self.tolerance and self.mean <= self.mean_tolerance

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} nats a token (tolerance {self.tolerance:g}), mean {self.mean:.3g} "
            f"({self.mean_tolerance:g}), over {self.tokens} tokens of answers; measured in {self.measured_in}, now in "
            f"{self.dtype} on {self.device}"
        )


def verify(registry: FolderRegistry, name: str, config: RunConfig | None, output_dir: Path) -> Verification:
    """Look whether a version's files and verdict hold, then load its model and score its probes.

    Args:
        registry: that the version is in.
        name: as for ``FolderRegistry.find``.
        config: where the base model is now; None: where the version's own config says.
        output_dir: of the job, and of conversions.

    Raises:
        ConfigError: there is no such version.
        PreferenceTuningError: its manifest cannot be read.
    """
    found = verification.verify(registry, name)
    probes = found.evaluation / deciding.PROBES
    if not probes.is_file():
        found.notes.append("it was published without probes, so its model was not loaded and compared")
        return found
    try:
        came = _run(found, config.base_model if config else None, probes, output_dir)
    except InterruptedJobError:
        raise
    except PreferenceTuningError as error:
        found.checks.append((NUMBERS, [f"not compared: {error}"]))
        return found
    found.checks.append((TEXT, came.text))
    found.checks.append((NUMBERS, [] if came.holds else [str(came)]))
    if came.holds:
        found.notes.append(str(came))
    return found


def _run(found: Verification, now: BaseModelConfig | None, probes: Path, output_dir: Path) -> RoundTrip:
    base_model, source = base_of(found.version, found.model, now)
    job = RoundTripJob(
        base_model=base_model, source=source, model=found.model, probes=probes, output_dir=output_dir.absolute()
    )
    folder = (output_dir / "jobs" / f"verify-{found.version.id}").absolute()
    return jobs.run(MODULE, folder, job, RoundTrip, again=True)


def base_of(version: Version, model: Path, now: BaseModelConfig | None = None) -> tuple[BaseModelConfig, ModelSource]:
    """Return how the base model of a version is loaded, and where it lies; a full model needs none but itself.

    Args:
        version: of the registry.
        model: folder of its model.
        now: where the base model is now, and on which device it runs; None: as the version's config says.

    Raises:
        ConfigError: it is not there, or another one is.
    """
    recorded = BaseModelConfig.model_validate(version.config["base_model"])
    # Where and how fast it trained does not matter any more; the tokenizer and template are the version's own.
    neutral = {"backend": "transformers", "attention": "auto", "threads": None, "chat_template": None}
    device = {"device": now.device if now else "auto"}
    if not weights.is_adapter(model):
        source = ModelSource(kind="directory", location=str(model), fingerprint=weights_hash(model))
        return recorded.model_copy(update={**neutral, **device}), source
    named = now or recorded
    place = {"source": named.source, "revision": named.revision}
    config = recorded.model_copy(update={**neutral, **device, **place})
    wanted = str(version.base_model["fingerprint"])
    try:
        source = locate(config, expected=None if now else wanted)
    except ConfigError as error:
        if now is not None:
            raise
        raise ConfigError(
            f"{error}. Name where the base model is now with --config CONFIG (base_model.source)"
        ) from None
    if source.fingerprint != wanted:
        raise ConfigError(
            f"base_model.source: {named.source} ({source.fingerprint[:16]}) is not the base model of {version.id}, "
            f"which is {version.base_model['source']} ({wanted[:16]})"
        )
    return config, source
