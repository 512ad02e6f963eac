"""What the areas of a check look at, found once for all of them: the model, the data, what torch knows."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pyarrow.parquet as pq

from preference_tuning.config import DPOConfig, RunConfig, SFTConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import table
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.models import source
from preference_tuning.models.compute import Compute
from preference_tuning.models.devices import processes_of
from preference_tuning.models.shapes import Shapes
from preference_tuning.models.source import ModelSource
from preference_tuning.preflight.batches import Row
from preference_tuning.preflight.facts import Facts, Template, ask, job_of

Stage = Literal["sft", "dpo"]
Found = TypeVar("Found")


class once(Generic[Found]):  # noqa: N801 (a decorator)
    """A property that is looked for once: what was found, or the error that was, is kept."""

    def __init__(self, find: Callable[[Any], Found]) -> None:
        """Take the function that looks."""
        self._find, self.__doc__ = find, find.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_found_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Found:
        kept = vars(instance)
        if self._name not in kept:
            try:
                kept[self._name] = self._find(instance)
            except PreferenceTuningError as error:
                kept[self._name] = error
        found: Found = kept[self._name]
        if isinstance(found, PreferenceTuningError):
            raise found
        return found


class World:
    """The config of a run, and what it points to. Each attribute raises the error that keeps it from being known."""

    def __init__(self, config: RunConfig, ahead: bool = False) -> None:
        """Look at nothing yet; ``ahead``: what torch knows is asked for as soon as the model is found."""
        self.config, self._ahead = config, ahead

    @property
    def output_dir(self) -> Path:
        """Where everything of the run is written."""
        return Path(self.config.output_dir).expanduser().absolute()

    @once
    def source(self) -> ModelSource:
        """The base model."""
        found = source.locate(self.config.base_model)
        if self._ahead:
            self._begin(found)
        return found

    @once
    def facts(self) -> Facts:
        """What torch and transformers know of the model and of this machine."""
        found = self.source
        return (self._asked if self._ahead else self._begin(found)).result()

    def _begin(self, found: ModelSource) -> "Future[Facts]":
        """Ask in the background: it takes seconds, and so does the data."""
        job = job_of(self.config, found)
        with_one = ThreadPoolExecutor(1)
        self._asked = with_one.submit(ask, job)
        with_one.shutdown(wait=False)
        return self._asked

    @property
    def compute(self) -> Compute:
        """What the model runs on."""
        return self._known(self.facts.compute, "device")  # type: ignore[no-any-return]

    @property
    def shapes(self) -> Shapes:
        """The sizes that the model is made of."""
        return self._known(self.facts.shapes, "model")  # type: ignore[no-any-return]

    @property
    def template(self) -> Template:
        """What the tokenizer and its chat template do."""
        return self._known(self.facts.template, "template")  # type: ignore[no-any-return]

    def _known(self, fact: Any, area: str) -> Any:
        if fact is None:
            raise ConfigError("\n".join(found.message for found in self.facts.problems if found.area == area))
        return fact

    @once
    def dataset(self) -> Dataset:
        """The prepared data; measured in tokens where there is a model."""
        try:
            model: ModelSource | None = self.source
        except PreferenceTuningError:
            model = None  # its own area says so, and the data can still be read
        return data_job.prepare_for_run(data_job.of_run(self.config, model))

    @once
    def processes(self) -> int:
        """How many processes train."""
        return processes_of(self.config.training, self.config.base_model)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run."""
        return ("sft", "dpo") if self.config.finetuning_type == "dpo" else ("sft",)

    def settings(self, stage: Stage) -> SFTConfig | DPOConfig:
        """Return the section of a stage."""
        return self.config.sft if stage == "sft" else self.config.dpo

    def rows(self, stage: Stage) -> int:
        """Return how many rows a stage trains on."""
        manifest = self.dataset.manifest
        return manifest.sft if stage == "sft" and manifest.sft is not None else manifest.train

    def steps(self, stage: Stage) -> int:
        """Return the optimizer steps of a stage."""
        return self.settings(stage).total_steps(self.rows(stage), self.processes)

    @once
    def lengths(self) -> list[Row]:
        """The tokens of a sample of the pairs, before any cut."""
        with pq.ParquetFile(self.dataset.folder / table.LENGTHS) as file:
            stored = file.read().to_pydict()
        sides = (stored[name] for name in ("prompt", "chosen", "rejected"))
        return [Row(prompt, (chosen, rejected)) for prompt, chosen, rejected in zip(*sides, strict=True)]

    def room(self, stage: Stage) -> int:
        """Return the longest row of a stage, in tokens."""
        base = self.config.base_model
        return base.max_seq_length if stage == "sft" else self.config.dpo.length(base)

    def sample(self, stage: Stage, room: int | None = None) -> list[Row]:
        """Return the sampled rows as a stage trains on them, cut to ``room`` (None: its own)."""
        most = room or self.room(stage)
        rows = self.lengths if stage == "dpo" else [Row(row.prompt, row.answers[:1]) for row in self.lengths]
        return [row.cut(most) for row in rows]

    def shared(self, stage: Stage) -> bool:
        """Return whether the rows of a batch go through the model as a token tree."""
        wanted = self.config.dpo.engine if stage == "dpo" else "auto"
        return wanted != "trl" and self.shapes.no_tree is None
