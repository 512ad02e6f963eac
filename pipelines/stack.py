"""Whether ZenML's active stack can do what a run config asks of it. Only asked where it asks for something."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preference_tuning.config import RunConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models.devices import cuda_devices
from preference_tuning.preflight.findings import Area, Finding

WITH_SCHEDULES = ("airflow", "kubernetes", "kubeflow", "vertex", "sagemaker", "azureml", "databricks", "hyperai")
"""Orchestrators with schedules in zenml 0.98."""
COMPONENTS = ("step_operator", "experiment_tracker")
"""Components that a step may name."""


def look(document: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    """Yield what the stack says to the schedule, the resources and the components in the config.

    Args:
        document: the config as ZenML reads it.
        config: the same, typed.
    """
    asked = _asked(document)
    if not asked:
        return
    import zenml
    from zenml.client import Client

    area, stack = Area("stack"), Client().active_stack
    orchestrator = stack.orchestrator
    where = f"the {orchestrator.flavor} orchestrator of stack {stack.name!r} (ZenML {zenml.__version__})"
    yield area.ok(where)
    if "schedule" in asked and not orchestrator.config.is_schedulable:
        yield area.error(
            ConfigError(f"schedule: {where} runs nothing on a schedule"),
            "remove `schedule` and take `run.py schedule CONFIG --on cron` or `--on systemd`, or set a stack whose "
            f"orchestrator has schedules: {', '.join(WITH_SCHEDULES)}",
        )
    count = asked.get("gpus", 0)
    if count and orchestrator.config.is_local:
        yield from _local_gpus(area, count, where, config)
    for kind, name in asked.get("components", ()):
        if name not in {component.name for component in Client().list_stack_components(type=kind).items}:
            yield area.error(
                ConfigError(f"{kind}: there is no {name!r} in ZenML"), f"zenml {kind.replace('_', '-')} list"
            )


@contextmanager
def images_explained() -> Iterator[None]:
    """Explain that the images in which the active stack runs steps cannot be built here.

    Not asked before: ZenML takes an image that was built earlier, on whatever machine, where one fits.

    Raises:
        ConfigError: there is none, and nothing to build it with. No step has run.
    """
    try:
        yield
    except RuntimeError as error:
        from zenml.client import Client
        from zenml.orchestrators import ContainerizedOrchestrator

        stack, reason = Client().active_stack, " ".join(str(error).split())
        if not isinstance(stack.orchestrator, ContainerizedOrchestrator) or "container engine" not in reason:
            raise
        raise ConfigError(
            f"stack: the {stack.orchestrator.flavor} orchestrator of stack {stack.name!r} runs steps in a container "
            f"image, which cannot be built here: {reason} Or `zenml stack set default` runs the pipeline here"
        ) from None


def _local_gpus(area: Area, count: int, where: str, config: RunConfig) -> Iterator[Finding]:
    there = 0 if config.base_model.device == "cpu" else cuda_devices()
    if there >= count:
        yield area.ok(f"{there} CUDA devices, {count} asked for")
        return
    error = ConfigError(
        f"settings.resources.gpu_count: {count} asked for, {where} runs on this machine, which has {there}"
    )
    yield area.error(error, "remove it to train on what is here, or set a stack that has GPUs")


def _asked(document: dict[str, Any]) -> dict[str, Any]:
    """Return what the config asks of the stack: a schedule, the most GPUs of a step, components by name."""
    steps = [step for step in (document.get("steps") or {}).values() if isinstance(step, dict)]
    found: dict[str, Any] = {}
    if document.get("schedule"):
        found["schedule"] = True
    gpus = max((_gpus(part) for part in (document, *steps)), default=0)
    if gpus:
        found["gpus"] = gpus
    named = {(kind, step[kind]) for step in steps for kind in COMPONENTS if isinstance(step.get(kind), str)}
    if named:
        found["components"] = sorted(named)
    return found


def _gpus(part: dict[str, Any]) -> int:
    resources = (part.get("settings") or {}).get("resources") or {}
    return int(resources.get("gpu_count") or 0)
