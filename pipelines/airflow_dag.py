"""The DAG of a scheduled pipeline on Airflow without docker: each step is a process of this project's own Python.

One file for two readers. ZenML imports it to describe the DAG (there Airflow is missing), and packs it into the DAG's
archive, where Airflow runs it in an environment of its own (there this project and ZenML are missing). So it imports
nothing but the standard library, pydantic and, when Airflow reads it, Airflow.
"""

import datetime
import shlex
import zipfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# The names of these four are ZenML's (zenml/integrations/airflow/orchestrators/airflow_orchestrator.py).
CONFIG_FILENAME = "config.json"
ENV_ZENML_AIRFLOW_RUN_ID = "ZENML_AIRFLOW_RUN_ID"


class TaskConfiguration(BaseModel):
    """One step; ``operator_args`` has the Python, folder and environment that it runs in."""

    id: str
    zenml_step_name: str
    upstream_steps: list[str]
    docker_image: str
    command: list[str]
    arguments: list[str]
    environment: dict[str, str] = {}
    operator_source: str
    operator_args: dict[str, Any] = {}


class DagConfiguration(BaseModel):
    """The pipeline and its schedule."""

    id: str
    tasks: list[TaskConfiguration]
    local_stores_path: str | None = None
    schedule: datetime.timedelta | str | None = None
    start_date: datetime.datetime
    end_date: datetime.datetime | None = None
    catchup: bool = False
    tags: list[str] = []
    dag_args: dict[str, Any] = {}


def command_of(task: TaskConfiguration) -> str:
    """Return the shell command of a step."""
    python, module = task.operator_args["python"], "pipelines.airflow_step"
    # Airflow takes a command that ends in .sh for a template file; the space keeps it from that.
    return shlex.join([python, "-m", module, *task.arguments]) + " "


def environment_of(task: TaskConfiguration) -> dict[str, str]:
    """Return the environment of a step beside Airflow's own; Airflow fills in the id of its run."""
    return {**task.environment, **task.operator_args["environment"], ENV_ZENML_AIRFLOW_RUN_ID: "{{ run_id }}"}


def _dag(config: DagConfiguration) -> Any:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG

    dag = DAG(
        dag_id=config.id,
        schedule=config.schedule,
        start_date=config.start_date,
        end_date=config.end_date,
        catchup=config.catchup,
        tags=config.tags,
        is_paused_upon_creation=False,
        **config.dag_args,
    )
    with dag:
        steps = {
            task.zenml_step_name: BashOperator(
                task_id=task.id,
                bash_command=command_of(task),
                env=environment_of(task),
                append_env=True,
                cwd=task.operator_args["project"],
                # The first run of a new DAG may come before Airflow's API server is up.
                retries=2,
                retry_delay=datetime.timedelta(seconds=30),
            )
            for task in config.tasks
        }
        for task in config.tasks:
            for upstream in task.upstream_steps:
                steps[task.zenml_step_name].set_upstream(steps[upstream])
    return dag


_archive = Path(__file__).absolute().parent
if _archive.is_file():
    # Airflow reads it from inside of the archive, so what looks like its folder is a file.
    with zipfile.ZipFile(_archive) as _opened:
        dag = _dag(DagConfiguration.model_validate_json(_opened.read(CONFIG_FILENAME)))
