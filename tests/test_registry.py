"""The registry on a disk and on S3: complete versions or none, only ours, and a pointer that moves in one step."""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from registries import FACTS, VERDICT, evaluation, left, model, opened, publish

from preference_tuning.errors import ConfigError, OvertakenError, PreferenceTuningError
from preference_tuning.registry.folder import FolderRegistry


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``registry.folder`` says."""
    if request.param == "disk":
        return str(tmp_path / "registry")
    return f"{request.getfixturevalue('bucket')}/team/registry"


@pytest.fixture
def registry(place: str) -> FolderRegistry:
    return opened(place)


def change(registry: FolderRegistry, id: str, name: str, text: str | None) -> None:
    """Change a file of a version behind the registry's back, or remove it."""
    at = f"{registry.name}/versions/{id}/{name}"
    if text is not None:
        registry.storage.write(at, text.encode())
    elif registry.place.startswith("s3:"):
        registry.storage._fs.rm_file(registry.storage._at(at))
    else:
        (registry.root / at).unlink()


def test_a_version_is_found_by_its_content(registry: FolderRegistry, tmp_path: Path) -> None:
    first = publish(registry, tmp_path)
    before = left(registry)
    assert publish(registry, tmp_path) == first, "the same model again changes nothing"
    assert left(registry) == before
    second = publish(registry, tmp_path, "other")
    assert second != first
    assert registry.ids() == opened(registry.place).ids() == sorted([first, second])
    assert [registry.find(first[:6]), registry.find("champion"), registry.find("")] == [first, None, None]
    version = registry.version(first)
    assert set(version.model_files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert set(version.evidence_files) == {"evaluation/report.html", "evaluation/evaluation.json"}
    assert registry.verify(first) == []
    assert version.created <= datetime.now(UTC)
    assert (registry.path(first) / "model" / "README.md").read_text() == "# card\n"


def test_the_champion_is_a_pointer(registry: FolderRegistry, tmp_path: Path) -> None:
    assert registry.champion() is registry.previous() is None
    first, second = publish(registry, tmp_path), publish(registry, tmp_path, "other")
    for version in (first, second, second):
        registry.promote(version, "5" * 64)
    champion, previous = registry.champion(), registry.previous()
    assert champion
    assert previous
    assert (champion.version, champion.seal, previous.version) == (second, "5" * 64, first)
    assert json.loads(registry.read("previous.json") or "")["version"] == first
    changes = registry.history()
    assert [(c.number, c.before, c.after, c.how, c.seal) for c in changes] == [
        (1, None, first, "verdict", "5" * 64),
        (2, first, second, "verdict", "5" * 64),
    ]
    assert registry.names("history") == ["000001.json", "000002.json"]
    assert "@" in changes[0].by


def test_a_verdict_promotes_only_over_the_champion_that_it_was_made_against(
    registry: FolderRegistry, tmp_path: Path
) -> None:
    first, second, third = (publish(registry, tmp_path, weights) for weights in ("1", "2", "3"))
    with pytest.raises(OvertakenError, match=f"{second} of m is stored, and not promoted: none reigns now"):
        registry.promote(second, expected=first)
    registry.promote(first, expected=None)
    registry.promote(second, expected=first)
    before = left(registry), registry.read("champion.json")
    with pytest.raises(OvertakenError, match=rf"{second} became champion on .* against {first}\. Run the same"):
        registry.promote(third, expected=first)
    with pytest.raises(OvertakenError, match="made against no champion") as caught:
        registry.promote(third, expected=None)
    assert caught.value.exit_code == 5
    assert (left(registry), registry.read("champion.json")) == before
    registry.promote(second, expected=first)  # it is the champion: its own verdict, once more
    assert len(registry.history()) == 2


def test_rollback_goes_back_and_forth(registry: FolderRegistry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no previous champion"):
        registry.rollback()
    first, second = publish(registry, tmp_path), publish(registry, tmp_path, "other")
    registry.promote(first, "1" * 64)
    registry.promote(second, "2" * 64)
    back = registry.rollback("answers in Latin")
    assert (back.version, back.seal, back.previous and back.previous.version) == (first, "1" * 64, second)
    taken = registry.taken_back(second)
    assert taken
    assert (taken.reason, taken.how) == ("answers in Latin", "rollback")
    assert registry.taken_back(first) is None
    assert registry.rollback().version == second
    assert registry.taken_back(second) is None
    change(registry, first, "model/adapter_model.safetensors", "changed")
    with pytest.raises(PreferenceTuningError, match=rf"{first} does not become champion again: .* was changed"):
        registry.rollback()
    assert [c.how for c in registry.history()] == ["verdict", "verdict", "rollback", "rollback"]


def test_what_was_changed_is_not_promoted(registry: FolderRegistry, tmp_path: Path) -> None:
    version = publish(registry, tmp_path)
    change(registry, version, "model/adapter_model.safetensors", "changed")
    change(registry, version, "model/more.txt", "")
    change(registry, version, "evidence/evaluation/report.html", None)
    assert registry.verify(version) == [
        "model/more.txt is not part of it",
        "model/adapter_model.safetensors was changed",
        "evidence/evaluation/report.html is missing",
    ]
    with pytest.raises(PreferenceTuningError, match="is not promoted"):
        registry.promote(version)
    assert registry.champion() is None


def test_a_later_decision_is_kept_once(registry: FolderRegistry, tmp_path: Path) -> None:
    version, evidence = publish(registry, tmp_path), evaluation(tmp_path / "later", "f" * 16)
    for _ in range(2):
        folder = registry.keep_decision(version, evidence, {"a": 1}, "7" * 64, VERDICT)
    assert (folder / "evidence/evaluation/report.html").read_text() == "<html>"
    assert [decision.seal for decision in registry.decisions(version)] == ["7" * 64]
    assert registry.decisions("0" * 16) == []


def test_pickles_are_refused(registry: FolderRegistry, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "training_args.bin").touch()
    with pytest.raises(PreferenceTuningError, match=r"model/training_args\.bin is of a kind that is not published"):
        registry.publish(folder, {}, {}, FACTS)
    assert left(registry) == []


def test_a_registry_is_tried_without_a_trace(registry: FolderRegistry, tmp_path: Path) -> None:
    registry.check_writable()
    assert left(registry) == []
    assert not (tmp_path / "registry").exists()
    publish(registry, tmp_path)
    before = left(registry)
    registry.check_writable()
    assert left(registry) == before


def test_a_folder_that_is_not_ours_is_left_alone(place: str) -> None:
    storage = opened(place).storage
    storage.write("cat.jpg", b"")
    with pytest.raises(ConfigError, match="not a registry of ours"):
        opened(place)
    storage.write("registry.json", b'{"format": "something else"}')
    with pytest.raises(ConfigError, match="a registry of another kind"):
        opened(place)
    if not place.startswith("s3:"):
        with pytest.raises(ConfigError, match="is a file"):
            opened(f"{place}/cat.jpg")
    assert sorted(storage.sizes("")) == ["cat.jpg", "registry.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write"):
        opened(tmp_path / "registry").check_writable()


def test_an_unknown_version(registry: FolderRegistry) -> None:
    with pytest.raises(PreferenceTuningError, match="no version 'nothing'"):
        registry.version("nothing")


@pytest.mark.parametrize("id", ["../../etc", "/etc", "..", "", "a/b", "a\\b", ".hidden", "a\nb", "a" * 97])
def test_an_id_leads_nowhere_else(registry: FolderRegistry, id: str) -> None:
    for ask in (registry.path, registry.version, registry.verify, lambda name: registry.decision(name, "7" * 64)):
        with pytest.raises(ConfigError, match="cannot be the id of a version"):
            ask(id)
    assert registry.find(id) is None
    for name in (f"receipts/{id}/../x", "../x", "/etc/passwd", "a//b", "a/./b"):
        with pytest.raises(ConfigError, match="not a name that a file in a registry can have"):
            registry.write(name, "")


def test_a_registry_from_elsewhere_is_read_with_care(registry: FolderRegistry, tmp_path: Path) -> None:
    """Its manifests and pointers may have been written by anybody."""
    version = publish(registry, tmp_path)
    document = json.loads(registry.read(f"versions/{version}/manifest.json") or "")
    for name in ("../../../etc/passwd", "/etc/passwd", "a/../../b"):
        document["model_files"] = {name: {"bytes": 1, "sha256": "0"}}
        change(registry, version, "manifest.json", json.dumps(document))
        with pytest.raises(ConfigError, match="not a name"):
            registry.version(version)
    change(registry, version, "manifest.json", json.dumps({**document, "model_files": {}, "id": "f" * 16}))
    with pytest.raises(PreferenceTuningError, match=f"folder of version {version} holds version {'f' * 16}"):
        registry.version(version)
    change(registry, version, "manifest.json", "{}")
    with pytest.raises(PreferenceTuningError, match=r"manifest.json of .* cannot be read: id: Field required"):
        registry.version(version)
    registry.write("champion.json", '{"version": "../../other", "since": "2026-01-01T00:00:00Z"}')
    with pytest.raises(PreferenceTuningError, match=r"m/champion\.json is not what was written: version"):
        registry.champion()


def test_pointers_of_earlier_versions_are_read(registry: FolderRegistry, tmp_path: Path) -> None:
    """They had no history, and previous.json was not a copy."""
    first, second, third = (publish(registry, tmp_path, weights) for weights in ("1", "2", "3"))
    registry.write("champion.json", json.dumps({"version": second, "since": "2026-01-02T00:00:00Z", "seal": None}))
    registry.write("previous.json", json.dumps({"version": first, "since": "2026-01-01T00:00:00Z"}))
    assert (registry.find("champion"), registry.find("previous"), registry.history()) == (second, first, [])
    registry.promote(third, expected=second)
    assert (registry.find("champion"), registry.find("previous")) == (third, second)
    assert json.loads(registry.read("previous.json") or "")["version"] == second


def test_a_full_disk_is_told_in_one_line(
    registry: FolderRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    first = publish(registry, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(PreferenceTuningError, match=r"cannot write .*: No space left on device; nothing is half"):
            publish(registry, tmp_path, "other")
    assert registry.ids() == [first]
    publish(registry, tmp_path, "other")
    assert not [name for name in left(registry) if ".writing" in name]
