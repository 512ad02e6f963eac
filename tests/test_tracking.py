"""The spool keeps every metric through a crash; Comet is chosen as asked, and its failure stops nothing."""

import os
import random
import zipfile
from pathlib import Path

import pytest

from preference_tuning.config import TrackingConfig
from preference_tuning.errors import ConfigError
from preference_tuning.tracking import comet
from preference_tuning.tracking.comet import Comet, CometRun
from preference_tuning.tracking.spool import Point, Spool, read, series


def points(count: int) -> list[Point]:
    return [Point(step=i, epoch=i / 10, metrics={"sft/train/loss": 1.0 / i}) for i in range(1, count + 1)]


def test_the_spool_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Spool(path)
    for point in points(5):
        first.append(point)
    with path.open("a") as stream:
        stream.write('{"step": 6, "met')  # cut short by a crash
    assert [point.step for point in read(path)] == [1, 2, 3, 4, 5]
    resumed = Spool(path, resume_at=3)
    for point in points(6)[3:]:
        resumed.append(point)
    resumed.close()
    assert list(read(path)) == points(6)
    assert series(list(read(path)), "sft/train/loss")[-1] == (6, 1.0 / 6)


def test_the_spool_is_whole_until_its_successor_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Spool(path)
    for point in points(5):
        first.append(point)
    first.close()
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    Spool(path, resume_at=3)
    assert list(read(path)) == points(5)


def run(folder: Path, mode: str) -> CometRun:
    return CometRun(config=TrackingConfig(mode=mode), experiment_key="a" * 32, folder=folder)  # type: ignore[arg-type]


def test_the_mode_follows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "auto").mode() == "offline"
    with pytest.raises(ConfigError, match="needs COMET_API_KEY"):
        run(tmp_path, "online").mode()
    monkeypatch.setenv("COMET_API_KEY", "key")
    assert run(tmp_path, "auto").mode() == "online"
    assert run(tmp_path, "offline").mode() == "offline"


def test_stages_with_the_same_seed_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """The archive's name comes from the global random state, which every trainer seeds alike."""
    for stage in ("sft", "dpo"):
        random.seed(42)
        tracker = Comet.start(run(tmp_path, "offline"), stage)
        tracker.log(Point(step=1, metrics={f"{stage}/train/loss": 0.5}))
        tracker.end()
    archives = sorted(tmp_path.glob("*/*.zip"))
    assert [archive.parent.name for archive in archives] == ["dpo", "sft"]


def test_an_archive_holds_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_in_the_environment")
    tracker = Comet.start(run(tmp_path, "offline"), "sft")
    tracker.log_parameters("sft", {"learning_rate": 1e-4})
    tracker.log_others({"verdict": "promote"})
    tracker.end()
    with zipfile.ZipFile(next(tmp_path.glob("*/*.zip"))) as opened:
        content = b"".join(opened.read(name) for name in opened.namelist()).decode()
    assert "sft/learning_rate" in content
    assert "verdict" in content
    for secret in ("hf_canary", os.uname().nodename, str(Path(__file__).parent), "git", "installed_packages"):
        assert secret not in content, secret


def test_a_tracker_that_fails_warns_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def log_metrics(self, *_: object, **__: object) -> None:
            raise ConnectionError("gone")

    tracker = Comet(Broken())
    for point in points(3):
        tracker.log(point)
    tracker.end()
    assert capsys.readouterr().err.count("warning: Comet failed (ConnectionError: gone)") == 1


def test_a_host_out_of_reach_means_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_API_KEY", "key")
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    tracker = Comet.start(run(tmp_path, "auto"), "sft")
    tracker.log(Point(step=1, metrics={"sft/train/loss": 0.5}))
    tracker.end()
    assert len(list(tmp_path.glob("sft/*.zip"))) == 1
    assert not comet._reachable("http://127.0.0.1:9/")
