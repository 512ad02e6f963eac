"""The Hugging Face Hub, as a place to read models and datasets from; the only module that knows huggingface_hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preference_tuning import failures
from preference_tuning.errors import ConfigError, TransientError

REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")

TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors", "README.md"]


def resolve_commit(repo_id: str, revision: str | None, repo_type: Literal["model", "dataset"]) -> str:
    """Return the commit that ``revision`` (None: main) of a hub repository names now.

    A full commit hash is returned as it is, so a pinned run needs no network once its files are cached.

    Raises:
        ConfigError: the repository or revision does not exist, access is not granted, or the hub may not be asked.
        TransientError: the hub cannot be reached now.
    """
    if revision and COMMIT.match(revision):
        return revision
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{repo_type} {repo_id!r}"
    try:
        sha: str | None = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=10).sha
    except GatedRepoError:
        raise ConfigError(f"{where} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ConfigError(f"{where} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"no {where} on the hub (or it is private and HF_TOKEN is not set), and no such path"
        ) from None
    except (httpx.TransportError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # A hub that is down is nobody's mistake; one that must not be asked (HF_HUB_OFFLINE) is.
        refusal = TransientError if failures.kind_of(error) == "transient" else ConfigError
        raise refusal(
            f"cannot reach the hub to find the {where}: {reason}. "
            "Use a local path, or pin `revision` to a full commit hash that is in the local cache"
        ) from None
    if not sha:
        raise ConfigError(f"the hub gives no commit for the {where}")
    return sha


def download_model(repo_id: str, commit: str) -> Path:
    """Return the local folder of a model repository at ``commit``, downloading what is missing (no pickles).

    Raises:
        ConfigError: it cannot be had.
        TransientError: not now: the network or the hub failed.
    """
    return _download(repo_id, commit, MODEL_FILES)


def download_tokenizer(repo_id: str, commit: str) -> Path:
    """Return the local folder of a model repository at ``commit`` with everything but the weights."""
    return _download(repo_id, commit, TOKENIZER_FILES)


def model_card(repo_id: str, commit: str) -> Path | None:
    """Return the local file of a model's card at ``commit``, or None: it has none, or cannot be had now."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repo_id, "README.md", revision=commit, etag_timeout=10))
    except (httpx.TransportError, HfHubHTTPError, OSError, ValueError):  # what it says is good to know, no more
        return None


def _download(repo_id: str, commit: str, files: list[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=commit, allow_patterns=files))
    except (httpx.TransportError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        refusal = TransientError if failures.kind_of(error) == "transient" else ConfigError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refusal(f"cannot download model {repo_id!r} at {commit}: {reason}") from None


@dataclass(frozen=True)
class Access:
    """What the hub says of a model repository to whoever asks with the token of this environment."""

    licence: str | None = None
    gated: str | None = None
    """``auto`` or ``manual`` where its owner decides who gets it; None where everybody does."""
    offline: bool = False
    """Whether the hub may not be asked (``HF_HUB_OFFLINE``)."""
    cached: bool = False
    """Whether the files of the commit are here already."""


def access(repo_id: str, commit: str) -> Access:
    """Return the licence of a model, and whether its files may be had.

    Raises:
        ConfigError: they may not: the message has the address where to ask.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cached = is_cached(repo_id, commit)
    if constants.HF_HUB_OFFLINE:
        return Access(offline=True, cached=cached)
    api = HfApi()
    page = f"{api.endpoint}/{repo_id}"
    try:
        info = api.model_info(repo_id, revision=commit, timeout=10)
        if info.gated and not cached:
            api.auth_check(repo_id)
    except GatedRepoError:
        known = "the token in HF_TOKEN has no access" if api.token or _has_token() else "HF_TOKEN is not set"
        raise ConfigError(
            f"base_model.source: {repo_id} is gated, and {known}: ask for access at {page}, with the account whose "
            "token is in HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"base_model.source: there is no model {repo_id} that this account may see; look at {page}, and set "
            "HF_TOKEN if it is private"
        ) from None
    except (httpx.TransportError, HfHubHTTPError, OSError):
        return Access(offline=True, cached=cached)
    licence = info.card_data.get("license") if info.card_data else None
    return Access(licence=licence, gated=info.gated or None, cached=cached)


def is_cached(repo_id: str, commit: str) -> bool:
    """Return whether the weights of a commit are in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=MODEL_FILES, local_files_only=True))
    except OSError:
        return False
    return any(folder.glob("*.safetensors"))


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
