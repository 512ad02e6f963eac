"""The whole pipeline in ZenML on the tiny model, started as a user starts it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hub_server
import pytest
import yaml
from comet_archives import SCHEMA_OF, opened
from comet_server import CometServer
from conftest import ROOT, Finished, Project, diverging_model, make_project, statuses
from test_tracking import values

from preference_tuning import interruption
from preference_tuning.config import RunConfig
from preference_tuning.errors import ConfigError, DataError, DivergedError, InterruptedJobError, PreferenceTuningError
from preference_tuning.interruption import Interruption
from preference_tuning.tracking import overview
from preference_tuning.tracking.folder import RunFolder
from preference_tuning.tracking.spool import read

STAGES = ["data", "dpo", "evaluation", "registry", "run", "sft"]
HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "pandas", "scipy.stats", "comet_ml", "mlflow", "s3fs", "numpy",
}  # fmt: skip
DPO_STEPS = {"load_preferences", "train_sft", "train_dpo", "evaluate", "register"}


def manifests(project: Project) -> list[dict[str, Any]]:
    found = (project.folder / "outputs" / "registry").glob("*/versions/*/manifest.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def test_a_run_tunes_measures_and_registers(finished: Finished) -> None:
    project, shown, run = finished.project, finished.shown, finished.run
    assert run["status"] == "completed"
    assert {name: step["status"] for name, step in run["steps"].items()} == dict.fromkeys(DPO_STEPS, "completed")
    (version,) = [found for found in manifests(project) if found["run"]["zenml_run"] == run["name"]]
    folder = project.folder / "outputs/registry/preference-tuned"
    champion = json.loads((folder / "champion.json").read_text(encoding="utf-8"))
    assert champion["version"] == version["id"]
    assert version["verdict"]["decision"] == "promote"
    accuracy = version["metrics"]["models"]["dpo"]["rewards/accuracies"]
    assert accuracy["value"] > 0.9, "shouting is easy to tell from plain words"
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(
        version["model_files"]
    )
    assert version["run"]["zenml_run"] == run["name"]
    for line in (
        "64 rows as pairs",
        "chosen is longer",
        "fingerprint",
        "tuned on",
        "reward accuracy",
        "verdict    promote",
        version["id"],
        "comet upload",
        run["name"],
    ):
        assert line in shown
    assert len(shown[shown.index("  tuned on ") :].splitlines()) < 45, "one screen"


def test_the_reference_is_the_sft_policy(finished: Finished) -> None:
    steps = finished.run["steps"]
    sft, dpo = steps["train_sft"]["metadata"], steps["train_dpo"]["metadata"]
    assert dpo["reference/sft_adapter_hash"] == sft["adapter_hash"]
    assert float(dpo["reference/loss"]) == pytest.approx(0.693147, abs=1e-4)
    assert float(dpo["reference/largest_difference"]) < 1e-3
    assert dpo["engine"] == "shared_prompt"


def test_each_step_shows_metadata_and_a_report(finished: Finished) -> None:
    steps = finished.run["steps"]
    for name, facts in {
        "load_preferences": {"train", "held_out", "fingerprint", "rows_in"},
        "train_sft": {"seconds", "steps", "adapter_hash", "settings/learning_rate", "held_out/loss"},
        "train_dpo": {"seconds", "settings/beta", "held_out/rewards/accuracies", "template_hash"},
        "evaluate": {"decision", "dpo/rewards/accuracies", "base/likelihood/accuracy", "pairs"},
        "register": {"version", "promoted", "champion", "reason"},
    }.items():
        assert facts <= set(steps[name]["metadata"]), name
        reports = [uri for output, uri in steps[name]["outputs"].items() if output.endswith("report")]
        for uri in reports:
            html = (Path(uri) / "output.html").read_text(encoding="utf-8")
            assert "<svg" in html
            assert "<script" not in html
        assert reports or name == "register"


def test_artifacts_are_plain_files_without_pickles(finished: Finished) -> None:
    stored = [path for path in finished.project.folder.parent.joinpath("zenml").rglob("*") if path.is_file()]
    assert any(path.name == "adapter_model.safetensors" for path in stored)
    assert not [path for path in stored if path.suffix in {".pkl", ".gz", ".bin", ".pt"}]


@pytest.fixture
def tracked(finished: Finished) -> RunFolder:
    """The tracking folder of the run."""
    return RunFolder(finished.project.folder / "outputs" / "tracking" / finished.run["id"])


def test_each_value_of_a_run_is_that_of_the_spool(finished: Finished, tracked: RunFolder) -> None:
    archives = opened(tracked)
    assert sorted(archives) == STAGES
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


def test_an_experiment_says_all_of_its_run(finished: Finished, tracked: RunFolder) -> None:
    archives = opened(tracked)
    parameters = archives["run"].parameters
    config = yaml.safe_load((finished.project.folder / "run.yaml").read_text(encoding="utf-8"))["parameters"]
    assert parameters["dpo/beta"] == str(config["dpo"]["beta"])
    assert parameters["lora/rank"] == "8"
    assert parameters["base_model/source"] == Path(config["base_model"]["source"]).name
    assert {name.split("/")[0] for name in parameters} == set(RunConfig.model_fields)
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
    tracked: RunFolder, comet: CometServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that the summary prints, against a server; then our own upload of the same run."""
    command = [str(Path(sys.executable).parent / "comet"), "upload", *map(str, reversed(tracked.archives()))]
    done = subprocess.run(command, env={**os.environ, **comet.environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = comet.experiments.values()
    expected = values([p for stage in tracked.stages() for p in stage.points()])
    own = {key: value for key, value in kept.metrics.items() if key[0] != "process duration"}
    assert own == expected
    assert kept.others["Name"] == tracked.about.name
    assets = sorted(name for name, _ in kept.assets)
    assert assets == sorted(asset.name for stage in tracked.stages() for asset in stage.contents().assets)
    for name, value in comet.environment.items():
        monkeypatch.setenv(name, value)
    total, left = overview.counted(tracked, tracked.ledger())
    assert left == total, "nothing here knows of it"
    list(overview.upload(tracked.path.parent, [tracked.about.id]))
    assert {key: value for key, value in kept.metrics.items() if key[0] != "process duration"} == expected
    assert sorted(name for name, _ in kept.assets) == assets
    assert overview.counted(tracked, tracked.ledger()) == (total, 0)


def test_evaluation_really_happens_five_times(finished: Finished) -> None:
    run = finished.run
    for stage in ("sft", "dpo"):
        spool = Path(run["steps"][f"train_{stage}"]["outputs"][f"{stage}_evidence"]) / "content" / "metrics.jsonl"
        points = [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]
        evaluations = [point["step"] for point in points if f"{stage}/eval/loss" in point["metrics"]]
        steps = int(run["steps"][f"train_{stage}"]["metadata"]["steps"])
        assert evaluations == sorted({max(1, round(steps * i / 5)) for i in range(1, 6)})
        assert [p["step"] for p in points if f"{stage}/train/loss" in p["metrics"]] == list(range(1, steps + 1))


def test_the_cache(finished: Finished, comet: CometServer) -> None:
    """Identical: cached. Another beta: DPO only. Another byte of data: everything. An edited trainer: training."""
    project = finished.project
    trainer, data = project.folder / "preference_tuning/training/trainers.py", project.folder / "rows.jsonl"

    def edited(path: Path, old: str, new: str, *options: str) -> None:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        project.train("run.yaml", *options)
        path.write_text(text, encoding="utf-8")

    sft_only = ("--set", "finetuning_type=sft")
    online = project.run("-X", "importtime", "run.py", "train", "run.yaml", **comet.environment)
    assert online.returncode == 0, online.stderr
    # Nothing heavy is loaded where nothing is trained; it would cost more than all the rest.
    assert HEAVY & set(re.findall(r"^import time:.* ([\w.]+)$", online.stderr, re.MULTILINE)) == {"numpy"}
    project.train("run.yaml", "--set", "dpo.beta=0.2", "--set", "tracking.tags=[night]")
    edited(trainer, "import itertools", "import itertools  # edited", *sft_only)
    edited(data, "part 1.", "part 1!", *sft_only)

    changed_data, changed_code, changed_beta, identical = project.last_runs(4)
    cached = dict.fromkeys(DPO_STEPS, "cached") | {"register": "completed"}
    assert statuses(identical) == cached
    assert statuses(changed_beta) == cached | {"train_dpo": "completed", "evaluate": "completed"}
    assert statuses(changed_code) == {
        "load_preferences": "cached",
        "train_sft": "completed",
        "evaluate": "completed",
        "register": "completed",
    }
    assert statuses(changed_data) == dict.fromkeys(DPO_STEPS - {"train_dpo"}, "completed")
    # A run from the cache is as complete as the first: its metrics are in Comet, and its result is the same version.
    root = project.folder / "outputs" / "tracking"
    runs = {run["id"]: RunFolder(root / run["id"]) for run in (finished.run, identical, changed_beta)}
    assert [path.stem for path in runs[changed_beta["id"]].archives()] == STAGES
    points = [
        values([p for stage in runs[run["id"]].stages() for p in stage.points()]) for run in (identical, finished.run)
    ]
    with runs[identical["id"]].sole(patience=60):
        assert comet.experiments[identical["id"]].metrics == points[0] == points[1]
    assert comet.experiments[identical["id"]].state == "finished"
    assert f"comet      http://comet/somebody/preference-tuning/{identical['id']}" in online.stdout
    assert statuses(identical)["register"] == "completed"
    versions = [run["steps"]["register"]["metadata"]["version"] for run in (identical, finished.run)]
    assert versions[0] == versions[1]
    # In ZenML's model too: one version with both runs, and its metadata.
    found = indexed(project, versions[0])
    assert found["versions"].count(versions[0]) == 1
    assert {identical["name"], finished.run["name"]} <= set(found["runs"])
    assert found["metadata"]["decision"] == "promote"


def indexed(project: Project, version: str) -> dict[str, Any]:
    """Return what ZenML's model says of a version."""
    script = f"""
import json
from zenml.client import Client
from zenml.utils.pagination_utils import depaginate
c = Client()
version = c.get_model_version("preference-tuned", {version!r})
print(json.dumps({{
    "models": [m.name for m in c.list_models().items],
    "versions": [v.name for v in depaginate(c.list_model_versions, model=version.model.id)],
    "stage": version.stage,
    "description": version.description,
    "tags": [t.name for t in version.tags],
    "metadata": dict(version.run_metadata),
    "artifacts": [a.uri for a in depaginate(c.list_artifact_versions, model_version_id=version.id)],
    "runs": [l.pipeline_run.name for l in c.list_model_version_pipeline_run_links(model_version_id=version.id).items],
}}, default=str))
"""
    done = project.run("-c", script, ZENML_LOGGING_VERBOSITY="ERROR")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_zenmls_model_has_a_version_for_each_result(finished: Finished) -> None:
    """Without a word of it in the run config."""
    project, steps = finished.project, finished.run["steps"]
    version = steps["register"]["metadata"]["version"]
    found = indexed(project, version)
    assert found["models"] == ["preference-tuned"]
    assert set(found["versions"]) == {manifest["id"] for manifest in manifests(project)}
    assert finished.run["name"] in found["runs"]
    assert found["stage"] == "production"
    assert "preference pairs" in found["description"]
    assert set(found["tags"]) == {"preference-tuning", "dpo", "tiny-model0", "promote"}
    (manifest,) = [found for found in manifests(project) if found["id"] == version]
    of_models = ("base/", "sft/", "dpo/")
    figures = {name: value for name, value in steps["evaluate"]["metadata"].items() if name.startswith(of_models)}
    metadata = found["metadata"]
    assert {name: str(metadata[name]) for name in figures} == figures
    assert metadata["dpo/rewards/accuracies/low"] <= metadata["dpo/rewards/accuracies"], "with the ends of intervals"
    assert metadata["data_fingerprint"] == manifest["data"]["fingerprint"]
    assert metadata["folder"] == str(project.folder / "outputs/registry/preference-tuned/versions" / version)
    assert metadata["comet_experiment"] == manifest["run"]["comet_experiment"]
    assert metadata["decision"] == metadata["verdict"] == "promote"
    outputs = {name: uri for step in steps.values() for name, uri in step["outputs"].items()}
    for name in ("dataset", "sft_adapter", "dpo_adapter", "dpo_evidence", "evaluation"):
        assert outputs[name] in found["artifacts"], name


@pytest.mark.whole
def test_zenmls_stages_follow_the_registry(finished: Finished) -> None:
    """Promotion by a run and by a verb, a later verdict, a repair, and versions that are not ours or no more."""
    project = finished.project
    shutil.copyfile(ROOT / "tests" / "zenml_models.py", project.folder / "zenml_models.py")
    done = project.run("zenml_models.py", ZENML_LOGGING_VERBOSITY="ERROR")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    one, two, three = told["versions"]
    seen = {found.pop("after"): found for found in told["seen"]}
    assert {what: found["stages"] for what, found in seen.items() if "stages" in found} == {
        "recorded, not promoted": {one: "staging"},
        "promoted by its run": {one: "production"},
        "a challenger": {one: "production", two: "staging"},
        "another verdict": {one: "production", two: "staging"},
        "promoted by a verb": {one: "archived", two: "production"},
        "repaired by the next run": {one: "production", two: "archived", three: "staging"},
        "a version of the user's own": {one: "production", two: "archived", three: "staging", "own": "archived"},
        "removed": {one: "production", two: "archived", three: "archived", "own": "archived"},
    }
    assert seen["no force"]["raised"]
    assert seen["a challenger"]["decisions"][two] == "inconclusive"
    assert seen["another verdict"]["decisions"][two] == "promote"
    assert seen["another verdict"]["tags"][two] == ["dpo", "preference-tuning", "promote", "tiny-model0"]
    assert "removed" in seen["removed"]["tags"][three]
    assert seen["removed"]["tags"]["own"] == []
    assert "warning: ZenML's stages do not follow yet (RuntimeError: no such server)" in done.stderr


def test_a_push_is_part_of_the_run_and_is_finished_by_the_next(finished: Finished) -> None:
    """Its token is a ZenML secret. A failed push fails the run, whose version is there; the rest comes from the cache."""
    project, token = finished.project, "hf_canary_writer"
    entry = {"to": "huggingface", "repo_id": "me/tiny", "when": "registered", "token_secret": "hub"}
    project.configure(lambda p: p.update(registry={"push": [entry]}), "push.yaml")
    secret = f"from zenml.client import Client; Client().create_secret('hub', {{'token': '{token}'}})"
    assert project.run("-c", secret).returncode == 0
    (version,) = [found for found in manifests(project) if found["run"]["zenml_run"] == finished.run["name"]]
    with hub_server.running() as hub:
        world = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        hub.fail("tag", 403)
        failed = project.run("run.py", "train", "push.yaml", **world)
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "pushes    ok: huggingface:me/tiny: the token in HF_TOKEN is me's and may write" in failed.stdout
        assert f"error: version {version['id']} is registered, but 1 of 1 pushes failed:" in failed.stderr
        assert "Traceback" not in failed.stderr
        done = project.run("run.py", "train", "push.yaml", **world)
        assert done.returncode == 0, done.stdout + done.stderr
        last = done.stdout.rstrip().splitlines()[-1]
        assert last.startswith(f"pushed     huggingface:me/tiny: url {hub.endpoint}/me/tiny, tag v-{version['id']}")
        assert hub.writes().count("put") == 1, "what is missing is continued"
        files = hub.repos["me/tiny"].files("main")
    model = project.folder / "outputs/registry/preference-tuned/versions" / version["id"] / "model"
    published = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    assert set(files) == {*published, "preference-tuning.json"}
    assert all(path.read_bytes() == files[name] for name, path in published.items())
    runs = project.last_runs(2)
    wanted = {
        "load_preferences": "cached",
        "train_sft": "cached",
        "train_dpo": "cached",
        "evaluate": "cached",
        "register": "completed",
    }
    assert [statuses(run) for run in runs] == [{**wanted, "push": "completed"}, {**wanted, "push": "failed"}]
    shown = [run["steps"]["push"]["metadata"]["huggingface me/tiny"] for run in runs]
    assert shown[0].startswith("done: url ")
    assert shown[1].startswith("failed: ")
    assert all("pushes" in run["steps"]["push"]["outputs"] for run in runs), "also of a push that failed"
    places = [path for path in project.folder.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in places if token.encode() in path.read_bytes() and path.suffix != ".db"] == []


def test_zenmls_own_command_runs_sft_without_a_dpo_step(finished: Finished) -> None:
    project = finished.project
    project.configure(lambda parameters: parameters.pop("finetuning_type"), "sft.yaml")
    zenml = ("-c", "from zenml.cli.cli import cli; cli()", "pipeline", "run", "pipelines.training.training", "-c")
    done = project.run(*zenml, "sft.yaml")
    assert done.returncode == 0, done.stderr
    project.configure(lambda parameters: parameters["dpo"].update(betta=1), "bad.yaml")
    done = project.run(*zenml, "bad.yaml")
    assert done.returncode == 2
    assert "did you mean 'beta'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    run = project.last_run()
    assert run["status"] == "completed", "the bad config made no run"
    assert set(run["steps"]) == DPO_STEPS - {"train_dpo"}, "the same steps without DPO"
    assert statuses(run)["train_sft"] == "cached"


def test_a_failing_job_ends_the_run_with_its_exit_code(finished: Finished, tiny_model: Path, tmp_path: Path) -> None:
    project, broken_model = finished.project, diverging_model(tmp_path / "broken", tiny_model)
    versions = len(manifests(project))
    done = project.run("run.py", "train", "run.yaml", "--set", f"base_model.source={broken_model}")
    assert done.returncode == 4
    assert "training diverged" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    run = project.last_run()
    assert run["status"] == "failed"
    assert "register" not in run["steps"]
    assert len(manifests(project)) == versions


def test_the_dashboard_shows_the_run_and_leaves_nothing_behind(finished: Finished) -> None:
    project = finished.project
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "run.py", "dashboard", finished.run["name"], "--port", str(port)]
    shown = subprocess.Popen(command, cwd=project.folder, env=project.environment(), stdout=subprocess.PIPE, text=True)
    assert shown.stdout is not None
    address = next(line for line in shown.stdout if line.startswith("http")).strip()
    assert f"/runs/{finished.run['id'][:8]}" in address
    with urllib.request.urlopen(address) as page:
        assert page.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/current-user") as answer:
        user = json.load(answer)
    assert user["body"]["email_opted_in"] is False, "else it asks for a name and an address before it shows anything"
    assert user["metadata"]["user_metadata"]["finished_onboarding_survey"]
    shown.send_signal(signal.SIGTERM)
    assert shown.wait(30) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)
    settings = (project.folder.parent / "zenml" / "config.yaml").read_text(encoding="utf-8")
    assert "type: sql" in settings, "later runs do not depend on the server"


def fail(error: BaseException, wrapped: bool) -> None:
    if wrapped:
        raise RuntimeError("a step failed") from error
    raise error


@pytest.mark.faults
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PreferenceTuningError("m"), 1),
        (ConfigError("m"), 2),
        (DataError("m"), 3),
        (DivergedError("m"), 4),
        (InterruptedJobError("m"), 75),
        (Interruption("m"), 75),
    ],
    ids=repr,
)
def test_each_kind_of_failure_has_its_exit_code(
    error: BaseException,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also when ZenML wraps it; what is not ours is raised as it is, and ends as 1."""
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path))
    # ZenML asks for the file that runs; a process of pytest-xdist has none.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "run.py"), raising=False)
    from pipelines.telling import told

    monkeypatch.setattr(interruption, "watch", lambda: None)
    capsys.readouterr()  # ZenML greets
    for wrapped in (False, True):
        with pytest.raises(SystemExit) as ended, told():
            fail(error, wrapped)
        assert ended.value.code == code
        first, last = capsys.readouterr().err.splitlines()
        assert (first, last.startswith("failed     before the run began: m. ")) == ("error: m", True)
    with pytest.raises(ZeroDivisionError), told():
        raise ZeroDivisionError


@pytest.mark.quickstart
def test_the_quickstart_visibly_works(tmp_path: Path) -> None:
    project = make_project(tmp_path, tmp_path)
    shutil.copytree(Path(__file__).parent.parent / "data", project.folder / "data")
    shown = project.train("configs/quickstart.yaml").stdout
    (version,) = manifests(project)
    assert version["metrics"]["models"]["dpo"]["rewards/accuracies"]["low"] > 0.6
    assert "verdict    promote" in shown
