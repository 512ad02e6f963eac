"""Who takes a notification: a webhook, or a program. Whatever goes wrong is one reason without the address in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from preference_tuning.config import CommandNotify, WebhookNotify
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.notifying.message import Message

SECONDS = 10.0
"""After which nobody waits for a receiver any longer."""
PREFIX = "PREFERENCE_TUNING_"
LONGEST = 10_000
"""Characters of a variable; Linux takes 128 KiB."""
VARIABLES = ("outcome", "model", "run", "trigger", "version", "decision", "reason", "champion", "exit_code", "error")


def check(receiver: WebhookNotify | CommandNotify) -> str:
    """Return who would be told, without trying.

    Raises:
        ConfigError: there is nobody.
    """
    if isinstance(receiver, CommandNotify):
        return f"command {_program(receiver)}"
    _address(receiver)
    return f"webhook in {receiver.url_env} ({receiver.format})"


def post(message: Message, receiver: WebhookNotify) -> None:
    """Post a message to a webhook.

    Raises:
        PreferenceTuningError: it did not take it.
    """
    address = _address(receiver)
    try:
        answer = httpx.post(address, json=body(message, receiver.format), timeout=SECONDS, follow_redirects=False)
    except Exception as error:  # their texts may have the address in them
        raise PreferenceTuningError(f"{type(error).__name__}") from None
    if not answer.is_success:
        raise PreferenceTuningError(f"it answered {answer.status_code}")


def body(message: Message, form: str) -> dict[str, Any]:
    """Return what is posted. In Slack's and Discord's words of others are neither markup nor mentions."""
    if form == "slack":
        plain = message.text().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {"text": plain}
    if form == "discord":
        return {"content": message.text()[:2000], "allowed_mentions": {"parse": []}}
    return {"title": message.title, "text": message.text(), **message.model_dump(mode="json")}


def start(message: Message, receiver: CommandNotify) -> None:
    """Run a program on a message; after ``SECONDS`` it is ended with all that it started.

    Raises:
        PreferenceTuningError: it cannot be started, takes too long, or says that it failed.
    """
    facts = {name: getattr(message, name) for name in VARIABLES}
    facts["text"] = message.text()
    told = {f"{PREFIX}{name.upper()}": _fit(value) for name, value in facts.items() if value is not None}
    try:
        process = subprocess.Popen(
            [_program(receiver), *receiver.run[1:]],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_fileno() else subprocess.DEVNULL,
            env={**os.environ, **told},
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
    except OSError as error:
        raise PreferenceTuningError(f"cannot be started: {error.strerror}") from None
    try:
        process.communicate(json.dumps(body(message, "json"), ensure_ascii=False), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise PreferenceTuningError(f"took longer than {SECONDS:.0f} s") from None
    if process.returncode:
        raise PreferenceTuningError(f"ended with {process.returncode}")


def _fit(value: object) -> str:
    """Return a value as an environment variable can hold it."""
    return str(value).replace("\0", " ")[:LONGEST]


def _program(receiver: CommandNotify) -> str:
    program = str(Path(receiver.run[0]).expanduser())
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"{receiver.run[0]!r} is no program here")
    return found


def _address(receiver: WebhookNotify) -> str:
    address = os.environ.get(receiver.url_env, "").strip()
    if not address:
        raise ConfigError(f"{receiver.url_env} is not set")
    if not address.startswith(("https://", "http://")):
        raise ConfigError(f"{receiver.url_env} holds no address that begins with https://")
    return address


def _has_fileno() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):  # a test's, or a notebook's
        return False
