"""A script for the project's folder: ZenML's stages through the life of a registry; prints what it saw as JSON.

Versions are published by hand from the finished one; ZenML, its database, its runs and the registry are real.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import ModelStages
from zenml.utils.pagination_utils import depaginate

from pipelines import models as verbs
from preference_tuning.config import RegistryConfig
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.result import Registered
from steps import models

CONFIG = RegistryConfig(folder="outputs/registry", name="by.hand")
REGISTRY, SEEN = FolderRegistry(CONFIG), []


def published(weights: str) -> str:
    """Publish the finished version with other weights."""
    first = FolderRegistry(RegistryConfig(folder="outputs/registry"))
    found = first.version(first.ids()[0])
    copy = Path("by-hand") / weights
    shutil.copytree(first.path(found.id) / "model", copy)
    card = (copy / "README.md").read_text(encoding="utf-8")
    (copy / "README.md").unlink()
    shutil.rmtree(copy / "charts")
    save_file({"weight": np.frombuffer(weights.encode(), np.uint8)}, copy / "adapter_model.safetensors")
    outside = {"id", "name", "created", "model_files", "evidence_files", "seal"}
    facts = {name: getattr(found, name) for name in type(found).model_fields if name not in outside}
    evidence = {"evaluation": first.path(found.id) / "evidence" / "evaluation"}
    return REGISTRY.publish(copy, evidence, {"README.md": card}, facts).id


@step(enable_cache=False)
def recorded(version: str, decision: str) -> None:
    """Record a version as the register step does."""
    found, champion = REGISTRY.version(version), REGISTRY.champion()
    registered = Registered(
        version=found,
        folder=REGISTRY.path(version),
        promoted=champion is not None and champion.version == version,
        verdict=found.verdict.model_copy(update={"decision": decision}),
        champion=champion.version if champion else None,
        taken_back=None,
        evaluation=REGISTRY.path(version) / "evidence" / "evaluation",
    )
    models.record(registered, CONFIG)


@pipeline(enable_cache=False)
def recording(version: str, decision: str) -> None:
    """One step."""
    recorded(version=version, decision=decision)


def see(what: str) -> None:
    """Keep the stage and the tags of every version."""
    found = depaginate(Client().list_model_versions, model_name_or_id="by.hand", hydrate=True)
    stages = {version.name: version.stage for version in found}
    tags = {version.name: sorted(tag.name for tag in version.tags) for version in found}
    decisions = {version.name: version.run_metadata.get("decision") for version in found}
    SEEN.append({"after": what, "stages": stages, "tags": tags, "decisions": decisions})


def main() -> None:
    """Live through it."""
    one = published("one")
    recording(one, "promote")
    see("recorded, not promoted")
    REGISTRY.promote(one)
    recording(one, "promote")
    see("promoted by its run")
    two = published("two")
    recording(two, "inconclusive")
    see("a challenger")
    recording(two, "promote")
    see("another verdict")
    REGISTRY.promote(two)
    verbs.follow(REGISTRY)
    see("promoted by a verb")
    try:
        Client().get_model_version("by.hand", one).set_stage(ModelStages.PRODUCTION)
        SEEN.append({"after": "no force", "raised": False})
    except RuntimeError:
        SEEN.append({"after": "no force", "raised": True})
    REGISTRY.promote(one)  # killed before ZenML hears of it
    three = published("three")
    recording(three, "hold")
    see("repaired by the next run")
    own = Client().create_model_version("by.hand", "own")
    own.set_stage(ModelStages.STAGING, force=True)
    verbs.follow(REGISTRY)
    see("a version of the user's own")
    shutil.rmtree(REGISTRY.path(three))
    verbs.follow(REGISTRY)
    see("removed")
    Client.get_model = broken  # type: ignore[method-assign]
    verbs.follow(REGISTRY)
    print("\n" + json.dumps({"versions": [one, two, three], "seen": SEEN}))


def broken(*_: Any, **__: Any) -> Any:
    """Stand in for a server that is gone."""
    raise RuntimeError("no such server")


if __name__ == "__main__":
    main()
