"""What a step knows of the run it is part of.

Read from the run and not passed as parameters, so that it is no part of a cache key.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from zenml import get_step_context
from zenml.client import Client
from zenml.utils import dashboard_utils

from preference_tuning import interruption
from preference_tuning.config import RunConfig
from preference_tuning.config.section import Secret
from preference_tuning.errors import ConfigError
from preference_tuning.tracking.recording import Tracking


@dataclass(frozen=True)
class Run:
    """The run of the step that asks."""

    id: str
    name: str
    config: RunConfig
    fresh: bool
    """Whether finished work is to be done anew (`--no-cache`); a run that goes on has begun its own anew already."""
    url: str | None = None
    """Where ZenML's dashboard shows the run, if there is a server."""

    @property
    def output_dir(self) -> Path:
        """Where jobs, models and archives go."""
        return Path(self.config.output_dir)

    @property
    def model(self) -> str:
        """Whose training this is: the name in the registry."""
        return self.config.registry.name

    def names(self) -> dict[str, str]:
        """Return what the run is called where it can be seen; its addresses where there are any."""
        links = self.tracking.links()
        comet = {"comet_experiment": links.get("comet/experiment"), "comet_url": links.get("comet/url")}
        found = {"zenml_run": self.name, "zenml_run_id": self.id, "zenml_url": self.url, **comet}
        return {name: value for name, value in found.items() if value}

    @cached_property
    def tracking(self) -> Tracking:
        """The tracking of the run; the id of the ZenML run is the key of its one experiment in Comet."""
        root = (self.output_dir / "tracking").absolute()
        settings = self.config.portable().model_dump(mode="json")
        return Tracking(root, self.config.tracking, self.id, self.name, settings, self.url)


def current_run() -> Run:
    """Return the run of the current step."""
    interruption.check()
    run = get_step_context().pipeline_run
    return Run(
        id=run.id.hex,
        name=run.name,
        config=RunConfig.model_validate(run.config.parameters),
        fresh=run.config.enable_cache is False and run.original_run is None,
        url=dashboard_utils.get_run_url(run),
    )


class Secretive(Protocol):
    """A section of the config that may name ZenML secrets."""

    def secrets(self) -> list[Secret]:
        """Return those that it names."""


def give_secrets(*sections: Secretive | None) -> None:
    """Put the values of the ZenML secrets that the sections name into the variables where the library looks for them.

    Raises:
        ConfigError: there is no such secret, or it has no such value.
    """
    for section in sections:
        for secret in section.secrets() if section is not None else []:
            os.environ[secret.variable] = value_of(secret)


def value_of(secret: Secret) -> str:
    """Return the value of a ZenML secret.

    Raises:
        ConfigError: there is no such secret, or it has no such value. The name is not repeated: it may be a key by
            mistake.
    """
    try:
        return Client().get_secret(secret.name, allow_partial_name_match=False).secret_values[secret.value]
    except (KeyError, NotImplementedError):
        raise ConfigError(
            f"{secret.field}: ZenML has no secret of that name with a value `{secret.value}`; make it with "
            f"`zenml secret create NAME --{secret.value}=...`"
        ) from None
