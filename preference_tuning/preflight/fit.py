"""The area ``memory``: what each stage needs, what the device has, and the smallest changes that would fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from preference_tuning.config import DPOConfig, LoraConfig, SFTConfig
from preference_tuning.errors import ConfigError
from preference_tuning.jobs import machine_memory
from preference_tuning.preflight import batches, memory
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.memory import Memory, Setup
from preference_tuning.preflight.world import Stage, World

GB = 1e9
SHORTEST = 256
"""Tokens below which a shorter limit is no advice."""


@dataclass(frozen=True)
class Room:
    """What there is for a process."""

    name: str
    total: int
    free: int | None
    """What other processes leave of it now; None where that is not known."""


def areas(world: World) -> Iterator[Finding]:
    """Yield the memory of each stage."""
    room = room_of(world)
    for stage in world.stages:
        yield from _of_stage(world, stage, room)


def of_stage(world: World, stage: Stage) -> Memory:
    """Return the memory that a process of a stage needs."""
    return memory.needed(setup_of(world, stage))


def room_of(world: World) -> Room:
    """Return the memory of the device; processes on CPUs share that of the machine."""
    if world.compute.device == "cuda":
        smallest = min(world.facts.devices, key=lambda device: device.total)
        return Room(smallest.name, smallest.total, None)
    count = world.processes
    return Room("this machine", machine_memory.of_machine() // count, machine_memory.available() // count)


def setup_of(world: World, stage: Stage) -> Setup:
    """Return all that the memory of a stage depends on."""
    config, settings, compute = world.config, world.settings(stage), world.compute
    return Setup(
        shapes=world.shapes,
        device=compute.device,
        width=4 if compute.dtype == "float32" else 2,
        eager=compute.attention == "eager",
        lora=config.lora,
        four_bits=config.base_model.load_in_4bit,
        eight_bits=in_8_bits(settings, compute.device),
        checkpointing=settings.gradient_checkpointing,
        accumulates=settings.gradient_accumulation_steps > 1,
        dropout=stage == "sft" and config.lora is not None and config.lora.dropout > 0,
        batch=_batch(world, stage, settings.per_device_train_batch_size),
        scored=_batch(world, stage, settings.per_device_eval_batch_size, by_length=False),
        shares=world.processes if config.training.fsdp != "off" else 1,
    )


def in_8_bits(settings: SFTConfig | DPOConfig, device: str) -> bool:
    """Return whether the optimizer keeps its moments in 8 bits."""
    return settings.optim.endswith("8bit") or (settings.optim == "auto" and device == "cuda")


def _batch(world: World, stage: Stage, size: int, room: int | None = None, by_length: bool = True) -> batches.Batch:
    rows = world.sample(stage, room)
    return batches.largest(rows, min(size, len(rows)), world.shared(stage), world.settings(stage).seed, by_length)


def _of_stage(world: World, stage: Stage, room: Room) -> Iterator[Finding]:
    area, setup = Area("memory"), setup_of(world, stage)
    needs = memory.needed(setup)
    told = f"{stage.upper()} needs about {in_gb(needs.total)} of {in_gb(room.total)} on {room.name}: {_parts(needs)}"
    if needs.total <= room.total:
        if room.free is not None and needs.total > room.free:
            yield area.warning(f"{told}; now {in_gb(room.free)} are free", "end what uses the rest, or wait for it")
        else:
            yield area.ok(told)
        return
    advice = advise(world, stage, setup, room.total)
    one_row = replace(setup, batch=_batch(world, stage, 1), scored=None)
    # Training cuts a batch that does not fit into pieces, down to a row; a model that does not fit with one is refused.
    if memory.needed(one_row).total > room.total * (1 + memory.WITHIN):
        yield area.error(ConfigError(f"{told}: it does not fit, not even with one row at a time"), advice)
    else:
        yield area.warning(f"{told}: a batch will be cut into pieces, or not fit", advice)


def advise(world: World, stage: Stage, setup: Setup, room: int) -> str:
    """Return the smallest changes that would fit, each with what is needed then; all of them if none does."""
    settings = world.settings(stage)
    size, effective = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    limit = "dpo.max_length" if stage == "dpo" else "base_model.max_seq_length"
    steps: list[tuple[str, str]] = []
    for change in _changes(world, stage, setup):
        needs = memory.needed(change.setup).total
        if change.rows is not None:
            told = (
                f"{stage}.per_device_train_batch_size: {change.rows} with gradient_accumulation_steps: "
                f"{size * effective // change.rows}"
            )
        else:
            told = f"{limit}: {change.length}" if change.length else f"{stage}.{change.name}"
            told = change.name if change.name and "." in change.name else told
        step = f"{told} ({in_gb(needs)})"
        # A smaller batch than the last one, or a shorter row, takes the place of it.
        if steps and steps[-1][0] == change.kind:
            steps.pop()
        steps.append((change.kind, step))
        if needs <= room:
            return " and ".join(step for _, step in steps)
    return "no change is enough: " + ", ".join(step for _, step in steps) + "; use a smaller model or a larger device"


@dataclass(frozen=True)
class Change:
    """One change on top of those before it."""

    kind: str
    setup: Setup
    name: str = ""
    rows: int | None = None
    length: int | None = None


def _changes(world: World, stage: Stage, setup: Setup) -> Iterator[Change]:
    """Yield what would need less memory, what costs least first; each is on top of those before it."""
    size = world.settings(stage).per_device_train_batch_size
    while size > 1:
        size //= 2
        setup = replace(setup, batch=_batch(world, stage, size), accumulates=True, scored=None)
        yield Change("batch", setup, rows=size)
    if not setup.checkpointing:
        setup = replace(setup, checkpointing=True)
        yield Change("checkpointing", setup, name="gradient_checkpointing: true")
    length = world.room(stage)
    while length >= 2 * SHORTEST:
        length //= 2
        setup = replace(setup, batch=_batch(world, stage, 1, length))
        yield Change("length", setup, length=length)
    yield from _less_of_the_model(setup)


def _less_of_the_model(setup: Setup) -> Iterator[Change]:
    if setup.device == "cuda" and not setup.full and not setup.four_bits:
        setup = replace(setup, four_bits=True)
        yield Change("bits", setup, name="base_model.load_in_4bit: true")
    if setup.full and not setup.eight_bits:
        setup = replace(setup, eight_bits=True)
        yield Change("optimizer", setup, name="optim: adamw_8bit")
    if setup.full:
        yield Change("adapter", replace(setup, lora=LoraConfig()), name="a `lora:` section instead of lora: null.")


def in_gb(size: float) -> str:
    """Return bytes in words."""
    return f"{size / GB:.1f} GB"


def _parts(needs: Memory) -> str:
    shown = [f"{name} {size / GB:.1f}" for name, size in needs.parts.items() if size >= 0.05 * GB]
    return f"{', '.join(shown)}, +-{memory.WITHIN:.0%}"
