"""The whole pipeline under fire: killed at any moment, stopped by signals, started again with other settings."""

import json
import os
import random
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import diverging_model, preference_rows, tiny_parameters, write_jsonl
from forked import Commands

pytestmark = pytest.mark.faults

PHASES = {
    "preflight": "runs/*.lock",
    "data": "data/*/job.json",
    "sft": "jobs/sft-*/job.json",
    "dpo": "jobs/dpo-*/job.json",
    "evaluate": "jobs/evaluate-*/job.json",
    "register": "jobs/data-*/*",
}
"""What is written when a phase begins, in the order of the phases."""

KILLS = {"preflight": 3, "data": 1, "sft": 5, "dpo": 5, "evaluate": 3, "register": 3}
LONGEST = {"preflight": 2.0, "data": 0.3, "sft": 1.5, "dpo": 2.0, "evaluate": 1.0, "register": 1.0}
"""Seconds between the beginning of a phase and the kill, at most."""


class World:
    """Folders that share one ZenML store, with a tiny run config in each."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.commands = root, Commands(root / "zenml")
        self._data = write_jsonl(root / "rows.jsonl", preference_rows(64))
        self._model = model

    def folder(self, name: str, **changes: Any) -> "Folder":
        parameters = tiny_parameters(self._model, self._data) | {"tracking": {"mode": "off"}}
        parameters["base_model"]["threads"] = 1
        parameters["sft"]["num_train_epochs"] = 2
        for section, values in changes.items():
            parameters[section] = {**parameters.get(section, {}), **values} if isinstance(values, dict) else values
        folder = Folder(self.root / name, self.commands)
        folder.path.mkdir()
        (folder.path / "run.yaml").write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
        return folder

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask ZenML's database."""
        path = self.root / "zenml" / "local_stores" / "default_zen_store" / "zenml.db"
        with sqlite3.connect(path) as database:
            return database.execute(query).fetchall()

    def statuses(self) -> list[str]:
        """Return the status of every run, the oldest first."""
        return [status for (status,) in self.rows("select status from pipeline_run order by created")]


class Folder:
    """A folder that runs are started in."""

    def __init__(self, path: Path, commands: Commands) -> None:
        self.path, self.outputs, self._commands = path, path / "outputs", commands
        self.started = 0.0

    def start(self, *options: str) -> int:
        (self.path / "terminal.txt").unlink(missing_ok=True)
        self.started = time.time()
        return self._commands.start(self.path, "train", "run.yaml", *options)

    def finish(self, *options: str) -> int:
        return self._commands.wait(self.start(*options))

    def end(self, pid: int, number: signal.Signals, alone: bool = True) -> int:
        """Send a signal to a run, or to it and its jobs, and return how it ended."""
        (os.kill if alone else os.killpg)(pid, number)
        return self._commands.wait(pid)

    def said(self) -> str:
        path = self.path / "terminal.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def await_phase(self, pid: int, phase: str) -> None:
        """Wait until the run is in a phase, or past it."""
        names = list(PHASES)
        patterns = [PHASES[name] for name in names[names.index(phase) :]]
        self.wait_until(pid, lambda: any(self._touched(pattern) for pattern in patterns))

    def wait_until(self, pid: int, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition() and not self._commands.ended(pid):
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def _touched(self, pattern: str) -> bool:
        try:
            return any(path.stat().st_mtime >= self.started for path in self.outputs.glob(pattern))
        except FileNotFoundError:
            return False

    def one(self, pattern: str) -> Path:
        (found,) = self.outputs.glob(pattern)
        return found

    def version(self) -> dict[str, Any]:
        """Return the manifest of the only version."""
        found: dict[str, Any] = json.loads(self.one("registry/*/versions/*/manifest.json").read_text(encoding="utf-8"))
        return found

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Return the points of a stage, as published."""
        spool = self.one(f"registry/*/versions/*/evidence/{stage}/metrics.jsonl")
        return [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), tiny_model)
    yield made
    made.commands.close()


def test_a_run_that_is_killed_twenty_times_ends_as_one_that_is_not(world: World) -> None:
    """Half of the kills take the run alone, and leave its job an orphan; half take its process group."""
    rng = random.Random(7)
    killed = world.folder("killed")
    kills = 0
    for phase, count in KILLS.items():
        longest, wanted = LONGEST[phase], kills + count
        while kills < wanted:
            pid = killed.start()
            killed.await_phase(pid, phase)
            time.sleep(rng.uniform(0, longest))
            code = killed.end(pid, signal.SIGKILL, alone=kills % 2 == 0)
            assert code in (-signal.SIGKILL, 0), killed.said()
            if code == 0:
                longest /= 2  # it came too late, after the end of the run
            else:
                kills += 1
    assert kills == 20
    assert killed.finish() == 0, killed.said()
    whole = world.folder("whole")
    assert whole.finish("--no-cache") == 0, whole.said()

    assert killed.version()["id"] == whole.version()["id"], "the same weights, and one version"
    of_killed, of_whole = (
        {name: file for name, file in folder.version()["model_files"].items() if name != "README.md"}
        for folder in (killed, whole)
    )
    assert of_killed == of_whole, "the card names its run"
    for stage in ("sft", "dpo", "evaluation"):
        assert killed.metrics(stage) == whole.metrics(stage), "no gap, no duplicate, the same floats"
    statuses = world.statuses()
    assert set(statuses) == {"completed", "failed"}, "none is running for ever"
    reasons = world.rows("select status_reason from pipeline_run where status = 'failed'")
    assert all("its process was killed" in reason for (reason,) in reasons)
    assert not list(killed.outputs.glob("jobs/*/checkpoints")), "what only training needed is gone"
    assert not list(killed.outputs.glob("runs/*"))


def test_a_signal_ends_a_run_with_75_wherever_it_comes(world: World) -> None:
    """In the checks, in a job, between two steps, and as Ctrl-C, which reaches the job as well."""
    folder = world.folder("stopped", sft={"seed": 1}, dpo={"seed": 1})
    moments = {
        "in the checks": (lambda: bool(folder.said()), signal.SIGTERM, True),
        "in SFT": (lambda: two_points(folder, "sft"), signal.SIGTERM, True),
        "after SFT": (lambda: bool(list(folder.outputs.glob("jobs/sft-*/result.json"))), signal.SIGTERM, True),
        "in DPO": (lambda: two_points(folder, "dpo"), signal.SIGINT, False),
        "in the evaluation": (
            lambda: bool(list(folder.outputs.glob("jobs/evaluate-*/evidence"))),
            signal.SIGTERM,
            True,
        ),
    }
    before = len(world.statuses()) if (world.root / "zenml").exists() else 0
    for moment, (reached, number, alone) in moments.items():
        pid = folder.start()
        folder.wait_until(pid, reached)
        assert folder.end(pid, number, alone) == 75, f"{moment}: {folder.said()}"
        (line,) = re.findall("^error: .*$", folder.said(), re.MULTILINE)
        assert "the same command continues it" in line
        assert "Traceback" not in folder.said()
        assert not (folder.outputs / "registry").exists()
    assert "completed" not in world.statuses()[before:]
    assert folder.finish() == 0, folder.said()
    assert world.statuses()[before:].count("completed") == 1


def two_points(folder: Folder, stage: str) -> bool:
    spools = list(folder.outputs.glob(f"jobs/{stage}-*/evidence/metrics.jsonl"))
    return bool(spools) and len(spools[0].read_text(encoding="utf-8").splitlines()) > 1


def test_other_settings_beside_unfinished_training_are_refused_or_forced(world: World, tiny_model: Path) -> None:
    """Also: a run that lives is left alone by the next start, and a failure tells the same story in ZenML."""
    folder = world.folder("changed", finetuning_type="sft", sft={"num_train_epochs": 30, "save_steps": 0.02})
    pid = folder.start()
    folder.wait_until(pid, lambda: bool(list(folder.outputs.glob("jobs/sft-*/checkpoints/checkpoint-*"))))

    failing = world.folder("failing", base_model={"source": str(diverging_model(world.root / "broken", tiny_model))})
    assert failing.finish() == 4
    (line,) = re.findall("^error: (.*)$", failing.said(), re.MULTILINE)
    lives, failed = world.statuses()[-2:]
    assert (lives, failed) == ("running", "failed")
    ((told, reason),) = world.rows(
        "select s.exception_info, r.status_reason from step_run s join pipeline_run r on r.id = s.pipeline_run_id "
        "where s.name = 'train_sft' order by s.created desc limit 1"
    )
    assert json.loads(told)["message"] == reason == line
    shown = dict(world.rows("select key, value from run_metadata where key in ('exit_code', 'message', 'checkpoint')"))
    assert {key: json.loads(value) for key, value in shown.items()} == {
        "exit_code": 4,
        "message": line,
        "checkpoint": "none",
    }

    assert folder.end(pid, signal.SIGTERM) == 75
    before = len(world.statuses())
    change = ("--set", "sft.learning_rate=0.0004", "--set", "sft.num_train_epochs=31")
    assert folder.finish(*change) == 2
    assert "sft.learning_rate: 0.003 -> 0.0004; sft.num_train_epochs: 30.0 -> 31.0" in folder.said()
    assert "--force-resume" in folder.said()
    assert len(world.statuses()) == before, "told before anything ran"
    assert folder.finish(*change, "--force-resume") == 0, folder.said()
    record = json.loads(folder.one("registry/*/versions/*/evidence/sft/record.json").read_text(encoding="utf-8"))
    forced = record["forced"]
    assert forced["changed"] == ["sft.learning_rate: 0.003 -> 0.0004", "sft.num_train_epochs: 30.0 -> 31.0"]
    assert record["job"].endswith("-forced")
    report = folder.one("registry/*/versions/*/evidence/sft/report.html").read_text(encoding="utf-8")
    assert "sft.learning_rate: 0.003" in report
    assert record["steps"] == record["max_steps"]
    name = "sft/train/learning_rate"
    rates = {point["step"]: point["metrics"][name] for point in folder.metrics("sft") if name in point["metrics"]}
    warmup = -(-record["max_steps"] // 10)
    for step in range(forced["step"] + 1, record["max_steps"] + 1):
        # The rate of a step is that after the steps before it.
        done = step - 1
        share = done / warmup if done < warmup else (record["max_steps"] - done) / (record["max_steps"] - warmup)
        assert rates[step] == pytest.approx(0.0004 * share), f"step {step}"
