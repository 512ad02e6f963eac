"""Removing old versions, with their decisions and receipts.

A version goes whole or not at all, and first: what is left of it if the process dies then belongs to no version, and
goes with the next collection.
"""

from dataclasses import dataclass

from preference_tuning.errors import ConfigError
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.versions import DECISION, MANIFEST

DECISIONS, RECEIPTS = "decisions", "receipts"


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be."""

    kept: list[str]
    removed: list[str]
    """Versions, the oldest first."""
    bytes: int
    """Of everything that was removed."""
    dry_run: bool

    def __str__(self) -> str:
        would = "would free" if self.dry_run else "freed"
        lines = [f"{'would remove' if self.dry_run else 'removed'}  {version}" for version in self.removed]
        return "\n".join([*lines, f"{len(self.kept)} versions kept, {would} {self.bytes:,} bytes"])


def collect(registry: FolderRegistry, keep: int, dry_run: bool = False) -> Collected:
    """Remove all versions but the champion, the previous champion and the last ones.

    Args:
        registry: that they are in.
        keep: how many of the last ones stay, by their creation.
        dry_run: only say what would be removed.

    Raises:
        ConfigError: a negative number.
        PreferenceTuningError: a manifest cannot be read, so that its age is not known; nothing is removed.
    """
    if keep < 0:
        raise ConfigError(f"registry gc: --keep {keep}: must be 0 or more")
    if dry_run:
        return _collect(registry, keep, dry_run)
    with registry.exclusive():
        return _collect(registry, keep, dry_run)


def _collect(registry: FolderRegistry, keep: int, dry_run: bool) -> Collected:
    by_age = sorted(registry.ids(), key=lambda version: (registry.version(version).created, version))
    pointers = {pointer.version for pointer in (registry.champion(), registry.previous()) if pointer}
    removed = [version for version in by_age[: max(0, len(by_age) - keep)] if version not in pointers]
    kept = [version for version in by_age if version not in removed]
    places = [(f"versions/{version}", MANIFEST) for version in removed]
    places += [(f"{DECISIONS}/{name}", DECISION) for name in registry.names(DECISIONS) if not _of_any(name, kept)]
    places += [(f"{RECEIPTS}/{name}", "") for name in registry.names(RECEIPTS) if name not in kept]
    freed = 0
    for place, manifest in places:
        name = f"{registry.name}/{place}"
        freed += sum(registry.storage.sizes(name).values())
        if not dry_run:
            registry.storage.remove(name, manifest)
    return Collected(kept, removed, freed, dry_run)


def _of_any(decision: str, versions: list[str]) -> bool:
    return any(decision.startswith(f"{version}-") for version in versions)
