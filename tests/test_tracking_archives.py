"""Comet's offline archives: none is overwritten, and there is nothing in them that was not asked for, and no secret.

Those of a real run are looked at in test_pipeline.py.
"""

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from comet_archives import opened
from test_tracking import RUN, fail, points, tracking, values, write

from preference_tuning.tracking import sending
from preference_tuning.tracking.folder import RunFolder
from preference_tuning.tracking.recording import Told


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
    with pytest.raises(KeyboardInterrupt):
        fail(track, tmp_path / "job", points(2), KeyboardInterrupt())
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
