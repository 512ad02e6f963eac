"""The section about how training jobs are run; what they learn is in the sections of the stages."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from preference_tuning.config.section import Section


class TrainingConfig(Section):
    """The processes of a training job."""

    processes: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Processes that train together on this machine, started by torchrun; auto: one for each visible CUDA device, one
    on a CPU. A step's batch is per_device_train_batch_size x gradient_accumulation_steps x processes."""
    fsdp: Literal["off", "full_shard"] = "off"
    """full_shard: each process holds a share of the model's weights in training (FSDP2). off: each holds a copy."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """Fresh processes for a job after a failure that may pass by itself, such as a lost connection, for each start of
    the command; each goes on from the last checkpoint. 0: none."""

    save_every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """The longest that training goes on without a checkpoint, beside those of save_steps; null: only those."""
    strict_resume: bool = False
    """Where a stage has checkpoints and none is intact: stop, instead of starting the stage over with a warning."""
    unfinished: Literal["refuse", "continue", "start_over"] = "refuse"
    """What becomes of interrupted training of the same registry.name with other settings, data, base model or code:
    refuse to run beside it, continue it with what is new (``--force-resume``), or remove it and start over."""

    def contradictions(self, backend: str, four_bits: bool) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together.

        Args:
            backend: of the base model.
            four_bits: whether its weights are quantised to 4 bits.
        """
        several = self.processes not in ("auto", 1)
        if backend == "unsloth" and several:
            yield ("training", "processes"), "unsloth trains in one process; use 1, or backend: transformers"
        if self.fsdp == "off":
            return
        if self.processes == 1:
            yield ("training", "fsdp"), "one process has nothing to shard; give more processes, or fsdp: off"
        if backend == "unsloth":
            yield ("training", "fsdp"), "unsloth trains in one process; use off, or backend: transformers"
        if four_bits:
            yield ("training", "fsdp"), "4-bit weights cannot be sharded; use load_in_4bit: false, or fsdp: off"
