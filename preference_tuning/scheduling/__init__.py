"""Schedules outside of ZenML: what cron or systemd needs to start `run.py retrain` again and again.

A ``Plan`` is made first, so that it can be shown before anything is written; installing and removing are the
scheduler's own commands. The lock, and whether there is anything to do, belong to `retrain` itself, so starting it by
hand keeps to them too.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from croniter import croniter

from preference_tuning.config import RunConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError

PASSED_ON = (
    "AWS_ENDPOINT_URL", "COMET_URL_OVERRIDE", "COMET_WORKSPACE", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME",
    "HF_HUB_OFFLINE", "HOME", "HTTPS_PROXY", "HTTP_PROXY", "LD_LIBRARY_PATH", "NO_PROXY", "OMP_NUM_THREADS", "PATH",
    "PREFERENCE_TUNING_DATA_ROOTS", "PYTHONPATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "ZENML_CONFIG_PATH",
    "ZENML_STORE_URL",
)  # fmt: skip
"""Of the environment in which a schedule is made, what its runs get: schedulers start with next to nothing. No keys."""
LOGS_KEPT = 30


@dataclass(frozen=True)
class Retraining:
    """What is to be started."""

    name: str
    """Of the model, which the schedule is named after: one schedule a model and scheduler."""
    project: Path
    """Where run.py lies."""
    config: Path
    options: tuple[str, ...] = ()
    """`--set` overrides and the like, handed on."""
    logs: Path = Path("outputs/logs")
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        """A file of NAME=VALUE lines with keys, which only its owner may read; read if it is there."""
        base = Path(self.environment.get("XDG_CONFIG_HOME") or Path(self.environment["HOME"]) / ".config")
        return base / "preference_tuning" / f"{self.name}.env"

    def command(self, trigger: str) -> list[str]:
        """Return the command line."""
        given = ["retrain", str(self.config), *self.options, "--trigger", trigger]
        return [sys.executable, str(self.project / "run.py"), *given]


@dataclass(frozen=True)
class Plan:
    """What a scheduler needs: files, and the commands that make it read them."""

    title: str
    files: dict[Path, str] = field(default_factory=dict)
    """Whole files, by where they go."""
    commands: tuple[tuple[str, ...], ...] = ()
    """Run in their order, after the files are written."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.title]
        for path, text in self.files.items():
            lines += ["", f"# {path}", text.rstrip()]
        if self.commands:
            lines += ["", *(f"$ {shlex.join(command)}" for command in self.commands)]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


class Scheduler(Protocol):
    """Something that starts a retraining again and again."""

    def plan(self, work: Retraining, expression: str) -> Plan:
        """Return what ``install`` would write, for a cron expression of five fields."""

    def install(self, work: Retraining, expression: str) -> None:
        """Write it, in place of an earlier schedule of the same model."""

    def remove(self, work: Retraining) -> bool:
        """Take it away; return whether there was one."""


def of(name: str) -> Scheduler | None:
    """Return a scheduler of the machine by its name, or None: then it is one of ZenML's."""
    from preference_tuning.scheduling import cron, systemd

    known: dict[str, Scheduler] = {"cron": cron, "systemd": systemd}
    return known.get(name)


def retraining(config: RunConfig, path: Path, options: Sequence[str], project: Path) -> Retraining:
    """Return what a schedule starts for a run config.

    Args:
        config: the loaded config.
        path: of its file.
        options: handed on to `retrain`.
        project: the folder of run.py.
    """
    found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    found.setdefault("HOME", str(Path.home()))
    for value in (*found.values(), str(path), *options):
        if "\n" in value:
            raise ConfigError(f"schedule: {value!r} has a line break, which no scheduler takes")
    logs = (Path(config.output_dir) / "logs" / config.registry.name).absolute()
    return Retraining(config.registry.name, project, path.absolute(), tuple(options), logs, found)


def check_cron(expression: str) -> str:
    """Return a cron expression of five fields with its spaces in order.

    Raises:
        ConfigError: it is none, or never fires.
    """
    expression = " ".join(expression.split())
    if not re.fullmatch(r"\S+( \S+){4}", expression) or not croniter.is_valid(expression):
        raise ConfigError(
            f"schedule: {expression!r} is no cron expression of five fields (minute hour day month weekday), "
            'such as "0 3 * * *" for every night at three'
        )
    return expression


def upcoming(expression: str, count: int = 3) -> list[datetime]:
    """Return when a cron expression fires next, in local time."""
    times = croniter(expression, datetime.now())
    return [times.get_next(datetime) for _ in range(count)]


def install(plan: Plan) -> None:
    """Write the files of a plan and run its commands.

    Raises:
        PreferenceTuningError: a file cannot be written, or a command fails; what was written stays, and doing it again
            is harmless.
    """
    for path, text in plan.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(0o700 if text.startswith("#!") else 0o644)
        except OSError as error:
            raise PreferenceTuningError(f"schedule: cannot write {path}: {error.strerror}") from None
    for command in plan.commands:
        call(command)


def call(command: Sequence[str], given: str | None = None) -> str:
    """Run a command of a scheduler and return what it printed.

    Raises:
        ConfigError: it is not installed.
        PreferenceTuningError: it failed.
    """
    try:
        done = subprocess.run(list(command), input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"schedule: {command[0]} is not installed on this machine; choose another --on") from None
    if done.returncode:
        told = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise PreferenceTuningError(f"schedule: `{shlex.join(command)}` failed: {told}")
    return done.stdout
