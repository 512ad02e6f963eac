"""ZenML's own dashboard, on a run of ours."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from zenml.client import Client
from zenml.enums import ServerProviderType
from zenml.zen_server.deploy.deployer import LocalServerDeployer
from zenml.zen_server.deploy.deployment import LocalServerDeploymentConfig
from zenml.zen_server.deploy.exceptions import ServerDeploymentError

from preference_tuning.errors import PreferenceTuningError


def open_run(name: str | None, port: int) -> None:
    """Print the address of a run in the dashboard; serve it until Ctrl-C, unless the client already talks to a server.

    Raises:
        PreferenceTuningError: there is no such run, or the server does not start.
    """
    run = _find(name)
    client = Client()
    page = f"/projects/{client.active_project.name}/runs/{run.id}"
    if client.zen_store.config.type != "sql":
        print(client.zen_store.url.rstrip("/") + page)
        return
    _spare_the_survey(client)
    with _served(port) as address:
        print(f"{address}{page}\nCtrl-C stops the dashboard", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            signal.pause()


def _spare_the_survey(client: Client) -> None:
    """Answer for the user of the local database what the dashboard would ask before it shows anything: no news.

    It asks for a name and an address, and where ZenML was heard of.
    """
    user = client.active_user
    if user.email_opted_in is None:
        answered = {**user.user_metadata, "finished_onboarding_survey": True}
        client.update_user(user.id, updated_email_opt_in=False, updated_metadata=answered)


@contextmanager
def _served(port: int) -> Iterator[str]:
    """Serve the local database and give the address of the server.

    `zenml login --local` would also make every later run talk to the server, and fail once it is gone; this leaves
    the client on the database.
    """
    deployer = LocalServerDeployer()
    try:
        server = deployer.deploy_server(LocalServerDeploymentConfig(provider=ServerProviderType.DAEMON, port=port))
    except ServerDeploymentError as error:
        raise PreferenceTuningError(f"ZenML's local server did not start: {error}") from None
    if server.status is None or not server.status.url:
        raise PreferenceTuningError("ZenML's local server did not start; `zenml login --local` says why")
    try:
        yield server.status.url.rstrip("/")
    finally:
        deployer.remove_server()


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
