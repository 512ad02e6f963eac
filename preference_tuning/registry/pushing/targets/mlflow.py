"""MLflow's model registry, as pointers to the versions here: no file is copied; the only module that knows mlflow.

A model version there is known by its tag ``preference_tuning.version``. Aliases say who is champion, previous and
challenger, and follow the registry with every push.
"""

import importlib.util
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from preference_tuning import failures
from preference_tuning.config import RegistryConfig
from preference_tuning.config.registry import MLflowPush
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.registry.labels import description, labels, roles
from preference_tuning.registry.pushing import Bundle, Pending

TAG = "preference_tuning."
SERVERS, DATABASES = ("http", "https", "databricks"), ("postgresql", "mysql")
CONNECT_SECONDS = 5
WAITS = (1.0, 2.0)
"""Seconds before the second and the third attempt."""
UNAVAILABLE = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "INTERNAL_ERROR", "DEADLINE_EXCEEDED")
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own would keep a run waiting for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class MLflowTarget:
    """The registered model that versions become model versions of."""

    def __init__(self, entry: MLflowPush, registry: RegistryConfig) -> None:
        self.when = entry.when
        self._uri = entry.tracking_uri
        self._name = entry.name or registry.name
        self._kind = urlsplit(self._uri).scheme.split("+")[0]

    @property
    def key(self) -> str:
        """Where it is."""
        return f"mlflow:{self._uri}#{self._name}"

    @property
    def settings(self) -> dict[str, object]:
        """What decides on what arrives there."""
        return {"name": self._name, "tracking_uri": self._uri}

    def check(self) -> str:
        """Look whether MLflow is installed and its registry can be opened; nothing is made there.

        Raises:
            ConfigError: it is not, or it cannot be.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("registry.push: mlflow is not installed: pip install -c constraints.txt -e '.[mlflow]'")
        if self._kind == "sqlite":
            _check_file(self._file())
        elif self._kind in DATABASES:
            _check_database(self._uri, self._where)
        elif self._kind in SERVERS:
            try:
                self._attempt(lambda client: client.search_registered_models(max_results=1))
            except (Pending, PreferenceTuningError) as error:
                raise ConfigError(f"registry.push: {error}") from None
        else:
            raise ConfigError(
                f"registry.push: tracking_uri {self._where!r} is neither a database nor a server of MLflow; "
                "sqlite:///mlflow.db is a file, http://HOST:PORT a server"
            )
        return f"mlflow: {self._where} can be reached; versions go to model {self._name!r}"

    def push(self, bundle: Bundle, done: dict[str, str], note: Callable[[dict[str, str]], None]) -> dict[str, str]:
        """Make MLflow have the version once, with tags as they are now, and let the aliases follow.

        Raises:
            Pending: MLflow does not answer.
            PreferenceTuningError: MLflow refuses.
        """
        if self._kind == "sqlite":
            self._file().parent.mkdir(parents=True, exist_ok=True)
        elif self._kind in DATABASES:
            try:
                _check_database(self._uri, self._where)
            except ConfigError as error:
                raise Pending(f"{error}; then `run.py registry push`") from None
        facts: dict[str, str] = self._attempt(lambda client: self._bring(client, bundle))
        return facts

    def _bring(self, client: Any, bundle: Bundle) -> dict[str, str]:
        wanted = {TAG + name: value for name, value in labels(bundle.version).items()}
        wanted[TAG + "folder"] = bundle.registry.path(bundle.version.id).as_uri()
        text = description(bundle.folder)
        self._make_model(client)
        there = self._versions(client)
        if bundle.version.id not in there:
            there = self._create(client, bundle, wanted, text)
        found = there[bundle.version.id]
        for name, value in wanted.items():
            if found.tags.get(name) != value:
                client.set_model_version_tag(self._name, found.version, name, value)
        if found.description != text:
            client.update_model_version(self._name, found.version, text)
        aliases = self._follow(client, bundle, {ours: str(version.version) for ours, version in there.items()})
        mine = sorted(alias for alias, version in aliases.items() if version == str(found.version))
        return {"model": self._name, "model_version": str(found.version), "aliases": ", ".join(mine) or "none"}

    def _make_model(self, client: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self._name, tags={TAG + "registry": self._name})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _create(self, client: Any, bundle: Bundle, tags: dict[str, str], text: str) -> dict[str, Any]:
        """Make the model version, its tags with it in one step, and return what is there then.

        Of two pushes at once the first one's stays: whoever finds an older one of the same takes back its own.
        """
        ours = bundle.version.id
        # A server refuses local paths.
        source = f"preference-tuning://{bundle.version.name}/{ours}" if self._kind in SERVERS else tags[TAG + "folder"]
        made = client.create_model_version(self._name, source, tags=tags, description=text, await_creation_for=0)
        there = self._versions(client)
        if int(there[ours].version) != int(made.version):
            client.delete_model_version(self._name, made.version)
        return there

    def _versions(self, client: Any) -> dict[str, Any]:
        """Return what is there by our ids; the oldest, if there are several of one."""
        page = client.search_model_versions(f"name = '{self._name}'", max_results=1000)
        found = list(page)
        while page.token:
            page = client.search_model_versions(f"name = '{self._name}'", max_results=1000, page_token=page.token)
            found += page
        found.sort(key=lambda version: int(version.version), reverse=True)
        return {version.tags[TAG + "version"]: version for version in found if TAG + "version" in version.tags}

    def _follow(self, client: Any, bundle: Bundle, there: dict[str, str]) -> dict[str, str]:
        """Bring the aliases that are ours to what the registry says, and return them."""
        wanted = {role: there[ours] for role, ours in roles(bundle.registry).items() if ours in there}
        now = {alias: str(version) for alias, version in client.get_registered_model(self._name).aliases.items()}
        for role in ("champion", "previous", "challenger"):
            if role in wanted and now.get(role) != wanted[role]:
                client.set_registered_model_alias(self._name, role, wanted[role])
            elif role in now and role not in wanted:
                client.delete_registered_model_alias(self._name, role)
        return {str(role): version for role, version in wanted.items()}

    def _attempt(self, work: Callable[[Any], Any]) -> Any:
        """Do ``work`` with a client, three times if MLflow is not there."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from sqlalchemy.exc import SQLAlchemyError

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        for wait in (*WAITS, None):
            try:
                return work(MlflowClient(tracking_uri=self._uri, registry_uri=self._uri))
            except (MlflowException, SQLAlchemyError, OSError) as error:
                reason = f"MLflow at {self._where}: {_line(error).replace(self._uri, self._where)}"
                if not _may_pass(error):
                    raise PreferenceTuningError(reason) from None
                if wait is None:
                    raise Pending(f"{reason}; when it answers again: `run.py registry push`") from None
            time.sleep(wait)
        raise AssertionError

    @property
    def _where(self) -> str:
        return self._uri

    def _file(self) -> Path:
        """Return the file of an sqlite address.

        Raises:
            ConfigError: it names none.
        """
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            path = make_url(self._uri).database
        except ArgumentError:
            path = None
        if not path or path == ":memory:":
            raise ConfigError(f"registry.push: tracking_uri {self._uri!r} names no file; write sqlite:///mlflow.db")
        return Path(path).absolute()


def _check_file(path: Path) -> None:
    """Look whether an sqlite file can be written, or made, and is MLflow's."""
    there = next(folder for folder in (path.parent, *path.parents) if folder.exists())
    if (
        not there.is_dir()
        or not os.access(there, os.W_OK | os.X_OK)
        or (path.exists() and not os.access(path, os.W_OK))
    ):
        raise ConfigError(f"registry.push: tracking_uri: cannot write {path}")
    if not path.exists():
        return
    try:
        # Read only: to look makes no file.
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigError(f"registry.push: tracking_uri: {path} is no sqlite database: {error}") from None
    if tables and "registered_models" not in tables:
        raise ConfigError(f"registry.push: tracking_uri: {path} is a database of something else than MLflow")


def _check_database(uri: str, where: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS}).connect().close()
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigError(
            f"registry.push: tracking_uri: cannot open {where}: {_line(error).replace(uri, where)}"
        ) from None


def _may_pass(error: BaseException) -> bool:
    """Return whether another attempt may help; MLflow hides what happened on the way behind a code or a context."""
    if getattr(error, "error_code", None) in UNAVAILABLE or type(error).__name__ == "OperationalError":
        return True
    return any(failures.kind_of(cause) == "transient" for cause in (error, error.__context__) if cause is not None)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
