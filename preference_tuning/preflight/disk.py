"""The area ``disk``: what a run writes, on which disks, against what is free there."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preference_tuning.config import HuggingFacePush
from preference_tuning.errors import ConfigError
from preference_tuning.models import gguf
from preference_tuning.preflight import fit
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import Stage, World
from preference_tuning.training import disk

EVIDENCE = 20_000_000
"""Bytes of metrics, scores and reports of a version, at most."""
NEARLY = 0.8
"""Share of what is free from which on a run is warned of."""


@dataclass(frozen=True)
class Tensor:
    """Stands in for a parameter where only its size counts."""

    size: int
    requires_grad: bool = True

    def numel(self) -> int:
        """Return how many numbers it has."""
        return self.size

    def element_size(self) -> int:
        """Return the bytes of a number: what trains is kept in fp32."""
        return 4


class _NoVocabulary:
    is_fast = False


@dataclass(frozen=True)
class Written:
    """Something that a run writes."""

    name: str
    folder: Path
    size: int


def areas(world: World) -> Iterator[Finding]:
    """Yield for each disk what the run writes to it."""
    area = Area("disk")
    by_disk: dict[int, list[Written]] = {}
    for written in _written(world):
        by_disk.setdefault(_existing(written.folder).stat().st_dev, []).append(written)
    for found in by_disk.values():
        needed, place = sum(written.size for written in found), _existing(found[0].folder)
        free = shutil.disk_usage(place).free
        parts = ", ".join(f"{written.name} {fit.in_gb(written.size)}" for written in found if written.size >= 5e7)
        told = f"{fit.in_gb(needed)} of {fit.in_gb(free)} free on the disk of {found[0].folder}"
        told += f" ({parts})" if parts else ""
        todo = "free some space, or set output_dir and registry.folder to another disk"
        if needed > free:
            yield area.error(ConfigError(f"output_dir: a run writes {told}"), todo)
        elif needed > NEARLY * free:
            yield area.warning(f"a run writes {told}", todo)
        else:
            yield area.ok(told)


def _written(world: World) -> Iterator[Written]:
    config, shapes, out = world.config, world.shapes, world.output_dir
    registry = Path(config.registry.folder).expanduser().absolute()
    result = 4 * shapes.trained(config.lora) + world.template.bytes
    largest = max(_checkpoint(world, stage) for stage in world.stages)
    # Those of a stage go when it is done.
    yield Written("checkpoints", out, disk.COPIES * largest)
    yield Written("results", out, result * len(world.stages))
    yield Written("dataset and tokens", out, _dataset(world))
    if "://" not in config.registry.folder:
        yield Written("registry version", registry, result + EVIDENCE)
    if any(isinstance(push, HuggingFacePush) and push.contents != "adapter" for push in config.registry.push):
        yield Written("merged model", out, 2 * shapes.parameters)
    source = world.source
    if source.kind == "gguf" and not gguf.folder(out, source.fingerprint).is_dir():
        yield Written("conversion of the GGUF file", out, 2 * shapes.parameters)


def _checkpoint(world: World, stage: Stage) -> int:
    """Return the bytes of a checkpoint, as the job itself counts them."""
    settings, shapes, lora = world.settings(stage), world.shapes, world.config.lora
    if lora is None:
        tensors = [Tensor(shapes.parameters // shapes.tensors)] * shapes.tensors
    else:
        adapted = [linear for linear in shapes.linears if linear.name in lora.target_modules]
        sizes = [lora.rank * side for linear in adapted for side in (linear.inputs, linear.outputs)]
        counts = [linear.count for linear in adapted for _ in range(2)]
        tensors = [Tensor(size) for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    optimizer = "8bit" if fit.in_8_bits(settings, world.compute.device) else ""
    sharded = world.config.training.fsdp != "off"
    found = disk.checkpoint_size(tensors, _NoVocabulary(), optimizer, world.steps(stage), sharded)
    return found + world.template.bytes


def _dataset(world: World) -> int:
    """Return the bytes of the token rows that the stages write, and of the artifact store's copy of the dataset."""
    there = sum(path.stat().st_size for path in world.dataset.folder.iterdir() if path.is_file())
    mean = sum(row.length for row in world.lengths) / len(world.lengths)
    pairs = world.dataset.manifest.train + world.dataset.manifest.held_out
    return there + round(4 * mean * pairs) * len(world.stages)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())
