"""Tasks of lm-evaluation-harness on every model, in a process of their own: ``python -m ...evaluation.harness FOLDER``.

The only module that knows lm_eval (tried with 0.4.13). Importing it takes ten seconds and more, so preflight reads the
task files itself.
"""

import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from preference_tuning import fingerprint, jobs
from preference_tuning.config import PORTABLE, BaseModelConfig, HarnessConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.statistics import CONFIDENCE, Figure
from preference_tuning.models.source import ModelSource

MODULE = "preference_tuning.evaluation.harness"
BASE = "base"
WHERE = "evaluation.lm_eval"


class HarnessJob(jobs.Job):
    """Which tasks run on which models; the base model is always among them."""

    config: HarnessConfig
    base_model: BaseModelConfig
    source: ModelSource
    adapters: dict[str, Path]
    """Folders of adapters or full models, by name."""
    adapter_hashes: dict[str, str]
    batch_size: int
    seed: int
    output_dir: Path

    def identity(self) -> dict[str, Any]:
        """Return what makes two of them the same work."""
        names = {"config", "base_model", "adapter_hashes", "batch_size", "seed"}
        return {
            **self.model_dump(mode="json", include=names, context=PORTABLE),
            "base_model_fingerprint": self.source.fingerprint,
            "tasks": fingerprint.of_directory(Path(self.config.include_path)),
            "code": fingerprint.of_sources(MODULE),
        }


class HarnessResult(BaseModel):
    """The figures of every model, named ``lm_eval/<task>/<metric>``."""

    version: str
    models: dict[str, dict[str, Figure]]


def check(config: HarnessConfig) -> str:
    """Return what will run, in a line.

    Raises:
        ConfigError: the package is missing, or a task is not in ``include_path``.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"{WHERE}: needs lm-evaluation-harness, which is missing: pip install '.[lm-eval]'")
    folder = Path(config.include_path)
    if not folder.is_dir():
        raise ConfigError(f"{WHERE}.include_path: no such folder: {folder.absolute()}")
    known = set(_names(folder))
    missing = [task for task in config.tasks if task not in known]
    if missing:
        there = f"it has {', '.join(sorted(known))}" if known else "it has no task in it"
        raise ConfigError(f"{WHERE}.tasks: {', '.join(missing)} not found in {folder.absolute()}; {there}")
    return f"lm_eval tasks {', '.join(config.tasks)}"


def run(job: HarnessJob, again: bool = False) -> HarnessResult:
    """Run the tasks and return their figures; finished work is not done twice unless ``again``.

    Raises:
        ConfigError: as ``check``.
        PreferenceTuningError: the harness failed, or gave no figure for a task.
    """
    check(job.config)
    folder = (job.output_dir / "jobs" / f"lm-eval-{fingerprint.of_value(job.identity())[:16]}").absolute()
    return jobs.run(MODULE, folder, job, HarnessResult, again)


def figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Return the figures in the results of the harness, each with the interval that its standard error gives.

    The harness names a metric ``acc,none``: after the comma is the filter that the answers went through, which is
    shown where there is one. Without a standard error the interval is nan.
    """
    found: dict[str, Figure] = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, through = name.partition(",")
            if not through or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            shown = metric if through == "none" else f"{metric}@{through}"
            found[f"lm_eval/{task}/{shown}"] = _figure(float(value), values.get(f"{metric}_stderr,{through}"))
    return found


def main(_: Path, job: HarnessJob) -> HarnessResult:
    """Be the job's process: load the models in turn and run the tasks on each."""
    from preference_tuning.models import backend

    backend.activate(job.base_model)
    import lm_eval
    from lm_eval.tasks import TaskManager

    from preference_tuning.models import compute
    from preference_tuning.models.family import Family

    chosen = compute.choose(job.base_model, job.output_dir)
    family = Family(job.base_model, job.source, job.output_dir, chosen, job.adapters)
    tasks = TaskManager(include_path=job.config.include_path, include_defaults=False)
    found = {}
    for name in (BASE, *job.adapters):
        with family.member(None if name == BASE else name) as model:
            found[name] = _run_tasks(job, model, family.base, tasks)
    return HarnessResult(version=lm_eval.__version__, models=found)


def _run_tasks(job: HarnessJob, model: Any, base: Any, tasks: Any) -> dict[str, Figure]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    low = base.dtype != torch.float32
    wrapped = HFLM(
        pretrained=model,
        tokenizer=base.tokenizer,
        batch_size=job.batch_size,
        max_length=job.base_model.max_seq_length,
        mixed_precision_dtype=base.dtype if low else None,
    )
    evaluated = simple_evaluate(
        model=wrapped,
        tasks=list(job.config.tasks),
        task_manager=tasks,
        num_fewshot=job.config.num_fewshot,
        limit=job.config.limit,
        log_samples=False,
        random_seed=job.seed,
        numpy_random_seed=job.seed,
        torch_random_seed=job.seed,
        fewshot_random_seed=job.seed,
    )
    found = figures(evaluated["results"])
    if not found:
        raise PreferenceTuningError(f"{WHERE}: {', '.join(job.config.tasks)} gave no figure")
    return found


def _figure(value: float, error: Any) -> Figure:
    from scipy import stats  # most of a second that only figures need

    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    half = z * error if isinstance(error, int | float) else math.nan
    return Figure(value=value, low=value - half, high=value + half)


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of tasks, groups and tags in the YAML files of a folder, as the harness would find them."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Tasks)  # noqa: S506 (a SafeLoader)
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{WHERE}.include_path: cannot read {path}: {_first_line(error)}") from None
        if isinstance(values, dict):
            tags = values.get("tag", [])
            named = [values.get("group"), values.get("task"), *(tags if isinstance(tags, list) else [tags])]
            yield from (name for name in named if isinstance(name, str))


class _Tasks(yaml.SafeLoader):
    """Reads task files without running the functions that they name."""


_Tasks.add_multi_constructor("!", lambda loader, suffix, node: None)


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]


if __name__ == "__main__":
    jobs.main(HarnessJob, main)
