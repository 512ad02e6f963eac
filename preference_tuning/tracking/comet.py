"""Comet: the only module that knows comet_ml. One tracker that sends, and one that writes Comet's offline archives.

Only what is handed over here goes out: comet_ml's own loggers of code, environment, git and output are off.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preference_tuning.errors import ConfigError, TransientError
from preference_tuning.tracking.folder import ARCHIVES, About, RunFolder
from preference_tuning.tracking.spool import Point
from preference_tuning.tracking.trackers import Fact, Kind, Known

KEY = "COMET_API_KEY"
SECONDS = 10
"""How long Comet may take to answer a request."""
FILE_SECONDS = 120
"""The same where a file is sent."""
BEAT_SECONDS = 30.0
"""Between two signs of life; without them Comet shows a run as ended."""
SETTINGS = {
    "COMET_TIMEOUT_HTTP": str(SECONDS),
    "COMET_TIMEOUT_API": str(SECONDS),
    "COMET_TIMEOUT_FILE_UPLOAD": str(FILE_SECONDS),
    # A request that failed may have been heard. So it is not sent again before Comet was asked what it has.
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "0",
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_ERROR_TRACKING_ENABLE": "false",
}
"""How comet_ml is set; it reads them from the environment, each time."""
ASSET_TYPES: dict[Kind, str] = {"file": "asset", "chart": "image"}


class Experiment:
    """The run's experiment in Comet: each method is one request, and returns when Comet has acknowledged it.

    Built on comet_ml's own connections and not on its ``Experiment``, whose queue does not tell what arrived.
    """

    def __init__(self, about: About, connection: Any, client: Any, known: bool, url: str | None) -> None:
        self._about, self._connection, self._client, self._known = about, connection, client, known
        self.url = url
        self._beaten = 0.0

    @classmethod
    def connect(cls, about: About) -> "Experiment":
        """Create the experiment of a run, or find it.

        Raises:
            ConfigError: there is no key, or Comet refuses it, the workspace or the project.
            TransientError: Comet cannot be reached.
        """
        key = os.environ.get(KEY)
        if not key:
            raise ConfigError(f"{KEY} is not set; sending to Comet needs it")
        with _told():
            _configure()
            from comet_ml.connection import connection_factory as connections
            from comet_ml.exceptions import ExperimentAlreadyUploaded

            connection = connections.get_rest_server_connection(api_key=key, experiment_key=about.id)
            client = connections.get_rest_api_client("v2", api_key=key, check_version=False)
            known = False
            try:
                answer = connection.add_run(about.project, about.workspace)
            except ExperimentAlreadyUploaded:
                answer, known = connection.get_run(about.id), True
            connection.run_id, connection.project_id = answer.run_id, answer.project_id
            url = f"{answer.focus_link}{about.id}" if answer.focus_link else None
            found = cls(about, connection, client, known, url)
            found.beat()
            if about.tags:
                client.add_experiment_tags(about.id, list(about.tags))
            return found

    def known(self, names: Collection[str]) -> Known:
        """Return what Comet has: nothing where the experiment was made just now."""
        if not self._known:
            return Known()
        with _told():
            key = self._about.id
            there = {value["name"] for value in self._client.get_experiment_metrics_summaries(key)["values"]}
            steps = {name: self._steps(name) for name in sorted(there & set(names))}
            assets = self._client.get_experiment_asset_list(key) or []
            return Known(steps, {asset["fileName"] for asset in assets})

    def metrics(self, points: Sequence[Point]) -> None:
        """Send points, in one request."""
        from comet_ml.batch_utils import MessageBatchItem
        from comet_ml.messages import MetricMessage

        items = []
        for point in points:
            for name, value in point.metrics.items():
                message = MetricMessage()
                message.set_metric(name, value, step=point.step, epoch=point.epoch)
                items.append(MessageBatchItem(message))
        with _told():
            self._connection.log_metrics_batch(items)

    def parameters(self, values: Mapping[str, str]) -> None:
        """Send settings, in one request."""
        from comet_ml.batch_utils import MessageBatchItem
        from comet_ml.messages import ParameterMessage

        items = []
        for name, value in values.items():
            message = ParameterMessage()
            message.set_param(name, value, source="manual")
            items.append(MessageBatchItem(message))
        with _told():
            self._connection.log_parameters_batch(items)

    def others(self, values: Mapping[str, Fact]) -> None:
        """Send facts, a request each."""
        with _told():
            for name, value in values.items():
                self._client.log_experiment_other(self._about.id, name, value)

    def asset(self, path: Path, name: str, kind: Kind) -> None:
        """Send a file."""
        with _told():
            self._client.log_experiment_asset(
                self._about.id, str(path), file_name=name, ftype=ASSET_TYPES[kind], overwrite=True
            )

    def beat(self) -> None:
        """Say that the run lives, when it is time for it."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            with _told():
                self._connection.heartbeat()
            self._beaten = time.monotonic()

    def end(self, failed: bool) -> None:
        """Say that the run ended, and how."""
        with _told():
            self._client.set_experiment_state(self._about.id, "crashed" if failed else "finished")
            self._connection.close()

    def _steps(self, name: str) -> set[int]:
        found = self._client.get_experiment_metric(self._about.id, name)["metrics"]
        return {int(value["step"]) for value in found if value.get("step") is not None}


class Archive:
    """An offline archive of a stage, as `comet upload` takes it. All archives of a run have its key: one experiment."""

    def __init__(self, run: RunFolder, stage: str) -> None:
        """Begin an archive in the folder of a run.

        In a folder of its own: the end of an archive's name comes from the global random state, so two archives that
        are begun after the same seeding would be one file.
        """
        import comet_ml

        about = run.about
        self._folder, self._stage = run.path / ARCHIVES, stage
        self._folder.mkdir(exist_ok=True)
        self._aside = Path(tempfile.mkdtemp(dir=self._folder, prefix=".writing-"))
        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        self._experiment = comet_ml.start(
            online=False,
            workspace=about.workspace,
            project_name=about.project,
            experiment_key=about.id,
            mode="get_or_create",
            experiment_config=private_settings(self._aside, about.tags),
        )
        # Its thread sees the end after the first time, and we see that after a twentieth of the second; they are a
        # second each otherwise. A comet_ml that calls them otherwise takes longer, and nothing else.
        self._experiment.streamer.queue_timeout = 0.02
        self._experiment.streamer._wait_for_finish_sleep_interval = 0.1

    def known(self, names: Collection[str]) -> Known:
        """Return nothing: an archive is empty at first."""
        return Known()

    def metrics(self, points: Sequence[Point]) -> None:
        """Write points."""
        for point in points:
            self._experiment.log_metrics(point.metrics, step=point.step, epoch=point.epoch)

    def parameters(self, values: Mapping[str, str]) -> None:
        """Write settings."""
        self._experiment.log_parameters(dict(values))

    def others(self, values: Mapping[str, Fact]) -> None:
        """Write facts."""
        self._experiment.log_others(dict(values))

    def asset(self, path: Path, name: str, kind: Kind) -> None:
        """Write a file."""
        if kind == "chart":
            self._experiment.log_image(str(path), name=name)
        else:
            self._experiment.log_asset(str(path), file_name=name)

    def beat(self) -> None:
        """Do nothing."""

    def end(self, failed: bool) -> None:
        """Finish the archive under the name of its stage; one that is there already is left as it is."""
        self._experiment.end()
        (written,) = self._aside.glob("*.zip")
        numbers = iter(range(2, 10_000))
        name = f"{self._stage}.zip"
        while True:
            try:
                (self._folder / name).hardlink_to(written)
                break
            except FileExistsError:
                name = f"{self._stage}-{next(numbers)}.zip"
        shutil.rmtree(self._aside)


def private_settings(folder: Path, tags: Sequence[str]) -> Any:
    """Return comet_ml's ``ExperimentConfig`` with everything off that it would log by itself.

    Args:
        folder: for offline archives.
        tags: of the experiment.
    """
    _configure()
    import comet_ml

    return comet_ml.ExperimentConfig(
        offline_directory=str(folder),
        tags=list(tags),
        log_code=False,
        log_git_metadata=False,
        log_git_patch=False,
        log_env_details=False,
        log_env_host=False,
        log_env_gpu=False,
        log_env_cpu=False,
        log_env_network=False,
        log_env_disk=False,
        auto_output_logging=False,
        auto_log_co2=False,
        auto_metric_logging=False,
        auto_param_logging=False,
        parse_args=False,
        log_graph=False,
        display_summary_level=0,
    )


def prepare() -> None:
    """Import comet_ml, in its quiet."""
    _configure()
    import comet_ml  # noqa: F401


def _configure() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("comet_ml").setLevel(logging.CRITICAL)


REFUSALS = {
    "InvalidAPIKey": f"Comet does not know the key in {KEY}; take it from your settings in Comet",
    "InvalidWorkspace": "tracking.workspace: Comet has no such workspace, or the key may not write to it",
    "ServiceAccountWorkspaceRestricted": "tracking.workspace: the service account may not write to it",
    "ProjectNameEmpty": "tracking.project: Comet wants a name",
    "ProjectNameIsTooLong": "tracking.project: the name is too long for Comet",
    "ViewOnlyAccessException": f"the key in {KEY} may only read",
    "SDKVersionIsTooOldException": "Comet wants a newer comet-ml; update it",
    "MaxExperimentNumberReachedException": "the project in Comet is full",
}
"""What comet_ml raises where trying again does not help; its own messages may hold the key."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what comet_ml raises into our errors."""
    import requests
    from comet_ml.exceptions import CometException

    try:
        yield
    # A ValueError is what comet_ml makes of an answer that it does not understand.
    except (CometException, requests.RequestException, OSError, ValueError) as error:
        kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
        if kind in REFUSALS:
            raise ConfigError(REFUSALS[kind]) from None
        if status in (401, 403):
            raise ConfigError(f"Comet refuses the key in {KEY} ({status})") from None
        raise TransientError(f"Comet cannot be reached ({f'it answers {status}' if status else kind})") from None
