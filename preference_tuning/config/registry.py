"""The registry section: where results become versions, and where they are pushed."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, StringConstraints, Tag

from preference_tuning.config.section import Name, Section, Text

RepoId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]


class PushConfig(Section):
    """What all targets of a push have in common."""

    when: Literal["promoted", "registered"] = "promoted"
    """registered: every version is pushed; what ``promoted`` means to the target still follows the champion."""


class HuggingFacePush(PushConfig):
    """A repository of a Hugging Face hub; ``HF_ENDPOINT`` names another one than huggingface.co."""

    to: Literal["huggingface"]
    repo_id: RepoId
    private: bool = True
    """Of a repository that the push makes."""
    contents: Literal["adapter", "merged", "both"] = "adapter"
    """merged: the whole model in 16 bits; both: the adapter in ``repo_id``, the model in ``repo_id`` + ``-merged``."""
    token_env: Text = "HF_TOKEN"  # noqa: S105 (a name)
    """Environment variable with a token that may write."""
    token_secret: Text | None = None
    """A ZenML secret whose value ``token`` is put there."""


class CometPush(PushConfig):
    """Comet's model registry; needs COMET_API_KEY."""

    to: Literal["comet"]
    name: Name | None = None
    """None: the registry's own."""


class MLflowPush(PushConfig):
    """MLflow's model registry, as pointers to the versions here; needs the mlflow extra."""

    to: Literal["mlflow"]
    tracking_uri: Text
    name: Name | None = None
    """None: the registry's own."""


def _to(value: Any) -> Any:
    return value.get("to") if isinstance(value, dict) else getattr(value, "to", None)


# By a function: pydantic takes no field as the discriminator that has a validator before it, as all sections have.
PushTarget = Annotated[
    Annotated[HuggingFacePush, Tag("huggingface")]
    | Annotated[CometPush, Tag("comet")]
    | Annotated[MLflowPush, Tag("mlflow")],
    Discriminator(
        _to,
        custom_error_type="unknown_target",
        custom_error_message="`to` must say where to: huggingface, comet or mlflow",
    ),
]


class RegistryConfig(Section):
    """Where results become versions."""

    folder: Text = "outputs/registry"
    name: Name = "preference-tuned"
    push: tuple[PushTarget, ...] = ()
    """Where versions are pushed, each with a receipt."""
