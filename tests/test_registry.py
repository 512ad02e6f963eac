"""The folder registry: complete versions or none, only ours, and a pointer that moves in one step."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from preference_tuning import jobs
from preference_tuning.config import RegistryConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry.folder import FolderRegistry

VERDICT = Verdict(decision="promote", candidate="dpo", rules=[])
FACTS: dict[str, Any] = {
    "finetuning_type": "dpo",
    "base_model": {"fingerprint": "x"},
    "data": {},
    "config": {},
    "code": "c",
    "metrics": {},
    "verdict": VERDICT,
    "run": {},
}


@pytest.fixture
def registry(tmp_path: Path) -> FolderRegistry:
    return FolderRegistry(RegistryConfig(folder=str(tmp_path / "registry"), name="m"))


def model(folder: Path, weights: str = "w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.frombuffer(weights.encode(), np.uint8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def publish(registry: FolderRegistry, folder: Path, weights: str = "w") -> str:
    evidence = folder / "evidence"
    evidence.mkdir(parents=True, exist_ok=True)
    (evidence / "report.html").write_text("<html>")
    return registry.publish(
        model(folder / weights, weights), {"evaluation": evidence}, {"README.md": "# card\n"}, FACTS
    ).id


def test_a_version_is_found_by_its_content(registry: FolderRegistry, tmp_path: Path) -> None:
    first = publish(registry, tmp_path)
    assert publish(registry, tmp_path) == first, "the same model again changes nothing"
    second = publish(registry, tmp_path, "other")
    assert second != first
    version = registry.version(first)
    assert set(version.model_files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert set(version.evidence_files) == {"evaluation/report.html"}
    assert registry.verify(first) == []
    assert version.created <= datetime.now(UTC)


def test_the_champion_is_a_pointer(registry: FolderRegistry, tmp_path: Path) -> None:
    assert registry.champion() is None
    first, second = publish(registry, tmp_path), publish(registry, tmp_path, "other")
    for version in (first, second, second):
        registry.promote(version)
    champion = registry.champion()
    assert champion is not None
    assert champion.version == second
    assert json.loads((registry.folder / "previous.json").read_text())["version"] == first


def test_what_was_changed_is_not_promoted(registry: FolderRegistry, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    folder = registry.path(version)
    (folder / "model" / "adapter_model.safetensors").write_text("changed")
    (folder / "model" / "more.txt").touch()
    (folder / "evidence" / "evaluation" / "report.html").unlink()
    assert registry.verify(version) == [
        "model/more.txt is not part of it",
        "model/adapter_model.safetensors was changed",
        "evidence/evaluation/report.html is missing",
    ]
    with pytest.raises(PreferenceTuningError, match="is not promoted"):
        registry.promote(version)
    assert registry.champion() is None


def test_pickles_are_refused(registry: FolderRegistry, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "training_args.bin").touch()
    with pytest.raises(PreferenceTuningError, match=r"model/training_args\.bin is of a kind that is not published"):
        registry.publish(folder, {}, {}, FACTS)
    assert not registry.folder.exists()


def test_a_publication_killed_anywhere_leaves_nothing_half_visible(
    registry: FolderRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before each sync in turn: readers see no version, and the next publication completes."""
    calls = 0
    stop_at = 0

    class Killed(BaseException):
        pass

    def count(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Killed

    monkeypatch.setattr(jobs, "sync", count)
    for stop_at in range(1, 30):  # noqa: B007 (read by count)
        calls = 0
        try:
            publish(registry, tmp_path)
            break
        except Killed:
            seen = list((registry.folder / "versions").glob("[!.]*"))
            for version in seen:
                assert registry.verify(version.name) == []
    assert stop_at > 5
    version = publish(registry, tmp_path)
    assert registry.verify(version) == []
    assert not list((registry.folder / "versions").glob(".writing-*"))


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(ConfigError, match="not a registry of ours"):
        FolderRegistry(RegistryConfig(folder=str(other)))
    (other / "registry.json").write_text('{"format": "something else"}')
    with pytest.raises(ConfigError, match="a registry of another kind"):
        FolderRegistry(RegistryConfig(folder=str(other)))
    with pytest.raises(ConfigError, match="is a file"):
        FolderRegistry(RegistryConfig(folder=str(other / "cat.jpg")))
    assert sorted(path.name for path in other.iterdir()) == ["cat.jpg", "registry.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    registry = FolderRegistry(RegistryConfig(folder=str(tmp_path / "registry")))
    with pytest.raises(ConfigError, match="cannot write"):
        registry.check_writable()


def test_an_unknown_version(registry: FolderRegistry) -> None:
    with pytest.raises(PreferenceTuningError, match="no version 'nothing'"):
        registry.version("nothing")
