"""``--probe``: a few rows of the data through every job of the run, and what follows from that for all rows."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preference_tuning import jobs
from preference_tuning.config import EvaluationConfig
from preference_tuning.data import table
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.models.source import ModelSource
from preference_tuning.preflight import fit, probing
from preference_tuning.preflight.duration import in_words, spread
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.probing import Probe, ProbeJob
from preference_tuning.preflight.world import Stage, World
from preference_tuning.training import job as training_job
from preference_tuning.training.schedule import steps_of_share

STEPS = 4
"""Optimizer steps of the probe; the first one warms up and is left out."""
MOST_BATCHES = 4
"""Batches of such a step at most."""
HELD_OUT = 16
"""Held-out pairs of the probe."""
LEAST_ERROR = 0.15
"""Share by which a probe may be off even where its steps took equal time: other rows, other load on the machine."""


@dataclass
class _Sample:
    """A dataset of few rows, and how many there are."""

    dataset: Dataset
    train: int
    held_out: int


def areas(world: World) -> Iterator[Finding]:
    """Yield how long the run takes and what memory its stages need, as measured on a few rows."""
    folder = world.output_dir / "checks"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="probe-", dir=folder))
    try:
        yield from _Probing(world, scratch).findings()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Probing:
    def __init__(self, world: World, scratch: Path) -> None:
        self.world, self.scratch = world, scratch
        self.errors: list[float] = []

    def findings(self) -> Iterator[Finding]:
        world = self.world
        seconds: dict[str, float] = {}
        trained: dict[str, Path] = {}
        for stage in world.stages:
            sample = self._sample(stage)
            probe, trained[stage] = self._train(stage, sample, trained.get("sft"))
            seconds[stage.upper()] = self._whole_stage(stage, probe, sample)
            expected = fit.of_stage(world, stage).total
            yield Area("memory").ok(
                f"{stage.upper()} took {fit.in_gb(probe.peak)} on a few rows (estimate for the largest batch: "
                f"{fit.in_gb(expected)})"
            )
        sample = self._sample("dpo")
        seconds["evaluation"] = self._evaluation(sample, trained)
        parts = ", ".join(f"{name} {in_words(value)}" for name, value in seconds.items())
        error = max(LEAST_ERROR, *self.errors)
        yield Area("time").ok(f"about {in_words(sum(seconds.values()))} ({parts}), +-{error:.0%}: measured on few rows")

    def _train(self, stage: Stage, sample: _Sample, adapter: Path | None) -> tuple[Probe, Path]:
        """Run the stage on the sample and return what the clock said, and the folder of its weights."""
        world, config = self.world, self.world.config
        changed = {
            "num_train_epochs": 1.0, "gradient_accumulation_steps": self._batches(stage), "warmup_steps": 0.1,
            "eval_steps": 0.99, "save_steps": 0.99,
        }  # fmt: skip
        settings: dict[str, Any] = {stage: world.settings(stage).model_copy(update=changed)}
        settings |= {"lora": config.lora} if stage == "sft" else {"adapter": adapter}
        work = training_job.from_artifacts(
            stage,
            config.base_model,
            world.source,
            sample.dataset,
            world.output_dir,
            config.training,
            **settings,
        )
        work = work.model_copy(update={"processes": 1, "fsdp": "off", "output_dir": world.output_dir})
        folder = self.scratch / stage
        return jobs.run(
            probing.MODULE, folder, ProbeJob(training=work, retries=0), Probe
        ), folder / training_job.ADAPTER

    def _batches(self, stage: Stage) -> int:
        return min(self.world.settings(stage).gradient_accumulation_steps, MOST_BATCHES)

    def _whole_stage(self, stage: Stage, probe: Probe, sample: _Sample) -> float:
        """Return the seconds of the whole stage."""
        world, settings = self.world, self.world.settings(stage)
        steady = probe.steps[1:] or probe.steps
        self.errors.append(spread(steady))
        step = sum(steady) / len(steady) * settings.gradient_accumulation_steps / self._batches(stage)
        steps, held_out = world.steps(stage), world.dataset.manifest.held_out
        evaluations = len(steps_of_share(settings.eval_steps, steps))
        scored = min(1.0, settings.num_train_epochs) * world.rows(stage) + held_out
        reference = probe.reference * scored / (sample.train + sample.held_out)
        return steps * step + evaluations * probe.scoring * held_out / sample.held_out + reference + probe.rest

    def _evaluation(self, sample: _Sample, trained: dict[str, Path]) -> float:
        world, config = self.world, self.world.config
        only: EvaluationConfig = config.evaluation.model_copy(
            update={
                "judge": None,
                "lm_eval": None,
                "general": None,
                "samples": min(config.evaluation.samples, sample.held_out),
            }
        )
        source: ModelSource = world.source
        work = evaluation_job.from_artifacts(
            config.base_model, source, sample.dataset, trained, only, world.output_dir,
            beta=config.dpo.beta, max_length=config.dpo.length(config.base_model),
        )  # fmt: skip
        probe = jobs.run(probing.MODULE, self.scratch / "evaluate", ProbeJob(evaluation=work, retries=0), Probe)
        held_out = world.dataset.manifest.held_out
        samples = config.evaluation.samples / max(1, only.samples)
        return probe.scoring * held_out / sample.held_out + probe.answering * samples + probe.rest

    def _sample(self, stage: Stage) -> _Sample:
        """Write a dataset with few rows of each split beside the real one, chosen by the seed of the stage."""
        world = self.world
        settings, real = world.settings(stage), world.dataset
        folder = self.scratch / f"data-{stage}"
        folder.mkdir(exist_ok=True)
        for name in (table.MANIFEST, table.SPLIT, table.LENGTHS):
            shutil.copyfile(real.folder / name, folder / name)
        wanted = {"held_out": HELD_OUT, real.sft_split: 0, "train": 0}
        split = real.sft_split if stage == "sft" else "train"
        wanted[split] = STEPS * settings.per_device_train_batch_size * self._batches(stage)
        taken = {name: _take(real, name, count, folder, settings.seed) for name, count in wanted.items() if count}
        return _Sample(Dataset(folder), taken[split], taken["held_out"])


def _take(real: Dataset, split: str, count: int, folder: Path, seed: int) -> int:
    """Write ``count`` rows of a split, or all if there are fewer, and return how many there are."""
    total = sum(batch.num_rows for batch in table.read_batches(real.path(split)))
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))  # noqa: S311
    start, writer = 0, None
    for batch in table.read_batches(real.path(split)):
        writer = writer or table.Writer(folder / f"{split}.arrow", batch.schema)
        here = [number - start for number in chosen if start <= number < start + batch.num_rows]
        writer.add(batch.take(here))
        start += batch.num_rows
    if writer is not None:
        writer.close()
    return len(chosen)
