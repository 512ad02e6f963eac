"""What ``tracking.log`` asks for beside the run's own results: code, git, environment, output, command line.

Gathered here and not by comet_ml, which would take it from its own process, and addresses in git with their passwords.
"""

import contextlib
import importlib.metadata
import io
import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

from preference_tuning import fingerprint
from preference_tuning.config import TrackingConfig
from preference_tuning.tracking import guard
from preference_tuning.tracking.folder import Contents, StageFolder

OUTPUT = "output.txt"
SOURCES = ("preference_tuning", "pipelines", "steps", "run.py")


def gather(config: TrackingConfig, stage: StageFolder) -> None:
    """Put what is asked for, output apart, into the stage."""
    contents = Contents()
    if "command_line" in config.log:
        contents.others["command_line"] = guard.scrub(shlex.join(sys.argv))
    if "code" in config.log:
        contents.assets.append(stage.add_file("code.zip", "file", _code(fingerprint.PACKAGE.parent)))
    if "environment" in config.log:
        contents.others.update(_machine())
        contents.assets.append(stage.add_file("environment/packages.txt", "file", _packages()))
    if "git" in config.log:
        found, patch = _git(fingerprint.PACKAGE.parent)
        contents.others.update(found)
        if patch:
            contents.assets.append(stage.add_file("git/changes.patch", "file", guard.scrub(patch)))
    if contents != Contents():
        stage.tell(contents)


@contextlib.contextmanager
def copied(path: Path) -> Iterator[None]:
    """Append to ``path`` what this process and those that it starts print, while it goes where it went before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as kept, contextlib.ExitStack() as streams:
        for stream in (1, 2):
            streams.enter_context(_copied(stream, kept))
        yield


@contextlib.contextmanager
def _copied(stream: int, kept: io.FileIO) -> Iterator[None]:
    for python in (sys.stdout, sys.stderr):
        python.flush()
    before = os.dup(stream)
    reader, writer = os.pipe()
    os.dup2(writer, stream)
    os.close(writer)

    def copy() -> None:
        while read := os.read(reader, 65536):
            os.write(before, read)
            kept.write(read)

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    try:
        yield
    finally:
        for python in (sys.stdout, sys.stderr):
            python.flush()
        os.dup2(before, stream)
        copier.join(1.0)  # a process that was started and still lives holds the other end
        if not copier.is_alive():
            os.close(before)
            os.close(reader)


def _code(root: Path) -> bytes:
    files = [
        path
        for name in SOURCES
        for path in sorted((root / name).rglob("*.py") if (root / name).is_dir() else [root / name])
        if path.is_file()
    ]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return made.getvalue()


def _machine() -> dict[str, str | int]:
    return {
        "environment/host": socket.gethostname(),
        "environment/platform": platform.platform(),
        "environment/python": platform.python_version(),
        "environment/cpus": os.cpu_count() or 1,
    }


def _packages() -> str:
    found = {f"{package.metadata['Name']}=={package.version}" for package in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _git(root: Path) -> tuple[dict[str, str], str]:
    """Return commit, branch and origin of the repository that the code lies in, and what was changed since."""
    asked = {
        "git/commit": ("rev-parse", "HEAD"),
        "git/branch": ("rev-parse", "--abbrev-ref", "HEAD"),
        "git/origin": ("remote", "get-url", "origin"),
    }
    found = {name: guard.portable(answer) for name, words in asked.items() if (answer := _ask_git(root, *words))}
    return found, _ask_git(root, "diff", "HEAD")


def _ask_git(root: Path, *words: str) -> str:
    """Return git's answer; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
