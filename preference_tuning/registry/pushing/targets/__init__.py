"""The services that versions are pushed to, a module for each; each module is the only one that knows its service."""

from dataclasses import dataclass
from pathlib import Path

from preference_tuning.config import CometPush, HuggingFacePush, PushTarget, RegistryConfig, RunConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry import pushing
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import Bundle, Receipt, Target

FOLDER = "pushes"
"""Of ``output_dir``: what has to be made for pushes."""


def of(config: RunConfig) -> list[Target]:
    """Return the targets of a config, in its order; their libraries are imported when they are used."""
    return [_target(entry, config.registry, _Merging(config)) for entry in config.registry.push]


@dataclass(frozen=True)
class _Merging:
    """Makes merged models, on the base model where the config says it is."""

    config: RunConfig

    def __call__(self, bundle: Bundle, folder: Path) -> Path:
        from preference_tuning.registry.export import merged

        output_dir = Path(self.config.output_dir).expanduser()
        return merged(bundle.folder.parent, self.config.base_model, folder, output_dir)


def _target(entry: PushTarget, config: RegistryConfig, merge: _Merging) -> Target:
    if isinstance(entry, HuggingFacePush):
        from preference_tuning.registry.pushing.targets.huggingface import HuggingFaceTarget

        return HuggingFaceTarget(entry, config, merge)
    if isinstance(entry, CometPush):
        from preference_tuning.registry.pushing.targets.comet import CometTarget

        return CometTarget(entry, config)
    from preference_tuning.registry.pushing.targets.mlflow import MLflowTarget

    return MLflowTarget(entry, config)


def push(config: RunConfig, name: str, output_dir: Path, again: bool = False) -> tuple[str, list[Receipt]]:
    """Push a version to the targets of a config that take it; return its id and the receipts.

    Args:
        config: with the registry and the targets.
        name: ``champion``, ``previous``, an id or the beginning of one.
        output_dir: where things are made.
        again: also to targets whose receipt says that they have it.

    Raises:
        PreferenceTuningError: there is no such version, or it cannot be pushed at all.
    """
    registry = FolderRegistry(config.registry)
    version = registry.find(name)
    if version is None:
        raise PreferenceTuningError(f"registry: no version {name!r} of {registry.name!r} in {registry.place}")
    return version, pushing.push(registry, version, of(config), output_dir.expanduser() / FOLDER, again)
