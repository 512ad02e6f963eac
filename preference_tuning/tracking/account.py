"""Whether tracking can do what the config asks for: asked once, before anything runs."""

import os
from typing import Literal
from urllib.parse import urlsplit

import httpx

from preference_tuning.config import TrackingConfig
from preference_tuning.errors import ConfigError, TransientError

Mode = Literal["online", "offline", "off"]

URL = "https://www.comet.com"
CONNECT_SECONDS, ANSWER_SECONDS = 1.0, 1.5
"""How long Comet may take; a run that trains for hours must not wait for it."""


def mode_of(config: TrackingConfig) -> Mode:
    """Return what ``auto`` comes to.

    Raises:
        ConfigError: online is asked for without a key.
    """
    has_key = bool(os.environ.get("COMET_API_KEY"))
    if config.mode == "online" and not has_key:
        raise ConfigError("tracking.mode: online needs COMET_API_KEY in the environment; use auto or offline")
    if config.mode == "auto":
        return "online" if has_key else "offline"
    return config.mode


def check(config: TrackingConfig) -> str:
    """Return what tracking will do; where it is online, the key and the workspace are tried.

    Raises:
        ConfigError: Comet does not know the key, or the workspace.
    """
    mode = mode_of(config)
    if mode == "off":
        return "off; metrics.jsonl only"
    if mode == "offline":
        return f"Comet offline, archives for project {config.project}"
    try:
        return f"Comet online, project {config.project} in {_workspace(config)}"
    except httpx.HTTPError as error:
        return (
            f"Comet online, project {config.project}\n{'':10}warning: Comet cannot be reached now "
            f"({type(error).__name__}); the run goes on without it, and `run.py track upload` sends what is missing"
        )


def user_of_key() -> str:
    """Return whose key is in the environment.

    Raises:
        ConfigError: there is none, or Comet does not accept it.
        TransientError: Comet cannot be reached.
    """
    if not os.environ.get("COMET_API_KEY"):
        raise ConfigError("Comet needs COMET_API_KEY in the environment")
    try:
        return str(_ask("account-details").get("userName") or "a user without a name")
    except httpx.HTTPError as error:
        raise TransientError(f"Comet cannot be reached now ({type(error).__name__})") from None


def _workspace(config: TrackingConfig) -> str:
    account = _ask("account-details")
    if config.workspace is None:
        return str(account.get("defaultWorkspaceName") or "the default workspace")
    names = _ask("workspaces").get("workspaceNames")
    if isinstance(names, list) and config.workspace not in names:
        raise ConfigError(
            f"tracking.workspace: {config.workspace!r} is none of the workspaces of this key: {', '.join(names)}"
        )
    return config.workspace


def _ask(what: str) -> dict[str, object]:
    """Return the answer of Comet's REST API.

    Raises:
        ConfigError: the key is refused.
        httpx.HTTPError: there is no answer that says anything.
    """
    parts = urlsplit(os.environ.get("COMET_URL_OVERRIDE") or URL)
    answer = httpx.get(
        f"{parts.scheme}://{parts.netloc}/api/rest/v2/{what}",
        headers={"Authorization": os.environ["COMET_API_KEY"]},
        timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
    )
    if answer.status_code in (400, 401, 403):
        raise ConfigError(
            "COMET_API_KEY: Comet does not accept this key. Take it from your settings in Comet, or train without it: "
            "tracking.mode: offline"
        )
    try:
        found: dict[str, object] = answer.raise_for_status().json()
    except ValueError:
        raise httpx.DecodingError("no JSON") from None
    return found
