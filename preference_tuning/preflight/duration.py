"""The area ``time``: how long a run takes, from a model of its work, or extrapolated from a probe.

The model: operations that the shapes of the model ask for, against the speed of plain matrix products measured on this
machine, times the share of it that the engine reaches. docs/check.md has the formula and how far off it was.
"""

import os
from collections.abc import Iterator, Sequence

from preference_tuning.models import machine
from preference_tuning.models.shapes import Shapes
from preference_tuning.preflight.batches import Row, lay_out
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import Stage, World
from preference_tuning.training.schedule import steps_of_share

REACHED = {"cpu": 0.5, "cuda": 0.35}
"""Share of the speed of plain matrix products that training reaches: measured on a CPU, assumed on CUDA."""
BYTES_A_SECOND = {"cpu": 8e9, "cuda": 8e11}
"""Weights read a second while answers are generated, assumed."""
STARTING = {"cpu": 4.0, "cuda": 40.0}
"""Seconds of a job outside of its work: a process, imports, loading a small model."""
BUSY = 1.5
"""Processes that want to run, for each CPU, from which on a machine is busy."""
OFF = 2
"""Factor within which the model of time is right."""


def areas(world: World) -> Iterator[Finding]:
    """Yield how long the run will take."""
    speed = world.facts.tflops
    if not speed:
        return
    kind = world.compute.device
    rate = speed * 1e12 * REACHED[kind] * (world.processes if kind == "cuda" else 1)
    seconds = {stage.upper(): training(world, stage) / rate for stage in world.stages}
    seconds["evaluation"] = evaluation(world) / rate + _generation(world)
    seconds["starting"] = STARTING[kind] * (len(world.stages) + 2)
    parts = ", ".join(f"{name} {in_words(value)}" for name, value in seconds.items())
    area = Area("time")
    if kind == "cpu" and os.getloadavg()[0] > BUSY * machine.usable_cpus():
        yield area.warning("other processes keep the CPUs of this machine busy: beside them it takes longer")
    yield area.ok(
        f"about {in_words(sum(seconds.values()))} ({parts}), within a factor of {OFF}: operations against "
        f"{REACHED[kind]:.0%} of {speed:.2f} TFLOP/s; --probe measures it"
    )


def training(world: World, stage: Stage) -> float:
    """Return the operations of a stage: its epochs, the reference, the evaluations in between."""
    shapes, settings, config = world.shapes, world.settings(stage), world.config
    rows, held_out = world.rows(stage), world.dataset.manifest.held_out
    forward = [_forward(shapes, row, world.shared(stage)) for row in world.sample(stage)]
    layers, head = (sum(part) / len(forward) for part in zip(*forward, strict=True))
    full = config.lora is None
    # Backward: gradients of inputs, and of the weights that train; the head's are formed in the forward pass.
    back = (2 if full else 1) * layers + (3 if full else 1) * head
    again = layers if settings.gradient_checkpointing else 0.0
    evaluations = len(steps_of_share(settings.eval_steps, world.steps(stage)))
    scored = float(evaluations * held_out)
    if stage == "dpo":
        scored += min(1.0, settings.num_train_epochs) * rows + held_out
    return float(settings.num_train_epochs * rows * (layers + head + back + again) + scored * (layers + head))


def evaluation(world: World) -> float:
    """Return the operations of scoring the held-out pairs with every model."""
    stage = world.stages[-1]
    forward = [sum(_forward(world.shapes, row, world.shared(stage))) for row in world.sample("dpo")]
    return (1 + len(world.stages)) * world.dataset.manifest.held_out * sum(forward) / len(forward)


def _forward(shapes: Shapes, row: Row, shared: bool) -> tuple[float, float]:
    """Return the operations of a row's forward pass: of the layers, and of the head."""
    batch = lay_out([row], shared)
    attention = sum(4 * b.sequences * b.queries * b.keys * shapes.heads * shapes.head_width for b in batch.attention)
    layers = 2 * shapes.linear * batch.tokens + attention * shapes.layers
    return float(layers), float(2 * shapes.embedding * batch.answers)


def _generation(world: World) -> float:
    """Return the seconds of answering held-out prompts: every new token reads all weights once."""
    evaluation, kind = world.config.evaluation, world.compute.device
    if not evaluation.samples:
        return 0.0
    width = 4 if world.compute.dtype == "float32" else 2
    calls = -(-evaluation.samples // (4 * evaluation.batch_size))
    read = world.shapes.parameters * width * evaluation.max_new_tokens * calls
    return float((1 + len(world.stages)) * read / BYTES_A_SECOND[kind])


def in_words(seconds: float) -> str:
    """Return a duration for a reader."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def spread(values: Sequence[float]) -> float:
    """Return the half width of a 95 % interval of the mean, as a share of it."""
    if len(values) < 2:
        return 0.5
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float(2 * (variance / len(values)) ** 0.5 / mean)
