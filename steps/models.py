"""The registry as ZenML's Model Control Plane shows it: a model of its name, and a model version for each version.

It is an index: the pointers of the registry decide, and stages follow them. ``record`` writes what is known of a
version, ``follow`` repairs the stages, and both may be repeated. Ours are the versions with the tag ``OURS``; those
that ZenML's own `model:` section of a run config makes are left alone, unless one holds a stage that is needed.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from zenml import get_step_context
from zenml.client import Client
from zenml.enums import MetadataResourceTypes, ModelStages
from zenml.exceptions import EntityExistsError
from zenml.model.utils import link_artifact_version_to_model_version
from zenml.models import (
    ModelResponse,
    ModelVersionPipelineRunRequest,
    ModelVersionResponse,
    RunMetadataResource,
)
from zenml.utils.pagination_utils import depaginate

from preference_tuning.config import RegistryConfig
from preference_tuning.evaluation import job
from preference_tuning.evaluation.gate import Decision
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.labels import description, labels, roles
from preference_tuning.registry.result import Registered

OURS, REMOVED = "preference-tuning", "removed"
PASSING = {*get_args(Decision), REMOVED}
"""Tags that come and go."""
STAGES = {"champion": ModelStages.PRODUCTION, "challenger": ModelStages.STAGING}


def record(registered: Registered, config: RegistryConfig) -> None:
    """Make ZenML's version of a registered one say what is true now, and link the step's inputs and its run to it.

    Written by hand, because what a cached step logged to a model is not logged again.
    """
    registry = FolderRegistry(config)
    version = _version(_model(registry.name), registered, description(registered.folder / "model"))
    measured = job.load_summary(registered.evaluation).metadata()
    facts = {**labels(registered.version), **measured, **registered.metadata()}
    facts["verdict"] = registered.verdict.decision
    _write(version, facts)
    step = get_step_context()
    for artifacts in step.step_run.inputs.values():
        for artifact in artifacts:
            link_artifact_version_to_model_version(artifact, version)
    link = ModelVersionPipelineRunRequest(model_version=version.id, pipeline_run=step.pipeline_run.id)
    Client().zen_store.create_model_version_pipeline_run_link(link)
    follow(registry)


def follow(registry: FolderRegistry) -> None:
    """Bring ZenML's stages to what the registry says: production is the champion, staging the challenger.

    Versions that left these roles are archived, and so are those that the registry has no more.
    """
    try:
        model = Client().get_model(registry.name)
    except KeyError:
        return
    found = depaginate(Client().list_model_versions, model=model.id, hydrate=True)
    ours = {str(version.name): version for version in found if OURS in _tags(version)}
    kept, playing = set(registry.ids()), {version: role for role, version in roles(registry).items()}
    for name, version in ours.items():
        _tag(version, _tags(version) - {REMOVED} if name in kept else _tags(version) | {REMOVED})
        wanted = STAGES.get(playing.get(name, ""))
        if wanted is None and (name not in kept or version.stage in STAGES.values()):
            wanted = ModelStages.ARCHIVED
        if wanted is not None and version.stage != wanted:
            # Without force ZenML refuses a stage that another version has; with it that one is archived.
            version.set_stage(wanted, force=True)


def _model(name: str) -> ModelResponse:
    client = Client()
    with suppress(KeyError):
        return client.get_model(name)
    try:
        return client.create_model(name, description=f"The versions of {name} in its registry", tags=[OURS])
    except EntityExistsError:  # another run was first
        return client.get_model(name)


def _version(model: ModelResponse, registered: Registered, text: str) -> ModelVersionResponse:
    """Return ZenML's version of a registered one, made if it is missing, with description and tags as they are now."""
    client, ours = Client(), registered.version
    base = Path(str(ours.base_model["source"])).name[:255]
    tags = {OURS, ours.finetuning_type, base, registered.verdict.decision}
    try:
        version = client.get_model_version(model.id, ours.id)
    except KeyError:
        with suppress(EntityExistsError):  # another run was first
            client.create_model_version(model.id, ours.id, text, list(tags))
        version = client.get_model_version(model.id, ours.id)
    if version.description != text:
        client.update_model_version(model.id, version.id, description=text)
    _tag(version, (_tags(version) - PASSING) | tags)
    return version


def _tags(version: ModelVersionResponse) -> set[str]:
    return {tag.name for tag in version.tags}


def _tag(version: ModelVersionResponse, wanted: set[str]) -> None:
    there = _tags(version)
    if there != wanted:
        Client().update_model_version(
            version.model.id, version.id, add_tags=list(wanted - there), remove_tags=list(there - wanted)
        )


def _write(version: ModelVersionResponse, facts: dict[str, Any]) -> None:
    """Write the metadata that are not there yet."""
    new = {name: value for name, value in facts.items() if version.run_metadata.get(name) != value}
    if new:
        resource = RunMetadataResource(id=version.id, type=MetadataResourceTypes.MODEL_VERSION)
        Client().create_run_metadata(metadata=new, resources=[resource])
