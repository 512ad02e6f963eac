"""Retraining: the lock, the decision, the fingerprints and the history, each with its real parts; nothing is trained."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import preference_rows, tiny_parameters, write_jsonl
from in_process import run_here

import run as command_line
from preference_tuning import config as configs
from preference_tuning import fingerprint, interruption, jobs
from preference_tuning.config import RetrainConfig, RunConfig
from preference_tuning.config.retrain import duration
from preference_tuning.data import job as data_job
from preference_tuning.errors import AlreadyRunningError, ConfigError, DataError, DivergedError
from preference_tuning.registry import folder as registry_folder
from preference_tuning.retraining import fingerprints, lock, shown
from preference_tuning.retraining.attempt import attempt
from preference_tuning.retraining.decision import Completed, decide
from preference_tuning.retraining.fingerprints import Fingerprints
from preference_tuning.retraining.history import History, Record, Result, Run, recorded

MONDAY = datetime(2026, 1, 5, 3, tzinfo=UTC)
MADE_OF = Fingerprints(data="d", dataset="s", config="c", code="k", base_model="b")


Start = Callable[[Callable[[], Any]], int]


@pytest.fixture
def in_child() -> Iterator[Start]:
    """Do something in a forked process, which then waits for ever; its pid is told when it is done."""
    children = []

    def start(act: Callable[[], Any]) -> int:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                kept = act()
                os.write(write, b".")
                while kept is not children:
                    signal.pause()
            finally:
                os._exit(1)
        children.append(child)
        os.close(write)
        assert os.read(read, 1) == b"."
        os.close(read)
        return child

    yield start
    for child in children:
        kill(child)


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- the decision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "new_rows", "hours", "settings", "train", "reason"),
    [
        ({}, 0, 24, {}, False, "data, config, code and base model are those of the run of 2026-01-0"),
        ({}, 0, 24, {"max_age": "1d"}, True, "the last run is 24 hours old (retrain.max_age: 1d)"),
        ({}, 0, 23.9, {"max_age": "1d"}, False, "are those of"),
        ({"data": "e"}, 1, 24, {}, True, "1 new pair"),
        ({"data": "e"}, 0, 24, {}, True, "the data changed, without a new pair"),
        ({"data": "e"}, 9, 24, {"min_new_rows": 10}, False, "9 new pairs (retrain.min_new_rows: 10)"),
        ({"data": "e"}, 10, 24, {"min_new_rows": 10}, True, "10 new pairs"),
        ({"data": "e"}, 9, 48, {"min_new_rows": 10, "max_age": "2d"}, True, "the last run is 2 days old"),
        ({"data": "e"}, None, 24, {"min_new_rows": 10}, True, "changed: data"),
        ({"data": "e", "config": "x"}, 1, 24, {"min_new_rows": 10}, True, "changed: data, config"),
        ({"base_model": "x", "code": "y"}, 0, 24, {"min_new_rows": 10}, True, "changed: code, base model"),
        ({"config": "x"}, 0, 5, {"min_interval": "6h"}, False, "the last run is 5 hours old (retrain.min_interval: 6h)"),
        ({"config": "x"}, 0, 6, {"min_interval": "6h"}, True, "changed: config"),
        ({"dataset": "other"}, 0, 24, {}, False, "are those of"),
    ],
)  # fmt: skip
def test_the_decision(
    changed: dict[str, str], new_rows: int | None, hours: float, settings: dict[str, Any], train: bool, reason: str
) -> None:
    last = Completed(MONDAY, MADE_OF, "v", kept=True)
    now = MADE_OF.model_copy(update=changed)
    decision = decide(now, new_rows, last, RetrainConfig(**settings), MONDAY + timedelta(hours=hours))
    assert decision.train == train
    assert reason in decision.reason


def test_without_a_completed_run_or_its_version_it_trains() -> None:
    settings = RetrainConfig(min_new_rows=1000, min_interval="52w")
    assert decide(MADE_OF, None, None, settings, MONDAY).train
    gone = decide(MADE_OF, 0, Completed(MONDAY, MADE_OF, "abc", kept=False), settings, MONDAY)
    assert gone.train
    assert "version abc of the last run is not in the registry" in gone.reason


def test_durations() -> None:
    assert [duration(text) for text in ("90m", "1.5h", "7d", "2w")] == [
        timedelta(minutes=90), timedelta(minutes=90), timedelta(days=7), timedelta(days=14),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"min_interval": 12},
            "min_interval: 12: must be a number with m, h, d or w behind it, such as 90m, 12h or 7d",
        ),
        ({"max_age": "0d"}, "must be a number with m, h, d or w"),
        ({"max_age": "1 day"}, "must be a number with m, h, d or w"),
        ({"max_age": "1d", "min_interval": "2d"}, "max_age: 1d is less than retrain.min_interval (2d)"),
        ({"min_new_rows": -1}, "min_new_rows: -1"),
        ({"min_rows": 1}, "did you mean 'min_new_rows'?"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    parameters = {"base_model": {"source": "org/m"}, "data": {"source": "rows.jsonl"}, "retrain": given}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        configs.load(path)
    assert told in str(refused.value)


def test_the_documentation_has_every_setting_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "retraining.md").read_text(encoding="utf-8")
    table = text.partition("### `retrain`\n")[2].partition("\n#")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line]
    told = {row[0]: row[1] for row in rows if len(row) > 1}
    assert told == {name: str(field.default).lower() for name, field in RetrainConfig.model_fields.items()}


# --- the lock -------------------------------------------------------------------------------------------------------


def test_a_second_start_is_told_who_holds_the_lock(tmp_path: Path, in_child: Start) -> None:
    def hold() -> Any:
        held = lock.held(tmp_path, "m")
        held.__enter__()
        return held  # it is freed with the last reference to it

    child = in_child(hold)
    with pytest.raises(AlreadyRunningError) as refused, lock.held(tmp_path, "m"):
        pass
    assert refused.value.exit_code == 75
    assert f"already running: pid {child} on {socket.gethostname()}, since 20" in str(refused.value)
    with lock.held(tmp_path, "another"):  # names have locks of their own
        pass
    kill(child)
    path = tmp_path / lock.FOLDER / "m.lock"
    assert str(child) in path.read_text(encoding="utf-8"), "it had no time to free its lock"
    with lock.held(tmp_path, "m"):
        assert str(os.getpid()) in path.read_text(encoding="utf-8")
        with pytest.raises(AlreadyRunningError), lock.held(tmp_path, "m"):
            pass
    assert path.read_text(encoding="utf-8") == ""


def test_the_lock_of_another_host_counts_while_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that hosts share, where this kernel knows nothing of the holder."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "OLD_SECONDS", 1.0)
    path = tmp_path / lock.FOLDER / "m.lock"
    path.parent.mkdir()
    path.write_text(lock.Holder(pid=1, host="elsewhere", since=MONDAY).model_dump_json(), encoding="utf-8")
    with pytest.raises(AlreadyRunningError, match="pid 1 on elsewhere"), lock.held(tmp_path, "m"):
        pass
    os.utime(path, (time.time() - 2, time.time() - 2))
    with lock.held(tmp_path, "m"):
        os.utime(path, (time.time() - 2, time.time() - 2))
        time.sleep(0.3)
        assert time.time() - path.stat().st_mtime < 1, "it beats"


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock.held(tmp_path, "m"):
        raise KeyError
    with lock.held(tmp_path, "m"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir: cannot write"), lock.held(tmp_path / "file", "m"):
        pass


# --- the history ----------------------------------------------------------------------------------------------------


def a_run(**facts: Any) -> Run:
    return Run(**{"name": "m", "trigger": "cron", "started": MONDAY, "fingerprints": MADE_OF, **facts})


RESULT = Result(version="abc", promoted=False, decision="hold", reason="no", champion="def")


def test_a_run_is_written_down_at_its_start_and_its_end(tmp_path: Path) -> None:
    history = History(tmp_path / "out")
    assert history.runs() == []
    with recorded(history, a_run(), lambda: MONDAY + timedelta(minutes=3)) as record:
        assert [run.outcome for run in history.runs()] == ["running"]
        record.complete(RESULT)
    with pytest.raises(DivergedError), recorded(history, a_run(name="n")):
        raise DivergedError("NaN")
    with pytest.raises(KeyboardInterrupt), recorded(history, a_run()):
        raise KeyboardInterrupt
    held, diverged, stopped = history.runs()
    assert (held.outcome, held.exit_code, held.result) == ("held", 0, RESULT)
    assert held.ended == MONDAY + timedelta(minutes=3)
    assert (diverged.outcome, diverged.exit_code, diverged.error) == ("failed", 4, "NaN")
    assert (stopped.outcome, stopped.exit_code) == ("interrupted", 75)
    assert history.runs("n") == [diverged]


def test_a_killed_run_shows_as_such(tmp_path: Path, in_child: Start) -> None:
    history = History(tmp_path)
    child = in_child(lambda: Record(history, a_run(process=jobs.starter.mark())))
    assert [(run.outcome, run.lives) for run in history.runs()] == [("running", True)]
    kill(child)
    (run,) = history.runs()
    assert (run.outcome, run.lives) == ("killed", False)
    history.add(a_run(process="elsewhere 1 -"))
    history.add(a_run(process="elsewhere 1 -", locked=True))
    assert [run.outcome for run in history.runs()] == ["killed", "running", "running"]
    # Whoever holds the lock knows that who held it before is gone, on whatever host; of others nothing is known.
    history.settle("other name")
    history.settle("m")
    assert [run.outcome for run in history.runs()] == ["killed", "running", "killed"]
    size = history.path.stat().st_size
    history.settle("m")
    assert history.path.stat().st_size == size, "once"


def test_a_line_cut_short_costs_nothing_but_itself(tmp_path: Path) -> None:
    history = History(tmp_path)
    first = history.add(a_run())
    with history.path.open("ab") as stream:
        stream.write('{"id": "half ä'.encode()[:-1])
    last = history.add(a_run(reason="ü\u2028"))
    assert history.runs() == [first, last]


def test_writers_do_not_disturb_each_other(tmp_path: Path, in_child: Start) -> None:
    history = History(tmp_path)

    def write() -> None:
        for _ in range(50):
            history.add(a_run(reason="x" * 9000))

    for _ in range(3):
        in_child(write)
    assert len(history.runs()) == 150


def test_nights_without_news_do_not_bury_the_list() -> None:
    def night(number: int, **facts: Any) -> Run:
        started = MONDAY + timedelta(days=number)
        return a_run(started=started, ended=started + timedelta(minutes=5), **facts)

    quiet = {"outcome": "skipped", "exit_code": 10, "fingerprints": None}
    runs = [
        night(0, outcome="promoted", result=RESULT, exit_code=0),
        *(night(i, reason="the same", **quiet) for i in range(1, 9)),
        night(9, outcome="locked", reason="already running: pid 1"),
        night(10, outcome="failed", exit_code=3, error="no such file\nat all"),
        night(11, reason="the same", **quiet),
        a_run(started=MONDAY + timedelta(days=12)),
    ]
    lines = shown.history(runs, None, machine=False).splitlines()
    assert lines[0].split() == ["started", "trigger", "took", "data", "version", "outcome"]
    assert "cron" in lines[1]
    assert "5 minutes" in lines[1]
    assert lines[1].endswith("abc      promoted, hold: no")
    assert "2026-01-13" in lines[2]
    assert lines[2].endswith("skipped: the same (8 times in a row)")
    assert lines[4].endswith("failed, exit code 3: no such file")
    assert lines[5].endswith("skipped: the same")
    assert lines[6].endswith("running")
    assert len(shown.history(runs, 2, machine=False).splitlines()) == 3
    machine = [json.loads(line) for line in shown.history(runs, 5, machine=True).splitlines()]
    assert [(row["outcome"], row["times"]) for row in machine] == [
        ("skipped", 8), ("locked", 1), ("failed", 1), ("skipped", 1), ("running", 1),
    ]  # fmt: skip
    assert machine[2]["seconds"] == 300
    assert shown.history([], None, machine=False) == "no run yet"
    assert "name" in shown.history([*runs, a_run(name="other")], None, machine=False).splitlines()[0]


# --- the fingerprints and whole starts --------------------------------------------------------------------------------


class Place:
    """A config with 24 pairs, whose data is prepared in this process and whose training is a note that it was asked for."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.trained, self.time = folder, [], MONDAY
        self.rows = preference_rows(24)
        self.parameters = tiny_parameters(model, self.write(self.rows))
        self.parameters |= {"output_dir": str(folder / "out"), "registry": {"folder": str(folder / "registry")}}

    def write(self, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        return write_jsonl(self.folder / name, rows)

    def config(self, **changes: Any) -> RunConfig:
        sections = dict(self.parameters)
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
        return RunConfig.model_validate(sections)

    def made_of(self, **changes: Any) -> Fingerprints:
        return fingerprints.of(self.config(**changes))

    def train(self, config: RunConfig) -> Result:
        """Leave a version with nothing but its place in the registry."""
        self.trained.append(config)
        version = f"v{len(self.trained)}"
        place = Path(config.registry.folder) / config.registry.name / "versions" / version
        place.mkdir(parents=True)
        (place / registry_folder.MANIFEST).touch()
        jobs.write_json(Path(config.registry.folder) / registry_folder.MARK, registry_folder.FORMAT)
        return RESULT.model_copy(update={"version": version})

    def start(self, after: float = 24, train: Any = None, **changes: Any) -> Run:
        """Start retraining so many hours after the last start."""
        self.time += timedelta(hours=after)
        return attempt(self.config(**changes), "cron", train or self.train, lambda: self.time)

    @property
    def history(self) -> History:
        return History(self.folder / "out")


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(jobs, "run", run_here)
    return Place(tmp_path, tiny_model)


def test_what_counts_as_unchanged(place: Place, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    before = place.made_of()
    template = tmp_path / "template.jinja"
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    same = place.write(place.rows[::-1], "in another order.jsonl")
    (tmp_path / "general.txt").write_text("some text\n")
    for changes in (
        {"data": {"source": str(same)}},
        {"base_model": {"source": str(moved)}},
        {"tracking": {"mode": "off", "tags": ["night"]}},
        {"registry": {"folder": "elsewhere"}},
        {"retrain": {"min_new_rows": 3}},
        {"training": {"retries": 0, "unfinished": "start_over", "save_every_minutes": None}},
    ):
        assert place.made_of(**changes).changed_since(before) == [], changes
    for changes, what in (
        ({"dpo": {"beta": 0.2}}, ["config"]),
        ({"finetuning_type": "sft"}, ["config"]),
        ({"training": {"processes": 2}}, ["config"]),
        ({"evaluation": {"general": str(tmp_path / "general.txt")}}, ["config"]),
        ({"data": {"seed": 7}}, ["data"]),
    ):
        assert place.made_of(**changes).changed_since(before) == what, changes
    by_content = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        by_content.append(fingerprints.of_config(place.config(base_model={"chat_template": str(template)})))
    assert by_content[0] != by_content[1]
    place.write([*place.rows, *preference_rows(30)[24:]])
    assert place.made_of().changed_since(before) == ["data"]
    (moved / "added.json").write_text("{}")
    assert "base model" in place.made_of(base_model={"source": str(moved)}).changed_since(before)
    covered = {path.relative_to(fingerprint.PACKAGE).as_posix() for path in fingerprint.sources(*fingerprints.CODE)}
    assert {"training/trainers.py", "evaluation/gate.py", "data/prepare.py", "registry/folder.py"} < covered


def test_unchanged_sources_are_not_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.start()
    assert (first.outcome, first.reason) == ("held", "no run was completed yet")

    def read(*_: Any) -> None:
        raise AssertionError("the rows were read")

    with monkeypatch.context() as patch:
        patch.setattr(data_job, "prepare_for_run", read)
        assert place.start().outcome == "skipped"
    (again,) = place.history.runs()[1:]
    assert again.fingerprints is None
    assert again.exit_code == 10
    assert len(place.trained) == 1
    place.write([{**row} for row in place.rows[::-1]])
    assert place.start().outcome == "skipped", "other bytes, the same pairs"


def test_a_run_waits_for_its_new_rows(place: Place) -> None:
    place.start()
    grown = preference_rows(34)
    place.write(grown[:30])
    few = place.start(retrain={"min_new_rows": 10})
    assert (few.outcome, few.new_rows) == ("skipped", 6)
    place.write(grown)
    enough = place.start(retrain={"min_new_rows": 10})
    assert (enough.outcome, enough.new_rows, enough.reason) == ("held", 10, "10 new pairs")
    place.write(grown[3:])
    assert place.start(retrain={"min_new_rows": 1}).reason == "0 new pairs (retrain.min_new_rows: 1)"
    assert place.start().reason == "the data changed, without a new pair"
    assert len(place.trained) == 3


def test_a_run_waits_for_its_time(place: Place) -> None:
    place.start()
    change: dict[str, Any] = {"dpo": {"beta": 0.3}}
    assert place.start(5, retrain={"min_interval": "6h"}, **change).outcome == "skipped"
    assert place.start(1, retrain={"min_interval": "6h"}, **change).outcome == "held"
    assert place.start(47, retrain={"max_age": "2d"}, **change).outcome == "skipped"
    assert place.start(1, retrain={"max_age": "2d"}, **change).outcome == "held"


def test_what_was_not_completed_is_done_again(place: Place) -> None:
    def fail(config: RunConfig) -> Result:
        raise DivergedError("NaN at step 3")

    def break_(config: RunConfig) -> Result:
        raise ZeroDivisionError("a mistake")

    diverged, broken = place.start(train=fail), place.start(train=break_)
    assert (diverged.outcome, diverged.exit_code, diverged.error) == ("failed", 4, "NaN at step 3")
    assert (broken.outcome, broken.exit_code, broken.error) == ("failed", 1, "ZeroDivisionError: a mistake")
    assert place.start().outcome == "held"
    assert place.start().outcome == "skipped"
    (Path(place.parameters["data"]["source"])).unlink()
    missing = place.start()
    assert (missing.outcome, missing.exit_code) == ("failed", 3)
    assert [run.outcome for run in place.history.runs()] == ["failed", "failed", "held", "skipped", "failed"]


def test_unfinished_training_of_yesterdays_data_does_not_stop_tonight(place: Place) -> None:
    """Data grows by itself; a setting is changed by somebody, who is asked (``training.unfinished: refuse``)."""

    def fail(config: RunConfig) -> Result:
        raise DataError("the disk is full")

    def wishes(**changes: Any) -> list[str]:
        place.start(**changes)
        return [config.training.unfinished for config in place.trained]

    place.start(train=fail)
    assert wishes() == ["start_over"], "the same work is continued; nothing else is there to be removed"
    place.write(preference_rows(30))
    assert wishes()[1:] == ["refuse"], "nothing is unfinished"
    place.write(preference_rows(36))
    place.start(train=fail)
    place.write(preference_rows(40))
    assert wishes()[2:] == ["start_over"]
    place.start(train=fail, dpo={"beta": 0.2})
    assert wishes(dpo={"beta": 0.3})[3:] == ["refuse"]
    place.start(train=fail, dpo={"beta": 0.3}, training={"unfinished": "continue"})
    place.write(preference_rows(44))
    assert wishes(dpo={"beta": 0.3}, training={"unfinished": "continue"})[4:] == ["continue"]


def test_a_start_beside_a_run_is_locked(place: Place, in_child: Start) -> None:
    """Beside another start of retraining, and beside a run that somebody started by hand."""
    run = a_run(name="preference-tuned", trigger="manual")
    child = in_child(lambda: Record(place.history, run.model_copy(update={"process": jobs.starter.mark()})))
    beside = place.start()
    assert (beside.outcome, beside.exit_code) == ("locked", 75)
    assert f"already running: pid {child}" in beside.reason
    assert "(manual)" in beside.reason
    kill(child)

    def overlap(config: RunConfig) -> Result:
        assert place.start(0).outcome == "locked"
        return place.train(config)

    assert place.start(train=overlap).outcome == "held"
    assert [run.outcome for run in place.history.runs()] == ["killed", "locked", "held", "locked"]


def test_the_commands(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit codes and what is printed where, as far as nothing is trained."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"parameters": place.parameters}), encoding="utf-8")
    monkeypatch.setattr(interruption, "watch", lambda: None)

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        code: Any = 0
        try:
            command_line.main()
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        return code, out, err

    assert called("history", "--config", str(path)) == (0, "no run yet\n", "")
    place.time = datetime.now(UTC) - timedelta(hours=25)
    place.start()
    code, out, _ = called("retrain", str(path))
    assert code == 10
    assert out.startswith("retrain    skipped: data, config, code and base model are those of the run of ")
    code, out, _ = called("retrain", str(path), "--json", "--trigger", "night")
    (line,) = out.splitlines()
    told = json.loads(line)
    assert (code, told["outcome"], told["exit_code"], told["trigger"]) == (10, "skipped", 10, "night")
    monkeypatch.setenv("PREFERENCE_TUNING_TRIGGER", "airflow")
    with lock.held(tmp_path / "out", "preference-tuned"):
        code, out, _ = called("retrain", str(path), "--json")
    told = json.loads(out)
    assert (code, told["outcome"], told["trigger"]) == (75, "locked", "airflow")
    assert f"already running: pid {os.getpid()}" in told["reason"]
    code, out, err = called("retrain", str(path), "--json", "--set", "data.source=nowhere.jsonl")
    assert (code, json.loads(out)["exit_code"]) == (3, 3)
    assert "error: data.source: no such file" in err
    code, out, err = called("retrain", str(path), "--json", "--set", "dpo.betta=1")
    assert (code, json.loads(out)["outcome"]) == (2, "failed")
    assert "did you mean 'beta'?" in err
    code, out, err = called("retrain", str(path), "--trigger", "a b")
    assert (code, out) == (2, "")
    assert "--trigger" in err
    scheduled = tmp_path / "scheduled.yaml"
    schedule = {"cron_expression": "0 3 * * *"}
    scheduled.write_text(yaml.safe_dump({"parameters": place.parameters, "schedule": schedule}), encoding="utf-8")
    code, _, err = called("retrain", str(scheduled))
    assert (code, "ZenML is to start the runs" in err) == (2, True)
    code, out, _ = called("history", "--config", str(path))
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["cron", "night", "airflow", "airflow"]
    assert out.splitlines()[2].endswith("(2 times in a row)")
    code, out, _ = called("history", "--config", str(path), "--json", "--last", "1")
    assert json.loads(out)["error"].startswith("data.source: no such file")
    assert called("history", "--set", "a=b")[0] == 2
