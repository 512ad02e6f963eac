"""Comet: one experiment a run, over all its stages; offline archives where there is no key.

Only what is logged here goes out: no code, no environment, no command line, no git data, no console output.
"""

import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from preference_tuning.config import TrackingConfig
from preference_tuning.errors import ConfigError
from preference_tuning.tracking.spool import Point, read

EXPERIMENT_KEY = re.compile(r"^[A-Za-z0-9]{32,50}$")
COMET_URL = "https://www.comet.com"
CONNECT_SECONDS = 3.0


class CometRun(BaseModel):
    """Which experiment a stage writes to, and where its archives lie."""

    config: TrackingConfig
    experiment_key: str
    folder: Path

    def has(self, stage: str) -> bool:
        """Return whether a stage wrote to the experiment."""
        return (self.folder / stage).is_dir()

    def mode(self) -> str:
        """Return ``online``, ``offline`` or ``off``.

        Raises:
            ConfigError: online is asked for without a key.
        """
        has_key = bool(os.environ.get("COMET_API_KEY"))
        if self.config.mode == "online" and not has_key:
            raise ConfigError("tracking.mode: online needs COMET_API_KEY in the environment; use auto or offline")
        if self.config.mode == "auto":
            return "online" if has_key else "offline"
        return self.config.mode


class Comet:
    """A stage's connection to the run's experiment. After ``start`` it never raises: it warns once and goes on."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    @classmethod
    def start(cls, run: CometRun, stage: str) -> "Comet":
        """Connect ``stage`` to the experiment of ``run``.

        Each stage has an archive folder of its own: the suffix of an archive's name comes from the global random
        state, which trainers seed, so two stages in one folder would overwrite each other.
        """
        mode = run.mode()
        if mode == "off":
            return cls(None)
        import comet_ml

        if mode == "online" and not _reachable(os.environ.get("COMET_URL_OVERRIDE", COMET_URL)):
            _warn("Comet cannot be reached; this stage writes an offline archive, to be sent by `comet upload`")
            mode = "offline"
        folder = run.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        experiment = comet_ml.start(
            online=mode == "online",
            workspace=run.config.workspace,
            project_name=run.config.project,
            experiment_key=run.experiment_key,
            mode="get_or_create",
            experiment_config=_private_settings(folder, list(run.config.tags)),
        )
        return cls(experiment)

    def log(self, point: Point) -> None:
        """Send one point."""
        self._try(lambda experiment: experiment.log_metrics(point.metrics, step=point.step, epoch=point.epoch))

    def log_parameters(self, stage: str, values: dict[str, Any]) -> None:
        """Send a section of the config as ``stage/name`` parameters."""
        named = {f"{stage}/{name}": str(value) for name, value in values.items()}
        self._try(lambda experiment: experiment.log_parameters(named))

    def log_others(self, values: dict[str, Any]) -> None:
        """Send facts that are not numbers: hashes, the verdict, the version."""
        self._try(lambda experiment: experiment.log_others(values))

    def replay(self, spool: Path) -> None:
        """Send every point of a spool: of a stage that came from the step cache and did not run now."""
        for point in read(spool):
            self.log(point)

    def end(self) -> None:
        """Write the archive, or wait until everything is sent."""
        self._try(lambda experiment: experiment.end())

    def _try(self, send: Any) -> None:
        if self._experiment is None:
            return
        try:
            send(self._experiment)
        except Exception as error:  # tracking must not stop training; the spool has everything
            _warn(f"Comet failed ({type(error).__name__}: {error}); metrics go on to the spool only")
            self._experiment = None


def _private_settings(folder: Path, tags: list[str]) -> Any:
    import comet_ml

    return comet_ml.ExperimentConfig(
        offline_directory=str(folder),
        tags=tags,
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


def _reachable(url: str) -> bool:
    """Return whether the Comet host accepts a connection; comet_ml itself would wait half a minute and lose metrics."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
