"""What a step knows of the run it is part of.

Read from the run and not passed as parameters, so that it is no part of a cache key.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from zenml import get_step_context
from zenml.client import Client
from zenml.utils.dashboard_utils import get_run_url

from preference_tuning import interruption
from preference_tuning.config import JudgeConfig, RunConfig
from preference_tuning.errors import ConfigError
from preference_tuning.tracking.comet import CometRun


@dataclass(frozen=True)
class Run:
    """The run of the step that asks."""

    id: str
    name: str
    config: RunConfig
    fresh: bool
    """Whether finished work is to be done anew (`--no-cache`)."""

    @property
    def output_dir(self) -> Path:
        """Where jobs, models and archives go."""
        return Path(self.config.output_dir)

    @property
    def model(self) -> str:
        """Whose training this is: the name in the registry."""
        return self.config.registry.name

    def names(self) -> dict[str, str]:
        """Return what the run is called where it can be seen; its address if ZenML has a server."""
        url = get_run_url(get_step_context().pipeline_run)
        comet = {"comet_experiment": self.comet.experiment_key} if self.config.tracking.mode != "off" else {}
        return {"zenml_run": self.name, "zenml_run_id": self.id, **({"zenml_url": url} if url else {}), **comet}

    @property
    def comet(self) -> CometRun:
        """The one experiment of the run; its key is the id of the ZenML run."""
        folder = (self.output_dir / "comet" / self.id).absolute()
        return CometRun(config=self.config.tracking, experiment_key=self.id, folder=folder)


def current_run() -> Run:
    """Return the run of the current step."""
    interruption.check()
    run = get_step_context().pipeline_run
    return Run(
        id=run.id.hex,
        name=run.name,
        config=RunConfig.model_validate(run.config.parameters),
        fresh=run.config.enable_cache is False,
    )


def give_key_to(judge: JudgeConfig | None) -> None:
    """Put the judge's key, if it is a ZenML secret, where the evaluation's process looks for it."""
    if judge is not None and judge.api_key_secret is not None:
        os.environ[judge.api_key_env] = secret(judge.api_key_secret)


def secret(name: str) -> str:
    """Return the value ``api_key`` of a ZenML secret.

    Raises:
        ConfigError: there is no such secret, or it has no such value. The name is not repeated: it may be a key by
            mistake.
    """
    try:
        return Client().get_secret(name, allow_partial_name_match=False).secret_values["api_key"]
    except (KeyError, NotImplementedError):
        raise ConfigError(
            "api_key_secret: ZenML has no secret of that name with a value `api_key`; make it with "
            "`zenml secret create NAME --api_key=...`"
        ) from None
