"""ZenML's own dashboard, on a run of ours."""

import os
import subprocess
import sys
from pathlib import Path

from zenml.client import Client

from preference_tuning.errors import PreferenceTuningError


def open_run(name: str | None, port: int) -> None:
    """Start the local server unless the client already talks to one, and print the address of the run.

    Raises:
        PreferenceTuningError: there is no such run, or the server does not start.
    """
    run = _find(name)
    client = Client()
    if client.zen_store.config.type == "sql":
        zenml = Path(sys.executable).with_name("zenml")
        command = [str(zenml), "login", "--local", "--port", str(port)]
        environment = {**os.environ, "ZENML_AUTO_OPEN_DASHBOARD": "false"}
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
            raise PreferenceTuningError("ZenML's local server did not start; `zenml login --local` says why")
        address = f"http://127.0.0.1:{port}"
    else:
        address = client.zen_store.url.rstrip("/")
    print(f"{address}/projects/{client.active_project.name}/runs/{run.id}")
    print("stop the local server with: zenml logout --local")


def _find(name: str | None):  # type: ignore[no-untyped-def]  # a response model of ZenML
    client = Client()
    if name:
        try:
            return client.get_pipeline_run(name)
        except KeyError:
            raise PreferenceTuningError(f"there is no run {name!r}; `zenml pipeline runs list` shows them") from None
    runs = client.list_pipeline_runs(sort_by="desc:created", size=1)
    if not runs.items:
        raise PreferenceTuningError("there is no run yet; start one with `python run.py train configs/quickstart.yaml`")
    return runs.items[0]
