"""The services that versions are pushed to, a module for each; each module is the only one that knows its service."""

from pathlib import Path

from preference_tuning.config import CometPush, HuggingFacePush, PushTarget, RegistryConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry import pushing
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import Receipt, Target

FOLDER = "pushes"
"""Of ``output_dir``: what has to be made for pushes."""


def of(config: RegistryConfig) -> list[Target]:
    """Return the targets of a config, in its order; their libraries are imported when they are used."""
    return [_target(entry, config) for entry in config.push]


def _target(entry: PushTarget, config: RegistryConfig) -> Target:
    if isinstance(entry, HuggingFacePush):
        from preference_tuning.registry.pushing.targets.huggingface import HuggingFaceTarget

        return HuggingFaceTarget(entry, config)
    if isinstance(entry, CometPush):
        from preference_tuning.registry.pushing.targets.comet import CometTarget

        return CometTarget(entry, config)
    from preference_tuning.registry.pushing.targets.mlflow import MLflowTarget

    return MLflowTarget(entry, config)


def push(config: RegistryConfig, name: str, output_dir: Path, again: bool = False) -> tuple[str, list[Receipt]]:
    """Push a version to the targets of a config that take it; return its id and the receipts.

    Args:
        config: with the registry and the targets.
        name: ``champion``, ``previous``, an id or the beginning of one.
        output_dir: where things are made.
        again: also to targets whose receipt says that they have it.

    Raises:
        PreferenceTuningError: there is no such version, or it cannot be pushed at all.
    """
    registry = FolderRegistry(config)
    version = registry.find(name)
    if version is None:
        raise PreferenceTuningError(f"registry: no version {name!r} of {registry.name!r} in {registry.place}")
    return version, pushing.push(registry, version, of(config), output_dir.expanduser() / FOLDER, again)
