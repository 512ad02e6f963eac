"""Where a registry lies: locks, leases, copies of remote versions, and what is said when a store cannot be used."""

import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from registries import at_once, forked, left, opened, publish

from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.registry import storage as storages
from preference_tuning.registry.storage import lease, locking
from preference_tuning.registry.storage.local import LocalStorage
from preference_tuning.registry.storage.remote import RemoteStorage


@pytest.fixture(params=["disk", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> storages.Storage:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "disk":
        return storages.at(str(tmp_path / "registry"))
    return storages.at(request.getfixturevalue("bucket") if request.param == "s3" else f"memory://{tmp_path.name}")


def prepared(storage: storages.Storage, name: str, **files: str) -> Path:
    aside = storage.aside(name)
    for file, text in {"manifest.json": "{}", **files}.items():
        path = aside / file.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return aside


def test_files_and_folders(storage: storages.Storage) -> None:
    """The same of every storage, fsspec's memory standing for stores without conditional writes."""
    assert storage.read("m/a.json") is None
    storage.write("m/a.json", b"1")
    assert not storage.create("m/a.json", b"2")
    assert storage.create("m/b.json", b"2")
    assert not storage.swap("m/a.json", b"0", b"3")
    assert not storage.swap("m/none.json", b"0", b"3")
    assert storage.swap("m/a.json", b"1", b"4")
    assert [storage.read("m/a.json"), storage.read("m/b.json")] == [b"4", b"2"]
    with storage.lock("m"):
        storage.publish(prepared(storage, "m/versions/1", x="x", deep__y="yy"), "m/versions/1", "manifest.json")
    storage.write("m/versions/2/x", b"x")
    assert storage.names("m") == ["a.json", "b.json", "versions"]
    assert storage.names("m/versions") == ["1", "2"]
    assert storage.names("m/versions", holding="manifest.json") == ["1"]
    assert storage.names("none") == []
    assert storage.sizes("m/versions/1") == {"deep/y": 2, "manifest.json": 2, "x": 1}
    folder = storage.folder("m/versions/1")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "deep",
        "deep/y",
        "manifest.json",
        "x",
    ]
    assert not storage.folder("m/versions/none").exists()
    with storage.lock("m"):
        storage.remove("m/versions/1", "manifest.json")
    assert storage.names("m/versions") == ["2"]
    assert not folder.exists()
    storage.check("m")
    for name in ("../x", "/x", "m/../../x", "m//x", ""):
        with pytest.raises(ConfigError, match="not a name") if name else pytest.raises((ConfigError, Exception)):
            storage.write(name, b"")


# --- a disk -----------------------------------------------------------------------------------------------------------


def test_who_waits_is_told_for_whom_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(locking, "QUIET", 0.0)
    monkeypatch.setattr(locking, "PATIENCE", 0.2)
    who = rf"process {os.getpid()} of \S+ on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    told = pytest.raises(TransientError, match=rf"m was locked for \d s by {who}; wait for it")
    with storage.lock("m"), told, LocalStorage(tmp_path).lock("m"):
        pass
    assert capsys.readouterr().err.count(f"waiting for {tmp_path}/m: process {os.getpid()}") == 1
    with LocalStorage(tmp_path).lock("m"), LocalStorage(tmp_path).lock("another"):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    def die() -> None:
        with LocalStorage(tmp_path).lock("m"):
            os._exit(3)

    assert forked(die) == 3
    with LocalStorage(tmp_path).lock("m"):
        pass


def test_a_disk_without_locks_is_found_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="cannot be locked: No locks available"):
        opened(tmp_path / "registry").check_writable()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(ConfigError, match="its disk knows no flock"):
        opened(tmp_path / "registry").check_writable()
    assert list(tmp_path.iterdir()) == []


def again(kind: Any) -> None:
    """Let the next registry have a client of its own: a client has its methods from when it was made."""
    kind.clear_instance_cache()


# --- an object store --------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_while_its_holder_lives(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE", 1.5)
    one, other = RemoteStorage(bucket), RemoteStorage(bucket)
    order: list[str] = []

    def wait_for_it() -> None:
        with other.lock("m"):
            order.append("other")

    waiting = threading.Thread(target=wait_for_it)
    with one.lock("m"):
        waiting.start()
        time.sleep(3.5)
        one.write("m/x", b"")  # still the holder
        order.append("one")
    waiting.join()
    assert order == ["one", "other"]


def test_a_lease_of_the_dead_is_taken_over_and_the_late_are_told(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "LEASE", 0.6)
    monkeypatch.setattr(locking, "QUIET", 0.1)
    monkeypatch.setattr(lease.Lease, "_renew", lambda self: None)  # suspended: it lives, and does nothing
    late, next_one = RemoteStorage(bucket), RemoteStorage(bucket)
    began = time.monotonic()
    with late.lock("m"):
        late.write("m/x", b"late")
        with next_one.lock("m"):
            assert time.monotonic() - began > 0.6
            assert f"process {os.getpid()}" in capsys.readouterr().err
        with pytest.raises(TransientError, match="could not be renewed"):
            late.write("m/x", b"too late")
    assert late.read("m/x") == b"late"
    with next_one.lock("m"):
        pass


def test_of_many_who_want_a_lease_one_has_it(bucket: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"

    def act() -> None:
        with RemoteStorage(bucket).lock("m"):
            inside.mkdir()  # fails if somebody is there
            time.sleep(0.05)
            inside.rmdir()

    assert at_once(*[act] * 4) == [0] * 4


def test_each_file_is_copied_once_and_a_damaged_copy_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    fetched: list[str] = []
    get = S3FileSystem._get_file

    async def counted(self: Any, at: str, to: str, **how: Any) -> None:
        fetched.append(at.rpartition("/")[2])
        await get(self, at, to, **how)

    monkeypatch.setattr(S3FileSystem, "_get_file", counted)
    again(S3FileSystem)
    version = publish(opened(bucket), tmp_path)
    folder = opened(bucket).path(version)
    assert fetched == [], "what was published from here is here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    registry = opened(bucket)
    there = registry.path(version)
    files = sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(fetched) == len(files)
    assert registry.verify(version) == opened(bucket).verify(version) == []
    assert len(fetched) == len(files)
    weights = there / "model" / "adapter_model.safetensors"
    weights.write_bytes(b"x")
    (there / "model" / "more").touch()
    (there / "manifest.json").unlink()
    assert registry.verify(version) == []
    assert weights.read_bytes() == (folder / "model" / "adapter_model.safetensors").read_bytes()
    assert sorted(fetched[len(files) :]) == ["adapter_model.safetensors", "manifest.json"]
    assert not (there / "model" / "more").exists()
    registry.storage.write(f"m/versions/{version}/model/adapter_model.safetensors", b"y")
    assert opened(bucket).verify(version) == ["model/adapter_model.safetensors was changed"]


def test_a_store_that_cannot_be_used_is_told_in_one_line(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, said in {
        "s3://no-such-bucket/x": "s3://no-such-bucket/x: there is no such bucket",
        "gs://bucket/x": "gs://bucket/x cannot be opened: Please install gcsfs",
        "nothing://x": "nothing://x cannot be opened: Protocol not known: nothing",
    }.items():
        with pytest.raises(ConfigError, match=f"registry.folder: {said}"):
            opened(folder)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"install the s3 extra: pip install 'preference-tuning\[s3\]'"):
        opened(bucket)


def test_a_store_that_may_not_be_written(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    async def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(S3FileSystem, "_pipe_file", refuse)
    again(S3FileSystem)
    registry = opened(bucket)
    with pytest.raises(ConfigError, match="no permission: Access Denied; credentials come from the environment"):
        registry.check_writable()


def test_a_store_that_ignores_conditions_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some that speak S3 do: two runs would destroy each other's work."""
    from s3fs import S3FileSystem

    pipe = S3FileSystem._pipe_file

    async def overwrite(self: Any, at: str, content: bytes, **_: Any) -> None:
        await pipe(self, at, content)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", overwrite)
    again(S3FileSystem)
    registry = opened(bucket)
    with pytest.raises(ConfigError, match="although it was told not to"):
        registry.check_writable()
    assert left(registry) == []


def test_keys_that_lead_elsewhere_are_not_copied(bucket: str, tmp_path: Path) -> None:
    from s3fs import S3FileSystem

    registry = opened(bucket)
    version = publish(registry, tmp_path)
    S3FileSystem(use_listings_cache=False).pipe_file(f"{bucket}/m/versions/{version}/../../../../evil", b"x")
    with pytest.raises(ConfigError, match="not a name that a file in a registry can have"):
        registry.verify(version)
    assert not list(tmp_path.rglob("evil"))


def test_a_download_that_is_cut_is_no_copy(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    version = publish(opened(bucket), tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))

    async def cut(self: Any, at: str, to: str, **_: Any) -> None:
        Path(to).write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_get_file", cut)
        again(S3FileSystem)
        with pytest.raises(PreferenceTuningError, match=r"came with 0 of \d+ bytes"):
            opened(bucket).path(version)
    again(S3FileSystem)
    assert opened(bucket).verify(version) == []
