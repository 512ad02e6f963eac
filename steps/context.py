"""What a step knows of the run it is part of.

Read from the run and not passed as parameters, so that it is no part of a cache key.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zenml import get_step_context
from zenml.client import Client

from preference_tuning import interruption
from preference_tuning.config import RunConfig
from preference_tuning.config.section import Secret
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
