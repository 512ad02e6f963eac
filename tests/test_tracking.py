"""The spool keeps every metric; Comet is fed from it, and whatever Comet does, nothing is lost, doubled or waited for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comet_server import KEY, CometServer

from preference_tuning import fingerprint, jobs, preflight
from preference_tuning.config import RunConfig, TrackingConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.jobs import starter
from preference_tuning.tracking import account, delivery, guard, overview, recording, sending
from preference_tuning.tracking.folder import About, RunFolder
from preference_tuning.tracking.recording import Told, Tracking
from preference_tuning.tracking.spool import Follower, Point, Spool, read, series
from preference_tuning.tracking.trackers import Known, Null

ROOT = Path(__file__).parent.parent
RUN = "a1" * 16


def point(step: int, stage: str = "sft") -> Point:
    return Point(step=step, epoch=step / 10, metrics={f"{stage}/train/loss": 1.0 / step, f"{stage}/train/lr": step / 7})


def points(last: int, stage: str = "sft") -> list[Point]:
    return [point(step, stage) for step in range(1, last + 1)]


def values(found: list[Point]) -> dict[tuple[str, int], float]:
    return {(name, p.step): value for p in found for name, value in p.metrics.items()}


def write(evidence: Path, found: list[Point], resume_at: int = 0) -> None:
    evidence.mkdir(parents=True, exist_ok=True)
    spool = Spool(evidence / "metrics.jsonl", resume_at)
    for p in found:
        spool.append(p)
    spool.close()


@pytest.fixture(autouse=True)
def reachable(comet: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comet answers, and everybody here talks to it."""
    for name, value in comet.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(delivery, "SETTLE_SECONDS", 0.0)


def tracking(folder: Path, run: str = RUN, mode: str = "auto", **settings: Any) -> Tracking:
    config = TrackingConfig(mode=mode, **settings)  # type: ignore[arg-type]
    return Tracking(folder / "tracking", config, run, f"run {run[:4]}", {"dpo": {"beta": 0.1}})


def fail(track: Tracking, evidence: Path, found: list[Point], error: BaseException) -> None:
    """Let the SFT stage of a run fail after some points."""
    with track.stage("sft") as stage:
        stage.follow(evidence)
        write(evidence, found)
        raise error


def until(reached: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(track: Tracking) -> None:
    """Close a run and wait until its sender has ended, however slow this machine is."""
    until(sender_of(track.run))
    track.close()
    until(lambda: not sender_of(track.run)())


def sender_of(run: RunFolder) -> Callable[[], bool]:
    """Return what tells whether a run's sender lives."""

    def lives() -> bool:
        with run.sole() as free:
            return not free

    return lives


# --- the spool ------------------------------------------------------------------------------------------------------


def test_the_spool_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, points(5))
    with path.open("a") as stream:
        stream.write('{"step": 6, "met')  # cut short by a crash
    assert [p.step for p in read(path)] == [1, 2, 3, 4, 5]
    write(tmp_path, points(6)[3:], resume_at=3)
    assert list(read(path)) == points(6)
    assert series(list(read(path)), "sft/train/loss")[-1] == (6, 1.0 / 6)


def test_the_spool_is_whole_until_its_successor_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, points(5))
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    Spool(tmp_path / "metrics.jsonl", resume_at=3)
    assert list(read(tmp_path / "metrics.jsonl")) == points(5)


def test_a_spool_holds_what_is_no_number(tmp_path: Path) -> None:
    odd = Point(step=1, metrics={"a": float("inf"), "b": -float("inf")})
    write(tmp_path, [odd, Point(step=2, metrics={"a": float("nan")})])
    first, second = read(tmp_path / "metrics.jsonl")
    assert first == odd
    assert second.metrics["a"] != second.metrics["a"]
    assert repr(Follower().news(tmp_path / "metrics.jsonl")) == repr([first, second])


def test_a_killed_process_loses_at_most_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
from pathlib import Path
from preference_tuning.tracking.spool import Point, Spool
spool = Spool(Path({str(path)!r}))
for step in range(1, 1_000_000):
    spool.append(Point(step=step, metrics={{"sft/train/loss": step}}))
    print(step, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout
    told = [next(child.stdout) for _ in range(200)]
    child.kill()
    told += child.stdout.read().splitlines()
    kept = [p.step for p in read(path)]
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= int(told[-1]) >= 200, "what was appended is there, whatever became of the process"


def test_a_growing_spool_is_read_once_and_a_new_one_from_its_beginning(tmp_path: Path) -> None:
    path, follower = tmp_path / "metrics.jsonl", Follower()
    assert follower.news(path) == []
    write(tmp_path, points(3))
    assert follower.news(path) == points(3)
    with path.open("a") as stream:
        stream.write('{"step": 4, "metrics"')
        stream.flush()
        assert follower.news(path) == [], "half a line is none"
        stream.write(': {"x": 1}}\n')
    assert follower.news(path) == [Point(step=4, metrics={"x": 1})]
    write(tmp_path, [point(3)], resume_at=2)
    assert follower.news(path) == points(3)


def test_jobs_know_the_spool_and_nothing_of_comet() -> None:
    for job in ("training", "evaluation", "data"):
        used = {path.name for path in fingerprint.sources(f"preference_tuning.{job}") if path.parent.name == "tracking"}
        assert used <= {"__init__.py", "spool.py"}, job


# --- what may be told -----------------------------------------------------------------------------------------------


def test_what_is_told_names_no_secret_and_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-canary-1234")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent.sock")
    settings = {
        "base_model": {"source": "/home/me/models/tiny", "threads": None},
        "data": {"sources": [{"source": "https://me:pw-canary@host/rows.jsonl?token=tk-canary", "weight": 1.0}]},
        "registry": {"push": [{"tracking_uri": "sqlite:////home/me/ml.db", "token_secret": "hf_canary", "token_env": "HF"}]},
        "lora": None,
        "dpo": {"loss_type": ["sigmoid", "sft"], "beta": 0.1},
        "note": "with sk-canary-1234 in it",
    }  # fmt: skip
    assert guard.flat(settings) == {
        "base_model/source": "tiny",
        "base_model/threads": "None",
        "data/sources/0/source": "https://host/rows.jsonl",
        "data/sources/0/weight": "1.0",
        "registry/push/0/tracking_uri": "sqlite:///ml.db",
        "registry/push/0/token_secret": "***",
        "registry/push/0/token_env": "HF",
        "lora": "None",
        "dpo/loss_type": "sigmoid, sft",
        "dpo/beta": "0.1",
        "note": "with *** in it",
    }
    assert guard.portable("https://me:pw@github.com/a/b.git") == "https://github.com/a/b.git"
    assert guard.portable("~/runs/x") == "x"
    assert guard.scrub("a https://u:p@h/x?q=1 b") == "a https://h/x?q=1 b", "prose keeps its addresses"


# --- before a run ---------------------------------------------------------------------------------------------------


def test_the_mode_follows_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMET_API_KEY")
    assert account.mode_of(TrackingConfig()) == "offline"
    assert account.mode_of(TrackingConfig(mode="off")) == "off"
    with pytest.raises(ConfigError, match="needs COMET_API_KEY"):
        account.mode_of(TrackingConfig(mode="online"))
    monkeypatch.setenv("COMET_API_KEY", "key")
    assert account.mode_of(TrackingConfig()) == "online"
    assert account.mode_of(TrackingConfig(mode="offline")) == "offline"


def test_a_wrong_key_or_workspace_is_found_before_a_run(comet: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert account.check(TrackingConfig(project="p")) == "Comet online, project p in somebody"
    assert account.check(TrackingConfig(workspace="team")).endswith("in team")
    with pytest.raises(ConfigError, match="workspace: 'other' is none of the workspaces of this key: somebody, team"):
        account.check(TrackingConfig(workspace="other"))
    monkeypatch.setenv("COMET_API_KEY", "wrong-key-canary")
    with pytest.raises(ConfigError, match="COMET_API_KEY: Comet does not accept this key") as refused:
        account.check(TrackingConfig())
    assert "canary" not in str(refused.value)
    run = RunConfig.model_validate({"base_model": {"source": "m"}, "data": {"source": "rows.jsonl"}})
    with pytest.raises(ConfigError, match="does not accept this key"):
        preflight.check(run, only=("tracking",))
    assert comet.experiments == {}, "nothing was made in Comet"


@pytest.mark.parametrize("trouble", ["unreachable", "hang", "cut", 500])
def test_a_comet_out_of_reach_does_not_stop_a_run(
    trouble: int | str, comet: CometServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet.fail = lambda path: None if trouble == "unreachable" else trouble
    if trouble == "unreachable":
        monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    told = account.check(TrackingConfig())
    assert "warning: Comet cannot be reached now" in told
    assert len(comet.paths) <= 1, "it is asked once"


def test_comet_may_take_five_seconds_of_a_run() -> None:
    waits = account.CONNECT_SECONDS + account.ANSWER_SECONDS + recording.GRACE_SECONDS
    assert waits <= 5.0


# --- while a run lives ----------------------------------------------------------------------------------------------


def test_comet_sees_a_run_while_it_lives(comet: CometServer, tmp_path: Path) -> None:
    track = tracking(tmp_path, tags=("night",), project="p", workspace="team")
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(3))
        until(lambda: RUN in comet.experiments and len(comet.experiments[RUN].points) == 6)
        write(tmp_path / "job", points(5)[3:], resume_at=3)
        until(lambda: len(comet.experiments[RUN].points) == 10)
        stage.add(Told(others={"sft/steps": 5}, tables={"sft/table.csv": [["a"], [1]]}))
    finish(track)
    kept = comet.experiments[RUN]
    assert kept.metrics == values(points(5))
    assert kept.parameters == {"dpo/beta": "0.1"}
    assert kept.others == {
        "Name": "run a1a1", "sft/steps": 5, "zenml/run": "run a1a1", "zenml/run_id": RUN, "run/status": "finished",
    }  # fmt: skip
    assert dict(kept.assets) == {"sft/table.csv": b"a\n1\n"}
    assert (kept.project, kept.workspace, kept.tags, kept.state) == ("p", "team", ["night"], "finished")
    assert track.told() == f"http://comet/somebody/p/{RUN}"
    assert track.links() == {"comet/experiment": RUN, "comet/url": track.told()}


def test_a_spool_that_is_cut_back_to_a_checkpoint_sends_nothing_twice(comet: CometServer, tmp_path: Path) -> None:
    track = tracking(tmp_path)
    with track.stage("dpo") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(5, "dpo"))
        until(lambda: RUN in comet.experiments and len(comet.experiments[RUN].points) == 10)
        # A fresh process continues from the checkpoint at step 2.
        write(tmp_path / "job", points(8, "dpo")[2:], resume_at=2)
    finish(track)
    assert comet.experiments[RUN].metrics == values(points(8, "dpo"))


def break_after(count: int, trouble: int | str) -> Callable[[str], int | str | None]:
    """Return a Comet that works until ``count`` batches of metrics arrived, and fails from then on."""
    seen = [0]

    def fail(path: str) -> int | str | None:
        seen[0] += path.endswith("experiment/metric")
        return trouble if seen[0] > count else None

    return fail


@pytest.mark.parametrize(
    "trouble",
    ["unreachable", "hang", "lost", pytest.param("cut", marks=pytest.mark.faults), pytest.param(500, marks=pytest.mark.faults)],
)  # fmt: skip
def test_nothing_is_lost_or_doubled_when_comet_is_in_trouble(
    trouble: int | str, comet: CometServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails from the second batch on, and is well again when somebody uploads later."""
    address = os.environ["COMET_URL_OVERRIDE"]
    if trouble == "unreachable":
        monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    else:
        comet.fail = break_after(1, trouble)
    track = tracking(tmp_path)
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: (waits.append(s), time.sleep(s)))
    monkeypatch.setattr(recording, "time", clock)
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(4))
        if trouble != "unreachable":
            until(lambda: RUN in comet.experiments and len(comet.experiments[RUN].points) == 8)
        write(tmp_path / "job", points(9)[4:], resume_at=4)
        stage.add(Told(others={"sft/steps": 9}))
        until(lambda: trouble == "unreachable" or sum(p.endswith("experiment/metric") for p in comet.paths) > 1)
    track.close()
    assert sum(waits) <= recording.GRACE_SECONDS + 0.01, "the run waits no longer, and nowhere else"
    assert "python run.py track upload a1a1a1a1" in track.told()
    total, left = overview.counted(track.run, track.run.ledger())
    assert 0 < left <= total
    kill_sender(track.run)

    comet.fail = lambda path: None
    monkeypatch.setenv("COMET_URL_OVERRIDE", address)
    lines = list(overview.upload(track.root, ["a1a1"]))
    assert lines[0].startswith("a1a1a1a1 run a1a1: ")
    kept = comet.experiments[RUN]
    assert kept.metrics == values(points(9)), "each point once"
    assert kept.others["sft/steps"] == 9
    assert overview.counted(track.run, track.run.ledger())[1] == 0
    assert list(overview.upload(track.root, [])) == [f"a1a1a1a1 run a1a1: nothing is missing, {total} records"]


def kill_sender(run: RunFolder) -> None:
    """End the sender of a run as a lost machine would."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"preference_tuning.tracking" in words and str(run.path).encode() in words:
                os.kill(int(folder.name), signal.SIGKILL)
    until(lambda: not sender_of(run)())


def test_a_sender_that_is_killed_before_it_notes_what_arrived_repeats_nothing(
    comet: CometServer, tmp_path: Path
) -> None:
    """The worst moment: Comet has the points, and the record of it is not written."""
    track = tracking(tmp_path)
    comet.fail = lambda path: (
        "hang" if path.endswith("write/experiment/log-other") and comet.experiments[RUN].points else None
    )
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(4))
        until(lambda: RUN in comet.experiments and bool(comet.experiments[RUN].points))
    kill_sender(track.run)
    ledger = track.run.ledger()
    ledger.metrics, ledger.unsure_since = {}, time.time()  # as it was before it could be written
    ledger.save()
    comet.fail = lambda path: None
    sending.upload(track.run)
    assert comet.experiments[RUN].metrics == values(points(4))


def test_a_sender_finds_its_end_when_its_run_was_killed(comet: CometServer, tmp_path: Path) -> None:
    run = dead_run(tmp_path, points(3))
    sending.start(run)
    until(lambda: RUN in comet.experiments and comet.experiments[RUN].state == "crashed")
    until(lambda: not sender_of(run)())
    assert comet.experiments[RUN].metrics == values(points(3))


def test_a_sender_does_not_stay_for_ever(comet: CometServer, tmp_path: Path) -> None:
    comet.fail = lambda path: "hang"
    run = dead_run(tmp_path, points(3))
    code = f"""
from pathlib import Path
from preference_tuning.tracking import sending
sending.LINGER_SECONDS = 0.3
sending.main("send", Path({str(run.path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 1
    assert overview.counted(run, run.ledger())[1] > 0, "what it left is still to be uploaded"


def dead_run(folder: Path, found: list[Point]) -> RunFolder:
    """Return a run that was killed in its SFT stage."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host, *_ = starter.mark().split()
    run = RunFolder(folder / "tracking" / RUN)
    run.path.mkdir(parents=True)
    about = About(id=RUN, name="killed", mode="online", project="p", starter=f"{host} {gone.stdout.strip()} 1")
    jobs.write_json(run.path / "run.json", about.model_dump(mode="json"))
    write(folder / "job", found)
    run.stage("sft").begin(folder / "job" / "metrics.jsonl")
    return run


def test_a_killed_run_keeps_its_metrics_when_another_continues_its_job(tmp_path: Path) -> None:
    """The second run writes on in the same spool: its points are not those of the first."""
    killed = dead_run(tmp_path, points(3))
    track = tracking(tmp_path, "b2" * 16, mode="off")
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(6)[2:], resume_at=2)
    assert killed.stage("sft").points() == points(3)
    assert track.run.stage("sft").points() == points(6), "the experiment of a run is whole: resumed points belong to it"


def test_a_stage_that_fails_ends_the_run_and_says_why(comet: CometServer, tmp_path: Path) -> None:
    track = tracking(tmp_path)
    with pytest.raises(PreferenceTuningError, match="no room"):
        fail(track, tmp_path / "job", points(2), PreferenceTuningError("no room in /home/me/outputs"))
    until(lambda: RUN in comet.experiments and comet.experiments[RUN].state == "crashed")
    kept = comet.experiments[RUN]
    assert kept.metrics == values(points(2))
    assert (kept.others["run/status"], kept.others["run/reason"]) == ("failed", "no room in /home/me/outputs")


def test_a_key_that_comet_refuses_later_is_said_and_ends_the_sender(
    comet: CometServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMET_API_KEY", "no-such-key-canary")
    track = tracking(tmp_path)
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(2))
    finish(track)
    assert "Comet does not know the key in COMET_API_KEY" in track.told()
    with pytest.raises(ConfigError, match="does not know the key"):
        list(overview.upload(track.root, []))
    assert "canary" not in "".join(path.read_text() for path in track.run.path.glob("*.*"))


# --- other ways -----------------------------------------------------------------------------------------------------


def test_off_sends_nothing_and_can_be_uploaded_by_name_alone(tmp_path: Path, comet: CometServer) -> None:
    track = tracking(tmp_path, mode="off")
    with track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(2))
    track.close()
    assert (track.told(), track.links(), comet.paths, track.run.archives()) == ("off", {}, [], [])
    assert next(iter(overview.upload(track.root, []))).startswith("no run is tracked")
    list(overview.upload(track.root, [RUN[:6]]))
    assert comet.experiments[RUN].metrics == values(points(2))


def test_a_null_tracker_takes_everything(tmp_path: Path) -> None:
    track = tracking(tmp_path, mode="off")
    with track.stage("sft") as stage:
        stage.add(Told(parameters={"a": 1}, others={"b": 2}, tables={"t.csv": [["x"]]}))
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(2))
    ledger = track.run.ledger()
    session = delivery.Session(track.run, Null(), ledger)
    assert session.send() == 4 + 4 + 2 + 1
    session.beat()
    session.end(failed=False)
    assert overview.counted(track.run, ledger) == (11, 0)
    assert Null().known({"a"}) == Known()


def test_an_evaluation_against_a_newer_champion_goes_on_behind_the_first(tmp_path: Path) -> None:
    track = tracking(tmp_path, mode="off")
    for folder, value in (("first", 1.0), ("first", 1.0), ("second", 2.0)):
        write(tmp_path / folder, [Point(step=0, metrics={"evaluation/dpo/nll/chosen": value})], resume_at=-1)
        track.add("evaluation", Told(spool=tmp_path / folder / "metrics.jsonl"))
    name = "evaluation/dpo/nll/chosen"
    assert series(track.run.stage("evaluation").points(), name) == [(0, 1.0), (1, 2.0)]


def test_the_command_line_lists_runs_and_knows_their_names(tmp_path: Path) -> None:
    for run, name in ((RUN, "sft"), ("b2" * 16, "dpo")):
        track = tracking(tmp_path, run, mode="off")
        with track.stage(name) as stage:
            stage.follow(tmp_path / run)
            write(tmp_path / run, points(2, name))
        track.close()

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, str(ROOT / "run.py"), "track", *words, "--folder", str(tmp_path)]
        return subprocess.run(whole, capture_output=True, text=True, env={**os.environ, "COMET_API_KEY": ""})

    header, *lines = command("list").stdout.splitlines()
    assert header.split() == ["run", "mode", "stands", "records", "in", "Comet", "archived", "name"]
    assert [line.split()[:6] for line in lines] == [
        ["b2b2b2b2", "off", "finished", "9", "0", "0"], ["a1a1a1a1", "off", "finished", "9", "0", "0"],
    ]  # fmt: skip
    for words, message in (
        (("upload", "zz"), "'zz' is no run (2 runs are tracked in "),
        (("upload", "a1"), "COMET_API_KEY is not set"),
    ):
        done = command(*words)
        assert done.returncode == 2
        assert message in done.stderr
    assert KEY not in done.stderr
