"""Comet's offline archives of a real run: each value is that of the spool, `comet upload` takes them, no secret is in them."""

import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import comet_ml
import jsonschema
import pytest
import yaml
from comet_server import CometServer
from conftest import Finished
from test_tracking import RUN, points, tracking, values, write

from preference_tuning.tracking import delivery, overview, sending
from preference_tuning.tracking.folder import RunFolder
from preference_tuning.tracking.recording import Told
from preference_tuning.tracking.spool import read

SCHEMAS = Path(comet_ml.__file__).parent / "schemas"
SCHEMA_OF = {
    "metric_msg": "metric-msg", "parameter_msg": "parameter-msg", "log_other": "log-other-msg", "file_upload": "file-upload-msg",
}  # fmt: skip
STAGES = ["data", "dpo", "evaluation", "registry", "run", "sft"]


class Opened:
    """What lies in an archive, every message checked against Comet's own schemas."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self.about = json.loads(archive.read("experiment.json"))
            messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
            self.raw = b"".join(archive.read(name) for name in archive.namelist())
            check("experiment", self.about)
            self.types = {message["type"] for message in messages}
            of_type: dict[str, list[Any]] = {name: [] for name in SCHEMA_OF}
            for message in messages:
                check(SCHEMA_OF[message["type"]], message["payload"])
                of_type[message["type"]].append(message["payload"])
            self.files = {
                payload["additional_params"].get("fileName") or payload["additional_params"]["figName"]: archive.read(payload["file_path"])
                for payload in of_type["file_upload"]
            }  # fmt: skip
        logged = [payload["metric"] for payload in of_type["metric_msg"]]
        own = [m for m in logged if m["metricName"] != "process duration"]  # Comet's
        self.metrics = {(m["metricName"], m["step"]): m["metricValue"] for m in own}
        assert len(self.metrics) == len(own), "a point is there once"
        self.parameters = {p["param"]["paramName"]: p["param"]["paramValue"] for p in of_type["parameter_msg"]}
        self.others = {payload["key"]: payload["value"] for payload in of_type["log_other"]}


def check(kind: str, payload: Any) -> None:
    jsonschema.validate(payload, json.loads((SCHEMAS / f"offline-{kind}.schema.json").read_text(encoding="utf-8")))


def opened(run: RunFolder) -> dict[str, Opened]:
    return {path.stem: Opened(path) for path in run.archives()}


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> Iterator[CometServer]:
    server = CometServer()
    monkeypatch.setattr(delivery, "SETTLE_SECONDS", 0.0)
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(finished: Finished) -> RunFolder:
    return RunFolder(finished.project.folder / "outputs" / "tracking" / finished.run["id"])


def test_each_value_of_a_run_is_that_of_the_spool(finished: Finished, run: RunFolder) -> None:
    archives = opened(run)
    assert list(archives) == STAGES
    for stage, archive in archives.items():
        assert archive.about["offline_id"] == finished.run["id"], "one experiment"
        assert (archive.about["project_name"], archive.about["resume_strategy"]) == (
            "preference-tuning",
            "get_or_create",
        )
        assert archive.types <= set(SCHEMA_OF), "nothing but what was handed over"
        assert {name.split("/")[0] for name, _ in archive.metrics} <= {stage}
    for stage, step in (("sft", "train_sft"), ("dpo", "train_dpo"), ("evaluation", "evaluate")):
        output = "evaluation" if stage == "evaluation" else f"{stage}_evidence"
        artifact = Path(finished.run["steps"][step]["outputs"][output]) / "content" / "metrics.jsonl"
        assert archives[stage].metrics == values(list(read(artifact))), "every point, and no other"
    names = {name for archive in archives.values() for name, _ in archive.metrics}
    assert {"sft/train/loss", "sft/eval/loss", "dpo/train/rewards/margins", "dpo/eval/rewards/accuracies"} <= names
    assert {
        "evaluation/base/nll/chosen",
        "evaluation/dpo/rewards/accuracies",
        "evaluation/dpo/generation/length",
    } <= names


def test_an_experiment_says_all_of_its_run(finished: Finished, run: RunFolder) -> None:
    archives = opened(run)
    parameters = archives["run"].parameters
    config = yaml.safe_load((finished.project.folder / "run.yaml").read_text(encoding="utf-8"))["parameters"]
    assert parameters["dpo/beta"] == str(config["dpo"]["beta"])
    assert parameters["lora/rank"] == "8"
    assert parameters["base_model/source"] == Path(config["base_model"]["source"]).name
    assert {name.split("/")[0] for name in parameters} == {
        "base_model", "data", "dpo", "evaluation", "finetuning_type", "lora", "output_dir", "registry", "sft", "tracking", "training",
    }  # fmt: skip
    steps, others = finished.run["steps"], {k: v for a in archives.values() for k, v in a.others.items()}
    assert others["data/fingerprint"] == steps["load_preferences"]["metadata"]["fingerprint"]
    assert others["data/train"] == int(steps["load_preferences"]["metadata"]["train"])
    assert others["dpo/reference/sft_adapter_hash"] == others["sft/adapter_hash"]
    assert (others["evaluation/verdict"], others["registry/decision"]) == ("promote", "promote")
    assert others["evaluation/reason"] == steps["evaluate"]["metadata"]["reason"]
    assert others["registry/version"] == steps["register"]["metadata"]["version"]
    assert others["registry/promoted"] is True
    assert (others["Name"], others["zenml/run"], others["zenml/run_id"]) == (
        *2 * (finished.run["name"],),
        finished.run["id"],
    )
    for name, step in steps.items():
        assert step["metadata"]["comet/experiment"] == finished.run["id"], name
        assert step["metadata"]["comet/archives"] == f"outputs/tracking/{finished.run['id']}/archives"
    files = {name: content for archive in archives.values() for name, content in archive.files.items()}
    assert files["evaluation/samples.csv"].startswith(b"prompt,chosen,base,sft,dpo,")
    assert files["evaluation/samples.csv"].count(b"Tell me about") == 2
    assert files["evaluation/verdict.csv"].startswith(b"rule,measured,wanted,outcome\n")
    for stage in ("data", "sft", "dpo", "evaluation"):
        assert b"<!doctype html>" in files[f"{stage}/report.html"]
        charts = [content for name, content in files.items() if name.startswith(f"{stage}/") and name.endswith(".svg")]
        assert charts
        for chart in charts:
            assert ElementTree.fromstring(chart).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"held out" in files["dpo/Loss (dashed ln 2).svg"], "with the key of its colours"


def test_comet_upload_takes_them_and_nothing_is_sent_again(
    run: RunFolder, comet: CometServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that the summary prints, against a server; then our own upload of the same run."""
    command = [str(Path(sys.executable).parent / "comet"), "upload", *map(str, reversed(run.archives()))]
    done = subprocess.run(command, env={**os.environ, **comet.environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = comet.experiments.values()
    expected = values([p for stage in run.stages() for p in stage.points()])
    own = {key: value for key, value in kept.metrics.items() if key[0] != "process duration"}
    assert own == expected
    assert kept.others["Name"] == run.about.name
    assets = sorted(name for name, _ in kept.assets)
    assert assets == sorted(asset.name for stage in run.stages() for asset in stage.contents().assets)
    for name, value in comet.environment.items():
        monkeypatch.setenv(name, value)
    total, left = overview.counted(run, run.ledger())
    assert left == total, "nothing here knows of it"
    list(overview.upload(run.path.parent, [run.about.id]))
    assert {key: value for key, value in kept.metrics.items() if key[0] != "process duration"} == expected
    assert sorted(name for name, _ in kept.assets) == assets
    assert overview.counted(run, run.ledger()) == (total, 0)


def test_an_online_run_from_the_cache_is_whole_in_comet(finished: Finished, comet: CometServer) -> None:
    """Also: a wrong key ends the run before it begins."""
    project = finished.project
    done = project.run("run.py", "train", "run.yaml", **{**comet.environment, "COMET_API_KEY": "wrong-key-canary"})
    assert done.returncode == 2
    assert "error: COMET_API_KEY: Comet does not accept this key" in done.stderr
    assert "canary" not in done.stdout + done.stderr
    done = project.run("run.py", "train", "run.yaml", **comet.environment)
    assert done.returncode == 0, done.stderr
    stored = project.last_run()
    assert stored["id"] != finished.run["id"]
    run = RunFolder(project.folder / "outputs" / "tracking" / stored["id"])
    with run.sole(patience=60):
        kept = comet.experiments[stored["id"]]
        assert kept.metrics == values([p for stage in run.stages() for p in stage.points()])
    first = RunFolder(run.path.parent / finished.run["id"])
    assert [values(stage.points()) for stage in run.stages()] == [values(stage.points()) for stage in first.stages()]
    assert kept.state == "finished"
    assert f"comet      http://comet/somebody/preference-tuning/{stored['id']}" in done.stdout
    assert not run.archives()


def test_archives_never_overwrite_each_other(tmp_path: Path) -> None:
    """Neither those of stages or runs that seed alike, nor a later one of the same stage."""
    for run in (RUN, "b2" * 16):
        track = tracking(tmp_path, run, mode="offline")
        for stage in ("sft", "dpo"):
            write(tmp_path / run / stage, points(3, stage))
            track.add(stage, Told(spool=tmp_path / run / stage / "metrics.jsonl"))
        random.seed(42)
        sending.archive(track.run)
        write(tmp_path / run / "dpo", points(5, "dpo"))
        track.run.stage("dpo").keep(points(3, "dpo"))
        track.run.stage("dpo").begin(tmp_path / run / "dpo" / "metrics.jsonl")
        random.seed(42)
        sending.archive(track.run)
        sending.archive(track.run)
        found = opened(track.run)
        assert sorted(found) == ["dpo", "dpo-2", "run", "sft"]
        assert found["dpo"].metrics == values(points(3, "dpo"))
        assert found["dpo-2"].metrics == values(points(5, "dpo")[3:]), "what the first lacks, and no more"
        assert {archive.about["offline_id"] for archive in found.values()} == {run}


def test_a_stage_that_fails_leaves_an_archive_of_what_there_is(tmp_path: Path) -> None:
    track = tracking(tmp_path, mode="offline")
    with pytest.raises(KeyboardInterrupt), track.stage("sft") as stage:
        stage.follow(tmp_path / "job")
        write(tmp_path / "job", points(2))
        raise KeyboardInterrupt
    found = opened(track.run)
    assert found["sft"].metrics == values(points(2))
    assert found["run"].others["run/status"] == "failed"
    assert track.told() == f"comet upload {track.run.path}/archives/*.zip"


# --- what comet_ml would log by itself ------------------------------------------------------------------------------

CANARIES = {
    "environment": "env-canary-1111", "argv": "argv-canary-2222", "git": "git-canary-3333", "yaml": "yaml-canary-4444",
}  # fmt: skip


@pytest.fixture
def exposed(tmp_path: Path) -> dict[str, Any]:
    """A project under git with secrets wherever secrets lie about, and how a command runs in it."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "preference_tuning").symlink_to(Path(__file__).parent.parent / "preference_tuning")
    (project / "run.py").write_text("print('ours')\n")

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e", *words],
            check=True,
            capture_output=True,
        )

    git("init", "-b", "trunk")
    git("add", "run.py")
    git("commit", "-m", "first")
    git("remote", "add", "origin", f"https://me:{CANARIES['git']}@git.host/owner/repo.git?token={CANARIES['git']}")
    (project / "run.py").write_text(f"print('ours and {CANARIES['environment']}')\n")
    return {"project": project, "folder": tmp_path / "outputs"}


def a_run(exposed: dict[str, Any], log: list[str]) -> RunFolder:
    """Track a run in a process of its own, as a step would, and return what it left."""
    code = f"""
import os, subprocess, sys
from pathlib import Path
from preference_tuning import fingerprint
from preference_tuning.config import TrackingConfig
from preference_tuning.tracking.recording import Told, Tracking
from preference_tuning.tracking.spool import Point, Spool
fingerprint.PACKAGE = Path({str(exposed["project"])!r}) / "preference_tuning"
settings = {{"data": {{"source": "https://me:{CANARIES["yaml"]}@host/rows.jsonl?token={CANARIES["yaml"]}"}}, "output_dir": "/home/me/out"}}
folder = Path({str(exposed["folder"])!r})
track = Tracking(folder / "tracking", TrackingConfig(mode="offline", log={log!r}), {RUN!r}, "a run", settings)
with track.stage("sft") as stage:
    stage.follow(folder / "job")
    (folder / "job").mkdir(parents=True)
    spool = Spool(folder / "job" / "metrics.jsonl")
    spool.append(Point(step=1, metrics={{"sft/train/loss": 0.5}}))
    print("said by the step")
    subprocess.run([sys.executable, "-c", "print('said by the job, to " + os.environ["HF_TOKEN"] + "')"])
    stage.add(Told(others={{"sft/fact": "of " + os.environ["HF_TOKEN"]}}))
print("said later")
track.close()
"""
    environment = {**os.environ, "HF_TOKEN": CANARIES["environment"], "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code, "train", "run.yaml", f"--set=x={CANARIES['argv']}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=exposed["project"])
    assert done.returncode == 0, done.stderr
    assert "said by the step\n" in done.stdout, "what is copied is shown as well"
    assert "said by the job" in done.stdout
    return RunFolder(exposed["folder"] / "tracking" / RUN)


def everything(run: RunFolder) -> str:
    """Return all that lies in a run's folder, archives unpacked."""
    plain = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.suffix != ".zip")
    return (plain + b"".join(archive.raw for archive in opened(run).values())).decode(errors="replace")


def test_nothing_is_logged_unasked_and_no_secret_ever(exposed: dict[str, Any]) -> None:
    run = a_run(exposed, [])
    told = everything(run)
    assert "sft/train/loss" in told
    for secret in (
        *CANARIES.values(),
        "said by",
        "/home/me",
        "trunk",
        "git.host",
        os.uname().nodename + '"',
        "installed_packages",
    ):
        if secret.endswith('"'):
            told = "".join(archive.raw.decode() for archive in opened(run).values())
        assert secret not in told, secret
    assert opened(run)["run"].others.keys() == {"Name", "zenml/run", "zenml/run_id", "run/status", "offline_experiment"}


def test_what_is_asked_for_is_logged_without_secrets(exposed: dict[str, Any]) -> None:
    run = a_run(exposed, ["code", "git", "environment", "output", "command_line"])
    archives = opened(run)
    others, files = archives["run"].others, archives["run"].files
    assert others["command_line"].endswith(f"train run.yaml --set=x={CANARIES['argv']}"), (
        "asked for, and told as it was"
    )
    assert others["git/branch"] == "trunk"
    assert others["git/origin"] == "https://git.host/owner/repo.git"
    assert len(others["git/commit"]) == 40
    assert b"+print('ours and ***')" in files["git/changes.patch"]
    assert others["environment/host"] == os.uname().nodename
    assert b"comet-ml==" in files["environment/packages.txt"].lower().replace(b"_", b"-")
    with zipfile.ZipFile(run.path / "stages" / "run" / "files" / "code.zip") as code:
        assert "run.py" in code.namelist()
    assert archives["sft"].files["sft/output.txt"] == b"said by the step\nsaid by the job, to ***\n"
    told = everything(run)
    for kind in ("environment", "git", "yaml"):
        assert CANARIES[kind] not in told, kind


@pytest.mark.parametrize("asked", ["code", "git", "environment", "output", "command_line"])
@pytest.mark.faults
def test_each_switch_is_its_own(asked: str, exposed: dict[str, Any]) -> None:
    run = a_run(exposed, [asked])
    contents = [stage.contents() for stage in run.stages()]
    told = {name for found in contents for name in (*found.others, *(asset.name for asset in found.assets))}
    signs = {"code": "code.zip", "git": "git/commit", "environment": "environment/host", "output": "sft/output.txt", "command_line": "command_line"}  # fmt: skip
    assert {kind for kind, sign in signs.items() if sign in told} == {asked}
