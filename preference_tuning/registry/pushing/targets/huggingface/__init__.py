"""A Hugging Face hub as a target: the version under a tag of its own, and as main while it is the champion.

``HF_ENDPOINT`` names another hub than huggingface.co. The side that reads models is ``preference_tuning.hub``.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference_tuning import __version__
from preference_tuning.config import HuggingFacePush, RegistryConfig
from preference_tuning.config.registry import MERGED
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.registry.pushing import Bundle, Pending
from preference_tuning.registry.pushing.patience import Patience
from preference_tuning.registry.pushing.targets.huggingface import access, client, files
from preference_tuning.registry.pushing.targets.huggingface.repository import Repository

OFFLINE = "HF_HUB_OFFLINE is set, so nothing is sent"

Merge = Callable[[Bundle, Path], Path]
"""Makes the whole model of a version in 16 bits, card and tokenizer included, once, and returns its folder."""


class HuggingFaceTarget:
    """The repository of a config entry; with ``contents: both`` a second one for the merged model."""

    def __init__(self, entry: HuggingFacePush, registry: RegistryConfig, merge: Merge | None = None) -> None:
        """Take the config entry, and what makes merged models for it."""
        self.when, self._entry, self._merge = entry.when, entry, merge
        self.key = entry.places(registry.name)[0]

    @property
    def settings(self) -> dict[str, object]:
        """What decides on what arrives, and where."""
        return {"endpoint": _endpoint(), **self._entry.model_dump(include={"repo_id", "private", "contents"})}

    def check(self) -> str:
        """Look whether the token is known, may write where it has to, and finds repositories as the config says.

        A hub that cannot be reached is told and no error: a run at night is worth more than its push, which is tried
        when the model is there and can be done later.

        Raises:
            ConfigError: no token, one that the hub refuses, one that may not write; a repository of another visibility.
        """
        token = self._token()
        if _offline():
            return f"{self.key}: {OFFLINE}; versions wait for `registry push`"
        try:
            with client.session(client.BRIEF):
                user, problems = self._look(token)
        except TransientError as error:
            return f"{self.key}: warning: {error}; the push is tried when the model is there"
        if problems:
            raise ConfigError("\n".join(f"registry.push: {self.key}: {problem}" for problem in problems))
        kind = "private" if self._entry.private else "public"
        return f"{self.key}: the token in {self._entry.token_env} is {user}'s and may write; {kind}"

    def push(self, bundle: Bundle, done: dict[str, str], note: Callable[[dict[str, str]], None]) -> dict[str, str]:
        """Make the hub have the version; see ``Target.push``. ``done`` is not needed: the hub knows."""
        token = self._token()
        if _offline():
            raise Pending(f"{OFFLINE}; `registry push` continues without it")
        facts: dict[str, str] = {}
        try:
            with client.session():
                patience = Patience()
                for repo_id, folder in self._folders(bundle):
                    prefix = "merged " if repo_id != self._entry.repo_id else ""
                    repository = Repository(self._api(token), repo_id, patience)
                    repository.make(self._entry.private)
                    found = repository.hold(
                        files.of_folder(folder, bundle.version),
                        bundle.version.id,
                        bundle.reigns,
                        lambda found, prefix=prefix: note(_prefixed(found, prefix)),  # type: ignore[misc]
                    )
                    facts |= _prefixed(found, prefix)
        except Exception as error:
            raise client.explained(error, token) from None
        return facts

    def _look(self, token: str) -> tuple[str, list[str]]:
        """Return whose token it is, and what stands in the way of a push."""
        api, patience = self._api(token), Patience(attempts=2, seconds=5)
        try:
            whoami = patience.call(api.whoami)
            return str(whoami.get("name", "?")), [
                problem
                for place in self._repositories()
                if (problem := self._problem(Repository(api, place, patience), whoami))
            ]
        except Exception as error:
            if client.status_of(error) in (401, 403):
                refused = f"{_endpoint()} refuses the token in {self._entry.token_env}"
                raise ConfigError(f"registry.push: {self.key}: {refused}") from None
            known = client.explained(error, token)
            raise known if isinstance(known, TransientError) else ConfigError(f"registry.push: {known}") from None

    def _problem(self, repository: Repository, whoami: dict[str, Any]) -> str | None:
        private = repository.private()
        if private is None:
            return access.problem(whoami, repository.id, exists=False)
        try:
            repository.check_visibility(private, self._entry.private)
        except ConfigError as error:
            return str(error)
        told = access.problem(whoami, repository.id, exists=True)
        may = repository.writable()
        if may is None:
            return told
        return None if may else told or f"the hub says that the token may not write to {repository.id}"

    def _folders(self, bundle: Bundle) -> list[tuple[str, Path]]:
        """Return the repositories and the folder that each will hold."""
        if self._entry.contents == "adapter":
            return [(self._entry.repo_id, bundle.folder)]
        if self._merge is None:
            raise PreferenceTuningError(f"{self.key}: nothing here makes merged models")
        merged = self._merge(bundle, bundle.aside / "merged")
        if self._entry.contents == "merged":
            return [(self._entry.repo_id, merged)]
        return list(zip(self._repositories(), (bundle.folder, merged), strict=True))

    def _repositories(self) -> list[str]:
        both = self._entry.contents == "both"
        return [self._entry.repo_id, *([self._entry.repo_id + MERGED] if both else [])]

    def _api(self, token: str) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=_endpoint(), token=token, library_name="preference-tuning", library_version=__version__)

    def _token(self) -> str:
        """Return the token.

        Raises:
            ConfigError: there is none, or something that is none; it is not repeated.
        """
        variable = self._entry.token_env
        token = os.environ.get(variable, "").strip()
        if not token:
            raise ConfigError(
                f"registry.push: {self.key}: {variable} is not set; it takes a token that may write there, or "
                "token_secret names the ZenML secret that has one as its value `token`"
            )
        if not re.fullmatch(r"[\x21-\x7e]{4,}", token):
            raise ConfigError(f"registry.push: {self.key}: what {variable} holds is no token")
        return token


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _prefixed(facts: dict[str, str], prefix: str) -> dict[str, str]:
    return {f"{prefix}{name}": value for name, value in facts.items()}
