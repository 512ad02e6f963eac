"""Pushing to MLflow: its real registry in an sqlite file, and its real server on the loopback."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from versions import publish

from preference_tuning.config import RegistryConfig
from preference_tuning.config.registry import MLflowPush
from preference_tuning.errors import ConfigError
from preference_tuning.registry import pushing
from preference_tuning.registry.folder import FolderRegistry

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before anything imports it
pytest.importorskip("mlflow")

from preference_tuning.registry.pushing.targets import mlflow as target_module
from preference_tuning.registry.pushing.targets.mlflow import MLflowTarget


@pytest.fixture
def registry(tmp_path: Path) -> FolderRegistry:
    return FolderRegistry(RegistryConfig(folder=str(tmp_path / "registry"), name="my-model"))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/deep/mlflow.db"


def registry_config() -> RegistryConfig:
    return RegistryConfig(name="my-model")


def target(uri: str, when: Any = "registered") -> MLflowTarget:
    entry = MLflowPush(to="mlflow", tracking_uri=uri, when=when)
    return MLflowTarget(entry, registry_config())


def push(registry: FolderRegistry, version: str, uri: str, folder: Path, again: bool = False) -> pushing.Receipt:
    [receipt] = pushing.push(registry, version, [target(uri)], folder / "aside", again=again)
    return receipt


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri, uri)


def there(uri: str) -> list[Any]:
    found = client(uri).search_model_versions("name = 'my-model'")
    return sorted(found, key=lambda version: int(version.version))


def aliases(uri: str) -> dict[str, str]:
    """Return our ids by alias."""
    ids = {str(version.version): version.tags["preference_tuning.version"] for version in there(uri)}
    found = client(uri).get_registered_model("my-model").aliases
    return {alias: ids[str(version)] for alias, version in found.items()}


def test_a_version_becomes_a_pointer_with_what_it_is(registry: FolderRegistry, uri: str, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    registry.promote(version)
    receipt = push(registry, version, uri, tmp_path)
    assert (receipt.state, receipt.facts) == (
        "done", {"model": "my-model", "model_version": "1", "aliases": "champion"},
    )  # fmt: skip
    [found] = there(uri)
    assert found.source == registry.path(version).as_uri()
    assert found.description.startswith(
        "A LoRA adapter for `org/base`, tuned by SFT then DPO on 48 preference pairs and"
    )
    assert "Verdict: **promote**" in found.description
    assert "import" not in found.description
    tags = {name.removeprefix("preference_tuning."): value for name, value in found.tags.items()}
    assert tags["version"] == version
    assert tags["verdict"] == "promote"
    assert tags["base_model"] == "org/base"
    assert tags["data_fingerprint"] == "datafp"
    assert tags["zenml_run"] == "run-1"
    assert tags["comet_experiment"] == "e" * 32
    assert not list(tmp_path.glob("mlruns")), "MLflow left a folder behind"


def test_the_entrys_own_name_wins(registry: FolderRegistry, uri: str, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    other = MLflowTarget(MLflowPush(to="mlflow", tracking_uri=uri, name="other", when="registered"), registry_config())
    assert other.key == f"mlflow:{uri}#other"
    [receipt] = pushing.push(registry, version, [other], tmp_path / "aside")
    assert receipt.facts["model"] == "other"
    assert [found.name for found in client(uri).search_registered_models()] == ["other"]


def test_the_aliases_follow_the_champion(registry: FolderRegistry, uri: str, tmp_path: Path) -> None:
    first, second = publish(registry, tmp_path, "one"), publish(registry, tmp_path, "two")
    push(registry, first, uri, tmp_path)
    push(registry, second, uri, tmp_path)
    assert aliases(uri) == {"challenger": second}
    registry.promote(first)
    push(registry, first, uri, tmp_path)
    assert aliases(uri) == {"champion": first, "challenger": second}
    registry.promote(second)
    push(registry, second, uri, tmp_path)
    assert aliases(uri) == {"champion": second, "previous": first}
    third = publish(registry, tmp_path, "three", "hold")
    push(registry, third, uri, tmp_path)
    assert aliases(uri) == {"champion": second, "previous": first, "challenger": third}
    assert [version.tags["preference_tuning.version"] for version in there(uri)] == [first, second, third]


def test_the_same_push_again_makes_nothing_new(registry: FolderRegistry, uri: str, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    first = push(registry, version, uri, tmp_path)
    assert push(registry, version, uri, tmp_path) == first, "the receipt answers"
    again = push(registry, version, uri, tmp_path, again=True)
    assert again.facts == first.facts
    assert len(there(uri)) == 1


def test_killed_before_the_receipt_it_goes_on_with_what_is_there(
    registry: FolderRegistry, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, tmp_path)
    registry.promote(version)

    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(MLflowTarget, "_follow", killed)
        with pytest.raises(KilledError):
            push(registry, version, uri, tmp_path)
    begun = pushing.receipt(registry, version, target(uri).key)
    assert begun is not None
    assert begun.state == "pending"
    assert len(there(uri)) == 1
    assert aliases(uri) == {}
    assert push(registry, version, uri, tmp_path).state == "done"
    assert len(there(uri)) == 1
    assert aliases(uri) == {"champion": version}


@pytest.mark.faults
def test_two_pushes_at_once_make_one(registry: FolderRegistry, uri: str, tmp_path: Path) -> None:
    """Both have looked and found nothing; then both create."""
    version = publish(registry, tmp_path)
    push(registry, publish(registry, tmp_path, "other"), uri, tmp_path)
    both = threading.Barrier(2)
    real, answers = MLflowTarget._create, []

    def together(self: MLflowTarget, *given: Any) -> Any:
        both.wait(20)
        return real(self, *given)

    def one() -> None:
        bundle = pushing.Bundle(registry, registry.version(version), registry.path(version) / "model", False, tmp_path)
        answers.append(target(uri).push(bundle, {}, lambda facts: None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLflowTarget, "_create", together)
        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 2
    assert answers[0]["model_version"] == answers[1]["model_version"]
    assert [found.tags["preference_tuning.version"] for found in there(uri)].count(version) == 1


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's own server."""
    for name in ("_MLFLOW_SERVER_FILE_STORE", "_MLFLOW_SERVER_REGISTRY_STORE"):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    import logging

    from mlflow.server import app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    serving = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_a_server_gets_a_pointer_that_it_accepts(registry: FolderRegistry, server: str, tmp_path: Path) -> None:
    """It refuses local paths as a source; the folder is a tag then."""
    version = publish(registry, tmp_path)
    registry.promote(version)
    assert "can be reached" in target(server).check()
    receipt = push(registry, version, server, tmp_path)
    assert receipt.state == "done", receipt.reason
    [found] = there(server)
    assert found.source == f"preference-tuning://my-model/{version}"
    assert found.tags["preference_tuning.folder"] == registry.path(version).as_uri()
    assert aliases(server) == {"champion": version}


def test_a_server_that_is_gone_is_waited_for(
    registry: FolderRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "WAITS", (0.01, 0.01))
    version = publish(registry, tmp_path)
    gone = "http://127.0.0.1:9"
    receipt = push(registry, version, gone, tmp_path)
    assert receipt.state == "pending"
    assert receipt.reason is not None
    assert "MLflow at http://127.0.0.1:9" in receipt.reason
    assert "run.py registry push" in receipt.reason
    with pytest.raises(ConfigError, match=r"MLflow at http://127.0.0.1:9"):
        target(gone).check()


def test_the_check_finds_what_cannot_work_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    assert "can be reached" in target(f"sqlite:///{tmp_path}/new/mlflow.db").check()
    assert list(tmp_path.iterdir()) == []
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE stack (id INTEGER)")
    connection.close()
    (tmp_path / "text.db").write_text("no database at all, but long enough for a header")
    before = sorted(tmp_path.iterdir())
    for uri, said in (
        (f"sqlite:///{tmp_path}/other.db", "something else than MLflow"),
        (f"sqlite:///{tmp_path}/text.db", "no sqlite database"),
        (f"sqlite:///{tmp_path}/text.db/mlflow.db", "cannot write"),
        ("sqlite:///", "names no file"),
        ("mlruns", "neither a database nor a server"),
        ("postgresql://127.0.0.1:9/x", r"cannot open postgresql://127.0.0.1:9/x"),
    ):
        with pytest.raises(ConfigError, match=said):
            target(uri).check()
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_extra_the_check_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(target_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\.\[mlflow\]"):
        target(f"sqlite:///{tmp_path}/mlflow.db").check()
