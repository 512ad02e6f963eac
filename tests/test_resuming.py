"""`run.py resume` after real runs that were stopped and killed, and what a run leaves for its watchers."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import preference_rows, write_jsonl
from test_faults_pipeline import Folder, World, two_points

from preference_tuning.retraining.history import History

pytestmark = pytest.mark.whole

KEEP = "import os, sys; open('told.jsonl', 'a').write(sys.stdin.read() + '\\n'); assert os.environ['PREFERENCE_TUNING_TEXT']"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), tiny_model)
    yield made
    made.commands.close()


def do(world: World, folder: Folder, *words: str) -> int:
    """Do a command to its end, alone on the terminal."""
    (folder.path / "terminal.txt").unlink(missing_ok=True)
    return world.commands.wait(world.commands.start(folder.path, *words))


def last_line(folder: Folder) -> str:
    return folder.said().strip().splitlines()[-1]


def of_last_run(world: World) -> tuple[str, dict[str, str], set[str], dict[str, Any]]:
    """Return the name of the last run, the status of its steps, its tags and its metadata."""
    ((run, name),) = world.rows("select id, name from pipeline_run order by created desc limit 1")
    steps = dict(world.rows(f"select name, status from step_run where pipeline_run_id = '{run}'"))
    tags = world.rows(f"select t.name from tag_resource r join tag t on t.id = r.tag_id where r.resource_id = '{run}'")
    facts = world.rows(
        "select m.key, m.value from run_metadata m join run_metadata_resource r on r.run_metadata_id = m.id "
        f"where r.resource_id = '{run}'"
    )
    return name, steps, {tag for (tag,) in tags}, {key: json.loads(value) for key, value in facts}


def test_a_stopped_run_goes_on_from_its_last_completed_step(world: World) -> None:
    folder = world.folder("stopped", notify=[{"to": "command", "run": [sys.executable, "-c", KEEP]}])
    pid = folder.start("--no-cache")
    folder.wait_until(pid, lambda: two_points(folder, "dpo"))
    assert folder.end(pid, signal.SIGTERM) == 75
    name = of_last_run(world)[0]
    assert name.startswith("preference-tuned-manual-")
    assert f"failed     train_dpo of {name}: " in last_line(folder)
    assert last_line(folder).endswith(f"Continue: the same command again, or python run.py resume {name}")
    assert not (folder.path / "told.jsonl").exists(), "who stopped it knows"

    assert do(world, folder, "resume") == 0, folder.said()
    assert f"resume     {name}: load_preferences, train_sft kept\n" in folder.said()
    resumed, steps, tags, facts = of_last_run(world)
    assert resumed.startswith("preference-tuned-resume-")
    assert steps == {
        "load_preferences": "skipped", "train_sft": "skipped", "train_dpo": "completed", "evaluate": "completed",
        "register": "completed",
    }  # fmt: skip
    record = json.loads(folder.one("registry/*/versions/*/evidence/dpo/record.json").read_text(encoding="utf-8"))
    assert record["resumed_at"], "also a run with --no-cache goes on from its checkpoint"
    version = folder.version()
    assert version["run"]["zenml_run"] == resumed
    decision = version["verdict"]["decision"]
    assert tags == {"dpo", "preference-tuned", "rows", "resume", decision}
    assert facts["data"]["fingerprint"] == version["data"]["fingerprint"]
    assert (facts["data"]["training_pairs"], facts["settings"]["dpo_beta"]) == (version["data"]["train"], 0.1)
    assert facts["training"]["sft"]["steps"] > 0
    assert (facts["quality"]["verdict"], facts["registry"]["version"]) == (decision, version["id"])
    assert Path(facts["registry"]["report"]).is_file()
    outcomes = [(run.trigger, run.outcome.replace("promoted", "held")) for run in History(folder.outputs).runs()]
    assert outcomes == [("manual", "interrupted"), ("resume", "held")]

    (told,) = [json.loads(line) for line in (folder.path / "told.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (told["version"], told["decision"], told["run"]) == (version["id"], decision, resumed)
    assert (
        told["links"]["report"]
        == f"{folder.outputs / 'registry'}/preference-tuned/versions/{version['id']}/evidence/evaluation/report.html"
    )
    assert any("[" in shown for row in told["figures"].values() for shown in row.values()), "with intervals"
    page = (folder.outputs / "registry-preference-tuned.html").read_text(encoding="utf-8")
    assert version["id"] in page

    assert do(world, folder, "resume") == 2
    assert "no run that was started in" in folder.said()
    assert do(world, folder, "resume", resumed) == 2
    assert f"resume: run {resumed} is completed; there is nothing to resume" in folder.said()
    assert do(world, folder, "resume", "never-ran") == 2
    assert "there is no run 'never-ran'" in folder.said()


def test_steps_whose_result_would_be_another_now_run_again(world: World) -> None:
    """Killed in the evaluation; then the data changes. ZenML's own replay would skip what was done on the old."""
    data = write_jsonl(world.root / "grows.jsonl", preference_rows(64))
    folder = world.folder("grows", data={"source": str(data)}, sft={"num_train_epochs": 1, "seed": 3})
    pid = folder.start()
    folder.await_phase(pid, "evaluate")
    assert folder.end(pid, signal.SIGKILL, alone=False) == -signal.SIGKILL
    name = of_last_run(world)[0]

    write_jsonl(data, preference_rows(72))
    elsewhere = world.folder("elsewhere")
    assert do(world, elsewhere, "resume", name) == 2
    assert f"was started in {folder.path}; resume it there" in elsewhere.said()
    assert do(world, folder, "resume", name) == 0, folder.said()
    assert f"resume     {name}: nothing kept\n" in folder.said()
    assert "load_preferences, train_sft, train_dpo once more: code, data, base model or settings" in folder.said()
    steps = of_last_run(world)[1]
    assert set(steps.values()) == {"completed"}
    assert folder.version()["data"]["train"] + folder.version()["data"]["held_out"] == 72


def test_a_failure_is_told_and_its_run_goes_on_when_the_cause_is_gone(world: World) -> None:
    """Something lies where the jobs' folder is to be, and nothing looks there before."""
    folder = world.folder(
        "failing",
        finetuning_type="sft",
        data={"seed": 7},  # nothing of it is in the step cache
        notify=[{"to": "command", "run": [sys.executable, "-c", KEEP], "on": ["failed"]}, {"to": "alerter"}],
    )
    folder.outputs.mkdir()
    (folder.outputs / "jobs").write_text("in the way")
    assert folder.finish() == 2
    name, steps, _, facts = of_last_run(world)
    assert steps == {"load_preferences": "completed", "train_sft": "failed"}
    assert "Traceback" not in folder.said()
    assert last_line(folder).startswith(f"failed     train_sft of {name}: ")
    assert last_line(folder).endswith(f"Mend it, then: python run.py resume {name}")
    assert facts["failure"]["then"] == last_line(folder).removeprefix("failed     ")
    (told,) = [json.loads(line) for line in (folder.path / "told.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (told["outcome"], told["exit_code"], told["then"]) == ("failed", 2, facts["failure"]["then"])
    assert "warning: notify.1 (alerter): the active stack has no alerter" in folder.said()

    (folder.outputs / "jobs").unlink()
    assert do(world, folder, "resume") == 0, folder.said()
    assert of_last_run(world)[1]["load_preferences"] == "skipped"

    document = yaml.safe_load((folder.path / "run.yaml").read_text(encoding="utf-8"))
    document["parameters"]["data"]["source"] = "nowhere.jsonl"
    (folder.path / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert folder.finish() in (2, 3)
    assert last_line(folder).startswith("failed     before the run began: ")
    assert last_line(folder).endswith("Mend it, then: the same command again")
