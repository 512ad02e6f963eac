"""What a training job is, and how a step starts one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import PORTABLE, BaseModelConfig, DPOConfig, LoraConfig, SFTConfig, TrainingConfig
from preference_tuning.data.table import Dataset
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.events import Event
from preference_tuning.models.chat import Room
from preference_tuning.models.compute import Compute
from preference_tuning.models.devices import processes_of
from preference_tuning.models.source import ModelSource, template_of
from preference_tuning.tracking import spool
from preference_tuning.training import checkpoints, unfinished

MODULE = "preference_tuning.training"
ADAPTER, EVIDENCE = "adapter", "evidence"
RECORD, METRICS, REPORT = "record.json", spool.FILE, "report.html"

COUPLED = {"aot", "aot_unpaired", "sft"}
"""DPO losses that are no mean over pairs: they sort a batch, or take the mean over its tokens."""


class TrainingJob(jobs.Job):
    """Everything that a stage's result depends on, and where it goes."""

    stage: Literal["sft", "dpo"]
    base_model: BaseModelConfig
    source: ModelSource
    lora: LoraConfig | None = None
    """The fresh adapter of SFT; None trains every weight. DPO continues what it is given."""
    sft: SFTConfig | None = None
    dpo: DPOConfig | None = None
    data: Path
    split: str
    """The split of the data that is trained on."""
    data_fingerprint: str
    """Of the content and the sides of its rows."""
    max_prompt_length: int | None
    keep_end: bool
    adapter: Path | None = None
    """Of DPO: the folder that SFT left, an adapter or a full model."""
    adapter_hash: str | None = None
    processes: int = 1
    """They decide the size of a step's batch, so they are part of what the job is."""
    fsdp: Literal["off", "full_shard"] = "off"
    output_dir: Path
    # These change when training is safe, never what it makes.
    save_every_minutes: float | None = None
    strict_resume: bool = False
    # Whose training this is, and what becomes of what was begun for it before; neither changes what it makes.
    name: str = ""
    unfinished: Literal["refuse", "continue", "start_over"] = "refuse"
    forced: dict[str, Any] | None = None
    """As in the record: set where the job goes on with the checkpoints of other settings."""

    @property
    def settings(self) -> SFTConfig | DPOConfig:
        """The section of the stage."""
        settings = self.sft if self.stage == "sft" else self.dpo
        assert settings is not None
        return settings

    @property
    def most_parts(self) -> int:
        """How many pieces of a batch are one row each; 1 where the loss needs the whole batch."""
        settings = self.settings
        whole = bool(self.dpo and COUPLED & set(self.dpo.loss_type))
        return 1 if whole else max(settings.per_device_train_batch_size, settings.per_device_eval_batch_size)

    def what_fits(self, facts: dict[str, Any]) -> str:
        """Return what to do when memory ran out, from the facts of ``training.memory``."""
        return "; ".join([*_measured(facts), *self._advice(facts)])

    def _advice(self, facts: dict[str, Any]) -> list[str]:
        spared = "base_model.load_in_4bit: true (CUDA)"
        if facts.get("rows") == 0:
            return [f"no batch had been read, so it is the model that does not fit: use a smaller one, or {spared}"]
        settings = self.settings
        if self.most_parts == 1 and settings.per_device_train_batch_size > 1:
            losses = ", ".join(sorted(COUPLED & set(self.dpo.loss_type))) if self.dpo else ""
            return [
                f"dpo.loss_type: {losses} needs its batch whole, so it is not cut: lower "
                "dpo.per_device_train_batch_size and dpo.per_device_eval_batch_size"
            ]
        limit = "dpo.max_length" if self.dpo else "base_model.max_seq_length"
        length = f"{limit}: {facts['passed']}" if facts.get("passed") else f"a smaller {limit}"
        checkpointing = [] if settings.gradient_checkpointing else [f"{self.stage}.gradient_checkpointing: true"]
        return [f"a piece is one row already; what would fit: {', or '.join([length, *checkpointing, spared])}"]

    @property
    def room(self) -> Room:
        """How long a row may be, in tokens."""
        longest = self.dpo.length(self.base_model) if self.dpo else self.base_model.max_seq_length
        return Room(longest, self.max_prompt_length, self.keep_end)

    def identity(self) -> dict[str, Any]:
        """Return what makes two jobs the same work: content and settings, never places or times."""
        names = {"stage", "base_model", "lora", "sft", "dpo", "split", "data_fingerprint"}
        names |= {"max_prompt_length", "keep_end", "processes", "fsdp"}
        kept = self.model_dump(mode="json", include=names, context=PORTABLE)
        return {
            **kept,
            "base_model_fingerprint": self.source.fingerprint,
            "chat_template": fingerprint.of_value(template_of(self.base_model)),
            "adapter_hash": self.adapter_hash,
            "code": fingerprint.of_sources(MODULE),
        }


def _measured(facts: dict[str, Any]) -> list[str]:
    """Return what the child measured, in words."""
    told = []
    if facts.get("passed"):
        told.append(f"a row of {facts['passed']} tokens went through")
    if facts.get("longest"):
        told.append(f"one of up to {facts['longest']} tokens did not")
    if facts.get("bytes"):
        told.append(f"{facts['device']} has {facts['bytes'] / 2**30:.2f} GiB")
    return told


class ReferenceProof(BaseModel):
    """That the DPO reference is the SFT policy, measured before the first update."""

    sft_adapter_hash: str
    data_fingerprint: str
    template_hash: str
    pairs: int
    loss: float
    """Of the untrained policy; ln 2 with the sigmoid loss."""
    expected_loss: float | None
    largest_difference: float
    """Largest difference of an answer's log-probability from the reference, in nats, over the pairs checked."""
    tolerance: float
    """Nats; follows from the precision of the matrix products."""


class TrainingRecord(BaseModel):
    """What a finished stage did."""

    stage: Literal["sft", "dpo"]
    job: str
    identity: dict[str, Any]
    adapter_hash: str
    steps: int
    """Optimizer steps that were done; a finished stage did ``max_steps``."""
    max_steps: int
    epochs: float
    seconds: float
    rows: int
    held_out_rows: int
    dropped_rows: int
    """Rows whose prompt leaves no room for an answer."""
    cut_rows: int
    """Rows with an answer cut by the length limit."""
    tokens: int
    """Tokens that went through the model in training, padding left out."""
    train_loss: float
    """Mean over all optimizer steps, those before an interruption included."""
    metrics: dict[str, float]
    """The last evaluation on the held-out rows."""
    trainable_parameters: int
    compute: Compute
    processes: int
    parts: int = 1
    """Pieces that each batch went through in, because memory ran out; 1: whole."""
    micro_batch: int | None = None
    """Rows of a process in one forward pass; None in records from before it was told."""
    engine: str
    engine_reason: str
    backend: str
    template_hash: str
    resumed_at: list[int]
    """The steps at which an interrupted job went on, one for each time."""
    forced: dict[str, Any] | None = None
    """Of a job that went on with checkpoints of other settings: ``from`` which job, at which ``step``, and what had
    ``changed``."""
    events: list[Event] = []
    """Interruptions, retries and whatever else did not go straight."""
    reference: ReferenceProof | None = None
    versions: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Return what the dashboard shows of it: figures, settings, hashes, durations."""
        facts = self.model_dump(
            mode="json", exclude={"identity", "metrics", "reference", "versions", "compute", "events"}
        )
        compute = self.compute.model_dump(mode="json", exclude={"measured"})
        compute = {f"compute/{name}": value for name, value in {**compute, **self.compute.measured}.items()}
        metrics = {f"held_out/{name}": value for name, value in self.metrics.items()}
        settings = {f"settings/{name}": str(value) for name, value in (self.identity.get(self.stage) or {}).items()}
        proof = {f"reference/{k}": v for k, v in self.reference.model_dump().items()} if self.reference else {}
        everything = {**facts, **compute, **metrics, **settings, **proof}
        return {name: value for name, value in everything.items() if value is not None}


class Trained(BaseModel):
    """A finished stage: its record, and the folders of its weights and of the record, metrics and report.

    ``adapter`` holds the LoRA adapter, or the full model where every weight is trained.
    """

    record: TrainingRecord
    adapter: Path
    evidence: Path


def train(job: TrainingJob, again: bool = False, begun: Callable[[Path], object] = lambda _: None) -> Trained:
    """Run a training job to its end, continuing an unfinished one, and return what it made.

    A finished job is not done twice unless ``again``, or unless its weights are no longer what it wrote.

    Args:
        job: that is to be run.
        again: do finished work anew.
        begun: is told, before anything runs, in which folder the evidence will lie.

    Raises:
        ConfigError: unfinished training of other settings is in the way.
        DivergedError: a loss, gradient, weight or the reference check is outside what is healthy.
        InterruptedJobError: a signal stopped it after a checkpoint.
        PreferenceTuningError: it failed otherwise.
    """
    folder, work = unfinished.settle(job, again)
    begun(folder / EVIDENCE)
    try:
        trained = _trained(folder, jobs.run(MODULE, folder, work, TrainingRecord, again, job.processes))
        if not trained.adapter.is_dir() or fingerprint.of_directory(trained.adapter) != trained.record.adapter_hash:
            folder, work = unfinished.settle(job, again=True)
            trained = _trained(folder, jobs.run(MODULE, folder, work, TrainingRecord, True, job.processes))
    except PreferenceTuningError as error:
        newest, _ = checkpoints.newest_good(folder / checkpoints.FOLDER)
        error.facts = {**error.facts, "job": str(folder), "checkpoint": newest.name if newest else "none"}
        raise
    return trained


def _trained(folder: Path, record: TrainingRecord) -> Trained:
    return Trained(record=record, adapter=folder / ADAPTER, evidence=folder / EVIDENCE)


def from_artifacts(
    stage: Literal["sft", "dpo"],
    base_model: BaseModelConfig,
    source: ModelSource,
    dataset: Dataset,
    output_dir: Path,
    training: TrainingConfig | None = None,
    **settings: Any,
) -> TrainingJob:
    """Build the job of a stage from what the earlier steps left, for the machine that this runs on.

    Raises:
        ConfigError: the machine has not the devices that ``training`` asks for.
    """
    adapter = settings.pop("adapter", None)
    training = training or TrainingConfig()
    return TrainingJob(
        stage=stage,
        base_model=base_model,
        source=source,
        data=dataset.folder.absolute(),
        split=dataset.sft_split if stage == "sft" else "train",
        data_fingerprint=dataset.manifest.split_fingerprint,
        max_prompt_length=dataset.manifest.max_prompt_length,
        keep_end=dataset.manifest.keep_end,
        adapter=adapter and adapter.absolute(),
        adapter_hash=fingerprint.of_directory(adapter) if adapter else None,
        processes=processes_of(training, base_model),
        fsdp=training.fsdp,
        retries=training.retries,
        unfinished=training.unfinished,
        output_dir=output_dir.absolute(),
        save_every_minutes=training.save_every_minutes,
        strict_resume=training.strict_resume,
        **settings,
    )
