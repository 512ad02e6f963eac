"""What made a version, and where more of it is to be seen."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import preference_tuning
from preference_tuning import fingerprint
from preference_tuning.config import RegistryConfig
from preference_tuning.models.description import describe
from preference_tuning.models.source import ModelSource

PACKAGES = ("torch", "transformers", "trl", "peft")
GIT_SECONDS = 10
NAMES = {
    "zenml_run": "ZenML run",
    "zenml_run_id": "id of the ZenML run",
    "zenml_url": "the run in ZenML's dashboard",
    "comet_experiment": "Comet experiment",
    "comet_url": "the experiment in Comet",
}
"""What of a run is a link, and what it is called."""
HERE = ("localhost", "127.0.0.1", "[::1]")
"""Hosts that are another one for every reader."""


def software() -> dict[str, str | bool | None]:
    """Return the versions of the code that runs: of this project with its git commit, Python, and what trains."""
    return {
        "preference_tuning": preference_tuning.__version__,
        **_commit(fingerprint.PACKAGE.parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def licence(config: RegistryConfig, base_model: ModelSource) -> str | None:
    """Return the licence of a version: the config's, else that of its base model, where that says one."""
    return config.license or describe(base_model).licence


def links(run: Mapping[str, str | None]) -> dict[str, str]:
    """Return where more of a run is to be seen, for readers on any machine."""
    found = {NAMES[name]: place for name, place in run.items() if name in NAMES and place}
    return {name: place for name, place in found.items() if not place.startswith(tuple(f"http://{h}" for h in HERE))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> dict[str, str | bool | None]:
    """Return the commit of the project's files and whether they were changed since; None where there is no git.

    Nothing else of the repository is read: the address of a remote may hold a password.
    """
    # Installed into some other repository, the files are none of its own.
    own = f"{fingerprint.PACKAGE.name}/__init__.py"
    if _git(root, "ls-files", "--error-unmatch", own) is None or (commit := _git(root, "rev-parse", "HEAD")) is None:
        return {"commit": None, "modified": None}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def _git(root: Path, *command: str) -> str | None:
    """Return what git says, or None: there is no git, no repository, or it is not to be trusted."""
    asked = ["git", "--no-optional-locks", "-C", str(root), *command]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
