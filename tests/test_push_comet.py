"""Pushing to Comet's model registry: the real client, against a stand-in on the loopback."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comet_registry_server import KEY, WORKSPACE, CometServer
from versions import publish

from preference_tuning.config import RegistryConfig
from preference_tuning.config.registry import CometPush
from preference_tuning.errors import ConfigError
from preference_tuning.registry import pushing
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing.targets import comet as target_module
from preference_tuning.registry.pushing.targets.comet import CometTarget
from preference_tuning.tracking import comet_models

NAME = "my-model"
EXPERIMENT = "e" * 32


@pytest.fixture
def registry(tmp_path: Path) -> FolderRegistry:
    return FolderRegistry(RegistryConfig(folder=str(tmp_path / "registry"), name="My.Model"))


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> Iterator[CometServer]:
    server = CometServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


def target(registry: FolderRegistry) -> CometTarget:
    return CometTarget(CometPush(to="comet", when="registered"), RegistryConfig(name=registry.name))


def push(registry: FolderRegistry, version: str, again: bool = False) -> pushing.Receipt:
    [receipt] = pushing.push(registry, version, [target(registry)], registry.root.parent / "aside", again=again)
    return receipt


def test_a_version_is_uploaded_once_and_registered(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path
) -> None:
    version = publish(registry, tmp_path)
    registry.promote(version)
    receipt = push(registry, version)
    assert receipt.state == "done", receipt.reason
    assert receipt.facts["number"] == "1.0.0"
    assert receipt.facts["experiment"] == EXPERIMENT
    assert comet.experiments[EXPERIMENT] == {"workspaceName": WORKSPACE, "projectName": "tests"}, "the run's own"
    model = registry.path(version) / "model"
    wanted = {name: [(model / name).read_bytes()] for name in registry.version(version).model_files}
    assert comet.files(f"{NAME}-{version}") == wanted, "each file once, byte by byte"
    found = comet.models[NAME]["1.0.0"]
    assert found["public"] is False
    assert found["status"] == "Production"
    assert found["tags"] == [version, "dpo", "promote", "champion"]
    assert found["comment"].startswith("A LoRA adapter for `org/base`")
    assert found["model"] == f"{NAME}-{version}"
    told = [path for path, _ in comet.asked if "/batch/" in path]
    assert {path.rsplit("/", 1)[1] for path in told} <= {"metric"}, "no parameters, no environment, no output"
    assert comet.sent("/notification/experiment") == [], "no name of a user"

    comet.asked.clear()
    assert push(registry, version) == receipt
    assert comet.asked == [], "a second push sends nothing"
    assert push(registry, version, again=True).state == "done"
    assert not [path for path, _ in comet.asked if "upload" in path or "/write/" in path]


@pytest.mark.faults
def test_what_was_killed_before_the_receipt_goes_on_with_what_is_there(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path
) -> None:
    """Files that arrived are not sent again; a version that was registered is found by its tag."""
    version = publish(registry, tmp_path)
    group, model = f"{NAME}-{version}", registry.path(version) / "model"
    comet.experiments[EXPERIMENT] = {"workspaceName": WORKSPACE, "projectName": "tests"}
    for name, content in (
        ("adapter_model.safetensors", (model / "adapter_model.safetensors").read_bytes()),
        ("adapter_config.json", b"cut"),
    ):
        comet.assets.append({"experiment": EXPERIMENT, "group": group, "name": name, "bytes": content, "type": "x"})
    assert push(registry, version).state == "done"
    sent = [payload["fileName"] for payload in comet.sent("/asset/upload")]
    assert sorted(sent) == ["README.md", "adapter_config.json", "tokenizer/chat_template.jinja"]
    pushed = pushing.receipt(registry, version, target(registry).key)
    assert pushed is not None
    for path in (registry.folder / "receipts" / version).iterdir():
        path.unlink()
    comet.asked.clear()
    again = push(registry, version)
    assert (again.state, again.facts["number"]) == ("done", pushed.facts["number"])
    assert comet.sent("/asset/upload") == comet.sent("/item/create") == []


def test_tags_and_status_follow_the_champion(registry: FolderRegistry, comet: CometServer, tmp_path: Path) -> None:
    first, second = publish(registry, tmp_path, "one"), publish(registry, tmp_path, "two", "hold")
    registry.promote(first)
    push(registry, first)
    push(registry, second)
    there = comet.models[NAME]
    assert (there["1.0.0"]["status"], there["1.0.1"]["status"]) == ("Production", "Staging")
    assert there["1.0.1"]["tags"] == [second, "dpo", "hold", "candidate"]
    registry.promote(second)
    comet.statuses = ["None", "Production", "Archived"]
    push(registry, second)
    assert (there["1.0.0"]["status"], there["1.0.1"]["status"]) == ("Archived", "Production")
    assert [("champion" in there[number]["tags"], "candidate" in there[number]["tags"]) for number in there] == [
        (False, True), (True, False),
    ]  # fmt: skip
    assert len(comet.sent("/asset/upload")) == 8, "nothing was uploaded twice"


@pytest.mark.faults
def test_a_number_that_another_push_took_is_not_ours(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path
) -> None:
    """And of two pushes of the same version the older registration stays."""
    version = publish(registry, tmp_path)

    def taken(tag: str) -> None:
        payload = {"registryModelName": NAME, "version": f"1.0.{len(comet.models.get(NAME, {}))}", "tags": [tag]}
        comet.create(
            {**payload, "experimentKey": "x", "experimentModelName": "x", "publicModel": False, "versionComment": ""}
        )

    comet.before["/item/create"] = lambda: taken("other")
    assert push(registry, version).facts["number"] == "1.0.1"
    second = publish(registry, tmp_path, "two")
    comet.before["/item/create"] = lambda: (taken(second), taken("third"))
    assert push(registry, second).facts["number"] == "1.0.2"
    assert [number for number, found in comet.models[NAME].items() if second in found["tags"]] == ["1.0.2"]


def test_without_a_key_a_version_waits(registry: FolderRegistry, tmp_path: Path) -> None:
    receipt = push(registry, publish(registry, tmp_path))
    assert receipt.state == "pending"
    assert (
        receipt.reason
        == "Comet needs COMET_API_KEY in the environment; with a key that it accepts `run.py registry push` goes on"
    )
    with pytest.raises(ConfigError, match="COMET_API_KEY"):
        target(registry).check()


def test_a_wrong_key_is_found_by_the_check_and_never_shown(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the key is that of someone" in target(registry).check()
    monkeypatch.setenv("COMET_API_KEY", "wrong-key-0123456789")
    with pytest.raises(ConfigError, match="COMET_API_KEY: Comet does not accept this key") as refused:
        target(registry).check()
    receipt = push(registry, publish(registry, tmp_path))
    assert receipt.state == "pending"
    for text in (str(refused.value), receipt.model_dump_json()):
        assert "wrong" not in text
        assert KEY not in text
    assert comet.models == {}


@pytest.mark.faults
def test_a_host_that_is_gone_or_hangs_costs_seconds(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, tmp_path)
    monkeypatch.setattr(comet_models, "LOOK_SECONDS", 4.0)
    comet.hanging = re.compile("registry-model|account")
    began = time.monotonic()
    receipt = push(registry, version)
    assert time.monotonic() - began < 6
    assert receipt.state == "pending"
    assert receipt.reason == "Comet has not answered within 4 s; when it answers again `run.py registry push` goes on"
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    receipt = push(registry, version)
    assert (receipt.state, receipt.attempts) == ("pending", 2)
    assert "versions wait for it" in target(registry).check(), "training is not kept from running"
    comet.hanging = None
    monkeypatch.setenv("COMET_URL_OVERRIDE", comet.environment["COMET_URL_OVERRIDE"])
    monkeypatch.setattr(comet_models, "LOOK_SECONDS", 30.0)
    assert push(registry, version).state == "done"


@pytest.mark.faults
def test_files_that_do_not_arrive_are_noticed(registry: FolderRegistry, comet: CometServer, tmp_path: Path) -> None:
    """The client only logs that; nothing is registered without its files."""
    version = publish(registry, tmp_path)
    real = comet.upload
    comet.upload = lambda payload: (200, {}) if payload["fileName"] == "README.md" else real(payload)  # type: ignore[method-assign]
    receipt = push(registry, version)
    assert receipt.state == "pending"
    assert receipt.reason is not None
    assert "Comet has not got 1 of 4 files, such as README.md" in receipt.reason
    assert comet.models == {}
    comet.upload = real  # type: ignore[method-assign]
    assert push(registry, version).state == "done"
    assert len(comet.sent("/asset/upload")) == 5


def test_a_large_model_leaves_its_weights_here(
    registry: FolderRegistry, comet: CometServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    version = publish(registry, tmp_path)
    monkeypatch.setattr(target_module, "LARGEST", 100)
    assert push(registry, version).state == "done"
    found: dict[str, Any] = comet.files(f"{NAME}-{version}")
    assert set(found) == {"README.md", "adapter_config.json", "files.json", "tokenizer/chat_template.jinja"}
    assert json.loads(found["files.json"][0]) == registry.version(version).model_files


def test_names_are_those_that_comet_makes_of_them() -> None:
    assert CometTarget(CometPush(to="comet", name="Its.own"), RegistryConfig(name="m")).key == "comet:its-own"
    from comet_ml.utils import proper_registry_model_name

    for name in ("preference-tuned", "llama-3.1-8b-dpo", "A__b..C", "x-"):
        assert comet_models.proper_name(name) == proper_registry_model_name(name)
