"""Whole runs without ZenML and without processes: the jobs of each stage run in the test's own process."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from preference_tuning import jobs
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.models.source import locate
from preference_tuning.registry import result
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import FolderRegistry, version_id
from preference_tuning.registry.result import Registered, Result
from preference_tuning.training import job


def run_here(module: str, folder: Path, work: Any, kind: Any, again: bool = False, processes: int = 1) -> Any:
    """Stand in for ``jobs.run``: the same entry point, folder and result, in this process."""
    assert processes == 1
    if again or not (folder / jobs.RESULT).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        jobs.write_json(folder / jobs.JOB, work.model_dump(mode="json"))
        made = importlib.import_module(f"{module}.__main__").main(folder, work)
        jobs.write_json(folder / jobs.RESULT, made.model_dump(mode="json"))
    return kind.model_validate_json((folder / jobs.RESULT).read_text(encoding="utf-8"))


class Lab:
    """A folder with a registry, in which runs are done one after the other."""

    def __init__(self, folder: Path, parameters: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.parameters = folder, parameters
        patch.setattr(jobs, "run", run_here)

    def config(self, **changes: Any) -> RunConfig:
        """Return the config of a run with ``changes`` to its sections."""
        places = {"output_dir": str(self.folder / "outputs"), "registry": {"folder": str(self.folder / "registry")}}
        sections = {**self.parameters, **places, "tracking": {"mode": "off"}}
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
        return RunConfig.model_validate(sections)

    def rows(self, name: str, rows: list[dict[str, Any]]) -> str:
        """Write rows and return where they lie."""
        return str(write_jsonl(self.folder / f"{name}.jsonl", rows))

    @property
    def registry(self) -> FolderRegistry:
        return FolderRegistry(self.config().registry)

    def run(self, **changes: Any) -> tuple[Result, Registered]:
        """Do what the pipeline does."""
        outcome = self.train(**changes)
        return outcome, result.register(outcome, outcome.config.registry)

    def train(self, **changes: Any) -> Result:
        """Do what the pipeline does before it registers."""
        return self.train_with(self.config(**changes))

    def train_with(self, config: RunConfig) -> Result:
        """Do the same with a config."""
        source, out = locate(config.base_model), Path(config.output_dir)
        dataset = data_job.prepare_for_run(data_job.of_run(config, source))
        common = (config.base_model, source, dataset, out, config.training)
        stages = {"sft": job.train(job.from_artifacts("sft", *common, lora=config.lora, sft=config.sft))}
        if config.finetuning_type == "dpo":
            work = job.from_artifacts("dpo", *common, dpo=config.dpo, adapter=stages["sft"].adapter)
            stages["dpo"] = job.train(work)
        adapters = {stage: trained.adapter for stage, trained in stages.items()}
        evaluated = evaluation_job.evaluate(
            evaluation_job.from_artifacts(
                config.base_model, source, dataset, adapters, config.evaluation, out,
                champion=to_beat(self.registry, version_id(list(adapters.values())[-1])),
                beta=config.dpo.beta, max_length=config.dpo.length(config.base_model),
            )
        )  # fmt: skip
        return Result(
            finetuning_type=config.finetuning_type, base_model=config.base_model, source=source, dataset=dataset,
            adapters=adapters, training={stage: trained.evidence for stage, trained in stages.items()},
            evaluation=evaluated.evidence, config=config, output_dir=out, run={},
        )  # fmt: skip
