"""Schedules of ZenML's orchestrators: handed on where the active stack has them, elsewhere refused at once.

ZenML's own triggers are accepted by the open-source server and never fire; they are not used.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from zenml.client import Client
from zenml.config import DockerSettings
from zenml.config.schedule import Schedule

from pipelines.stack import WITH_SCHEDULES
from preference_tuning.errors import ConfigError
from preference_tuning.scheduling import Plan, Retraining

DEADLINE_SECONDS = 3600
"""How late Kubernetes may still start a run."""


def require_schedulable(on: str) -> None:
    """Refuse a stack that cannot start runs at set times.

    Raises:
        ConfigError: the active stack's orchestrator is not of the kind ``on``, or has no schedules.
    """
    stack = Client().active_stack
    kind = stack.orchestrator.flavor
    if on != kind:
        raise ConfigError(
            f"schedule: the active stack {stack.name!r} runs on {kind!r}, not on {on}; make a stack with it "
            f"(`zenml orchestrator register NAME --flavor={on}`, `zenml stack register`) and `zenml stack set` it, or "
            "take --on cron or --on systemd"
        )
    if not stack.orchestrator.config.is_schedulable:
        raise ConfigError(
            f"schedule: the active stack {stack.name!r} runs on {kind!r}, which has no schedules. Take "
            f"`run.py schedule CONFIG --on cron` or `--on systemd`, or a stack with one of {', '.join(WITH_SCHEDULES)}"
        )


@dataclass(frozen=True)
class OnStack:
    """The schedules of the active stack's orchestrator."""

    kind: str
    """Of the orchestrator."""
    document: dict[str, Any]
    """The run config as ZenML takes it."""
    dags: Path
    """Where Airflow reads its DAGs."""

    def plan(self, work: Retraining, expression: str) -> Plan:
        """Return what ``install`` would do.

        Raises:
            ConfigError: the active stack has no such schedules.
        """
        require_schedulable(self.kind)
        title = (
            f"{self.kind} runs the pipeline at `{expression}`: schedule {name_of(work)!r} of the active ZenML stack."
        )
        notes = ["data       read anew each time; what is unchanged comes from the step cache"]
        if self.kind == "airflow":
            notes += [
                f"DAG        {self._archive(work)}, one run at a time",
                f"steps      {sys.executable} in {work.project}",
            ]
        if self.kind == "kubernetes":
            notes += [f"CronJob    concurrencyPolicy Forbid, startingDeadlineSeconds {DEADLINE_SECONDS}"]
        return Plan(title=title, notes=tuple(notes))

    def install(self, work: Retraining, expression: str) -> None:
        """Give the pipeline a schedule, in place of an earlier one of the same name.

        Raises:
            ConfigError: the active stack has no such schedules.
        """
        require_schedulable(self.kind)
        from pipelines.training import training

        self.remove(work)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / work.config.name
            path.write_text(yaml.safe_dump(self.document), encoding="utf-8")
            schedule = Schedule(name=name_of(work), cron_expression=expression, catchup=False)
            settings = settings_of(work, self.kind, self.dags)
            training.with_options(config_path=str(path), schedule=schedule, settings=settings)()

    def remove(self, work: Retraining) -> bool:
        """Take the schedule away; return whether there was one."""
        client, archive = Client(), self._archive(work)
        found = client.list_schedules(name=name_of(work)).items
        there = bool(found) or archive.is_file()
        for schedule in found:
            client.delete_schedule(schedule.id)
        archive.unlink(missing_ok=True)
        return there

    def _archive(self, work: Retraining) -> Path:
        return self.dags / f"{name_of(work)}.zip"


def name_of(work: Retraining) -> str:
    """Return the name of a schedule, and of its DAG."""
    return f"retrain-{work.name}"


def settings_of(work: Retraining, on: str, dags: Path) -> dict[str, Any]:
    """Return the settings that an orchestrator needs for one run at a time."""
    if on == "kubernetes":
        # Kubernetes' own default starts a second training beside the first.
        forbid = {"concurrency_policy": "Forbid", "starting_deadline_seconds": DEADLINE_SECONDS}
        return {"orchestrator": forbid}
    if on != "airflow":
        return {}
    from zenml.integrations.airflow.flavors.airflow_orchestrator_flavor import AirflowOrchestratorSettings

    # No docker: nothing is built, and the steps run this project as it lies here.
    bare = DockerSettings(
        skip_build=True,
        parent_image="none",
        allow_download_from_artifact_store=False,
        allow_download_from_code_repository=False,
    )
    airflow = AirflowOrchestratorSettings(
        custom_dag_generator="pipelines.airflow_dag",
        dag_output_dir=str(dags),
        dag_id=name_of(work),
        dag_tags=["preference_tuning"],
        dag_args={"max_active_runs": 1},
        operator_args={"python": sys.executable, "project": str(work.project), "environment": _environment(work)},
    )
    return {"docker": bare, "orchestrator": airflow}


def dags_folder(given: Path | None) -> Path:
    """Return where Airflow reads its DAGs: as given, else below AIRFLOW_HOME."""
    home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()
    return (given or home / "dags").absolute()


def _environment(work: Retraining) -> dict[str, str]:
    """Return what the steps need of the environment; PATH and the like are Airflow's."""
    return {name: value for name, value in work.environment.items() if name not in ("PATH", "LD_LIBRARY_PATH")}
