"""ZenML's own dashboard, on a run of ours."""

from typing import Any

from zenml.client import Client
from zenml.enums import ServerProviderType
from zenml.zen_server.deploy.deployer import LocalServerDeployer
from zenml.zen_server.deploy.deployment import LocalServerDeploymentConfig
from zenml.zen_server.deploy.exceptions import ServerDeploymentError

from preference_tuning.errors import PreferenceTuningError


def open_run(name: str | None, port: int) -> None:
    """Start the local server unless the client already talks to one, and print the address of the run.

    Raises:
        PreferenceTuningError: there is no such run, or the server does not start.
    """
    run = _find(name)
    client = Client()
    local = client.zen_store.config.type == "sql"
    address = _serve(port) if local else client.zen_store.url.rstrip("/")
    print(f"{address}/projects/{client.active_project.name}/runs/{run.id}")
    if local:
        print("the server goes on in the background; stop it with: zenml logout --local")


def _serve(port: int) -> str:
    """Start the local server in the background and return its address.

    `zenml login --local` would also make every later run talk to it, and fail once it is gone; this leaves the
    client on the database, which the server shows.
    """
    config = LocalServerDeploymentConfig(provider=ServerProviderType.DAEMON, port=port)
    try:
        server = LocalServerDeployer().deploy_server(config)
    except ServerDeploymentError as error:
        raise PreferenceTuningError(f"ZenML's local server did not start: {error}") from None
    if server.status is None or not server.status.url:
        raise PreferenceTuningError("ZenML's local server did not start; `zenml login --local` says why")
    return server.status.url.rstrip("/")


def _find(name: str | None) -> Any:
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
