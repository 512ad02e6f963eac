"""The registry section: where results become versions, and where they are pushed."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from preference_tuning.config.place import Place
from preference_tuning.config.section import UNSHOWN, Name, Secret, Section, Text, VariableName, to_of

REPO_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?=[A-Za-z0-9_])){0,95}"
UNKNOWN_TARGET: Final = "unknown_target"
"""The type of the error of a target that there is none of."""
MERGED = "-merged"
"""Behind the name of the repository that has the whole model where another has the adapter."""


def _repo_id(value: str) -> str:
    if not re.fullmatch(f"{REPO_NAME}/{REPO_NAME}", value) or value.endswith(".git"):
        raise ValueError(
            "must be OWNER/NAME; both begin with a letter or digit, hold only letters, digits, '_' and single '.' and "
            "'-' between them, 96 at most"
        )
    return value


RepoId = Annotated[str, AfterValidator(_repo_id)]


Licence = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", to_lower=True)]


class PushConfig(Section):
    """What all targets of a push have in common. A key or token is never part of a config."""

    when: Literal["promoted", "registered"] = "promoted"
    """registered: every version is pushed; what ``promoted`` means to the target still follows the champion."""

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"token", "api_key", "password"} & set(values):
            raise PydanticCustomError(
                UNSHOWN, "a token does not belong into a file; it comes from the environment or a ZenML secret"
            )
        return values


class HuggingFacePush(PushConfig):
    """A repository of a Hugging Face hub; ``HF_ENDPOINT`` names another one than huggingface.co."""

    to: Literal["huggingface"]
    repo_id: RepoId
    private: bool = True
    """Of a repository that the push makes; one that is there must be so already."""
    contents: Literal["adapter", "merged", "both"] = "adapter"
    """adapter: the version as it is; merged: the whole model in 16 bits; both: the adapter in ``repo_id``, the model
    in ``repo_id`` + ``-merged``."""
    token_env: VariableName = "HF_TOKEN"  # noqa: S105 (a name)
    """Environment variable with a token that may write."""
    token_secret: Text | None = None
    """A ZenML secret whose value ``token`` is put there."""

    def places(self, name: str) -> list[str]:
        """Return the repositories; no other target may write there."""
        repos = [self.repo_id, *([self.repo_id + MERGED] if self.contents == "both" else [])]
        return [f"{self.to}:{repo}" for repo in repos]


class CometPush(PushConfig):
    """Comet's model registry; needs COMET_API_KEY."""

    to: Literal["comet"]
    name: Name | None = None
    """None: the registry's own."""

    def places(self, name: str) -> list[str]:
        """Return the registered model of the registry ``name``."""
        return [f"{self.to}:{self.name or name}"]


class MLflowPush(PushConfig):
    """MLflow's model registry, as pointers to the versions here; needs the mlflow extra."""

    to: Literal["mlflow"]
    tracking_uri: Place
    name: Name | None = None
    """None: the registry's own."""

    def places(self, name: str) -> list[str]:
        """Return the registered model of the registry ``name``."""
        return [f"{self.to}:{self.name or name} at {self.tracking_uri}"]


PushTarget = Annotated[
    Annotated[HuggingFacePush, Tag("huggingface")]
    | Annotated[CometPush, Tag("comet")]
    | Annotated[MLflowPush, Tag("mlflow")],
    Discriminator(
        to_of,
        custom_error_type=UNKNOWN_TARGET,
        custom_error_message="`to` must say where to: huggingface, comet or mlflow",
    ),
]


class RegistryConfig(Section):
    """Where results become versions."""

    folder: Place = "outputs/registry"
    name: Name = "preference-tuned"
    license: Licence | None = None
    """Of the versions, as the hub calls it, such as ``apache-2.0``. None: the base model's, where that is known."""
    push: tuple[PushTarget, ...] = ()
    """Where versions are pushed, each with a receipt."""

    def secrets(self) -> list[Secret]:
        """Return the ZenML secrets that pushes need."""
        return [
            Secret(f"registry.push.{i}.token_secret", entry.token_secret, "token", entry.token_env)
            for i, entry in enumerate(self.push)
            if isinstance(entry, HuggingFacePush) and entry.token_secret
        ]

    def contradictions(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Yield ``(path of the field, message)`` for targets that are fine alone and wrong together."""
        taken: dict[str, int] = {}
        given: dict[str, tuple[int, str | None]] = {}
        for i, entry in enumerate(self.push):
            for place in entry.places(self.name):
                if (first := taken.setdefault(place.lower(), i)) != i:
                    yield ("push", i, "to"), f"goes where push.{first} goes already; keep one"
            if not isinstance(entry, HuggingFacePush):
                continue
            if entry.contents == "both" and len(entry.repo_id.split("/")[1]) + len(MERGED) > 96:
                yield ("push", i, "repo_id"), f"is too long for {MERGED!r} behind it (contents both); 96 at most"
            first, secret = given.setdefault(entry.token_env, (i, entry.token_secret))
            if secret != entry.token_secret:
                yield (
                    ("push", i, "token_env"),
                    f"{entry.token_env} is also that of push.{first}, with another token_secret; name another variable",
                )
