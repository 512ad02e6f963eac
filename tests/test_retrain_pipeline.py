"""`run.py retrain` in real processes with ZenML: stopped, killed, started twice, and with nothing to do."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_faults_pipeline import Folder, World, two_points

from preference_tuning.retraining.history import History

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), tiny_model)
    yield made
    made.commands.close()


def start(world: World, folder: Folder) -> int:
    return world.commands.start(folder.path, "retrain", "run.yaml", "--json", "--trigger", "night")


def told(folder: Folder) -> list[dict[str, Any]]:
    """Return the lines of JSON that were printed, of all starts."""
    return [json.loads(line) for line in folder.said().splitlines() if line.startswith('{"id"')]


def test_stopped_killed_started_twice_and_nothing_to_do(world: World) -> None:
    folder = world.folder("retrained")
    history = History(folder.outputs)

    stopped = start(world, folder)
    folder.wait_until(stopped, lambda: two_points(folder, "sft"))
    assert folder.end(stopped, signal.SIGTERM) == 75, folder.said()
    assert [run.outcome for run in history.runs()] == ["interrupted"]

    first = start(world, folder)
    folder.wait_until(first, lambda: two_points(folder, "dpo"))
    assert world.commands.wait(start(world, folder)) == 75
    assert f"already running: pid {first} on " in told(folder)[-1]["reason"]
    assert folder.end(first, signal.SIGKILL) == -signal.SIGKILL
    assert [run.outcome for run in history.runs()] == ["interrupted", "killed", "locked"]

    assert world.commands.wait(start(world, folder)) == 0, folder.said()
    done = told(folder)[-1]
    assert done["outcome"] == ("promoted" if done["result"]["promoted"] else "held")
    assert done["result"]["version"] == folder.version()["id"]
    for stage in ("sft", "dpo"):
        record = json.loads(folder.one(f"registry/*/versions/*/evidence/{stage}/record.json").read_text())
        assert record["resumed_at"], f"{stage} goes on where it was ended"
        steps = [point["step"] for point in folder.metrics(stage) if f"{stage}/train/loss" in point["metrics"]]
        assert steps == list(range(1, record["max_steps"] + 1)), "no gap, no duplicate"
    assert world.statuses() == ["failed", "failed", "completed"]
    assert all(name.startswith("preference-tuned-night-") for (name,) in world.rows("select name from pipeline_run"))
    tagged = "select count(*) from tag_resource r join tag t on t.id = r.tag_id where t.name = 'night'"
    assert world.rows(tagged)[0][0] >= 3

    assert world.commands.wait(start(world, folder)) == 10
    assert folder.finish() == 0, "train has no lock and skips nothing"
    assert world.commands.wait(start(world, folder)) == 10
    runs = history.runs()
    outcomes = ["interrupted", "killed", "locked", "held", "skipped", "held", "skipped"]
    assert [run.outcome.replace("promoted", "held") for run in runs] == outcomes
    assert [run.trigger for run in runs] == ["night"] * 5 + ["manual", "night"]
    assert runs[5].fingerprints == runs[3].fingerprints
    assert len(world.statuses()) == 4, "a night without news makes no run in ZenML"
