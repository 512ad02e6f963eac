"""The whole pipeline in ZenML on the tiny model, started as a user starts it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Finished, Project, make_project, preference_rows, statuses, write_jsonl

from preference_tuning import interruption
from preference_tuning.errors import ConfigError, DataError, DivergedError, InterruptedJobError, PreferenceTuningError
from preference_tuning.interruption import Interruption

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


def test_comet_has_every_stage_in_one_experiment(finished: Finished) -> None:
    run = finished.run
    archives = list((finished.project.folder / "outputs" / "comet" / run["id"]).glob("*/*.zip"))
    assert sorted(archive.parent.name for archive in archives) == ["dpo", "evaluation", "register", "sft"]
    metrics: dict[tuple[str, int | None], float] = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as opened:
            about = json.loads(opened.read("experiment.json"))
            assert about["offline_id"] == run["id"]
            assert about["project_name"] == "preference-tuning"
            for line in opened.read("messages.json").decode().splitlines():
                message = json.loads(line)
                if message["type"] == "metric_msg":
                    metric = message["payload"]["metric"]
                    metrics[metric["metricName"], metric["step"]] = metric["metricValue"]
    names = {name for name, _ in metrics}
    assert {"sft/train/loss", "sft/eval/loss", "dpo/train/loss", "dpo/eval/rewards/accuracies"} <= names
    assert {"evaluation/base/nll/chosen", "evaluation/dpo/rewards/accuracies"} <= names
    # The spool is the truth: what Comet got is what it says, point by point.
    for stage in ("sft", "dpo"):
        uri = Path(run["steps"][f"train_{stage}"]["outputs"][f"{stage}_evidence"])
        spool = uri / "content" / "metrics.jsonl"
        for line in spool.read_text(encoding="utf-8").splitlines():
            point = json.loads(line)
            for name, value in point["metrics"].items():
                assert metrics[name, point["step"]] == pytest.approx(value)


def test_evaluation_really_happens_five_times(finished: Finished) -> None:
    run = finished.run
    for stage in ("sft", "dpo"):
        spool = Path(run["steps"][f"train_{stage}"]["outputs"][f"{stage}_evidence"]) / "content" / "metrics.jsonl"
        points = [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]
        evaluations = [point["step"] for point in points if f"{stage}/eval/loss" in point["metrics"]]
        steps = int(run["steps"][f"train_{stage}"]["metadata"]["steps"])
        assert evaluations == sorted({max(1, round(steps * i / 5)) for i in range(1, 6)})
        assert [p["step"] for p in points if f"{stage}/train/loss" in p["metrics"]] == list(range(1, steps + 1))


def test_the_cache(finished: Finished) -> None:
    """Identical: cached. Another beta: DPO only. Another byte of data: everything. An edited trainer: training."""
    project = finished.project
    trainer, data = project.folder / "preference_tuning/training/trainers.py", project.folder / "rows.jsonl"

    def edited(path: Path, old: str, new: str, *options: str) -> None:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        project.train("run.yaml", *options)
        path.write_text(text, encoding="utf-8")

    sft_only = ("--set", "finetuning_type=sft")
    project.train()
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
    archives = project.folder.glob(f"outputs/comet/{identical['id']}/*/*.zip")
    assert {path.parent.name for path in archives} == {"sft", "dpo", "evaluation", "register"}
    versions = [run["steps"]["register"]["metadata"]["version"] for run in (identical, finished.run)]
    assert versions[0] == versions[1]


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
    import torch
    from safetensors.torch import load_file, save_file

    project, broken_model = finished.project, tmp_path / "broken"
    shutil.copytree(tiny_model, broken_model)
    weights = load_file(broken_model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken_model / "model.safetensors", metadata={"format": "pt"})
    versions = len(manifests(project))
    done = project.run("run.py", "train", "run.yaml", "--set", f"base_model.source={broken_model}")
    assert done.returncode == 4
    assert "training diverged" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    run = project.last_run()
    assert run["status"] == "failed"
    assert "register" not in run["steps"]
    assert len(manifests(project)) == versions


def files(project: Project) -> list[str]:
    """Return all files but Python's own and those of checked data, which the next run uses."""
    left = {"__pycache__", "data"}
    return sorted(path.name for path in project.folder.rglob("*") if not left & set(path.parts))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["data.source=nowhere.jsonl"], 3, "no such file: "),
        (["data.source=empty.jsonl"], 3, "is empty"),
        (["data.columns.chosen=best"], 3, "no column 'best' (data.columns.chosen); the columns are 'prompt', 'chosen'"),
        (["data.source=broken.jsonl"], 3, "broken.jsonl, line 2: not JSON"),
        (["data.source=null.jsonl"], 3, "(line 3: `chosen` is null)"),
        (["data.source=two.jsonl"], 3, "2 different prompts split into"),
        (["data.source=https://example.org/rows.jsonl"], 3, "set data.allow_urls: true"),
        (["dpo.warmup_steps=500"], 2, "dpo.warmup_steps: 500 of"),
        (["lora.target_modules=[k_proj, z_proj]"], 2, "lora.target_modules: the model has no z_proj"),
        (["base_model.source=no/where/at/all"], 2, "no such file or directory"),
        (["base_model.source=run.py"], 2, "is not a model"),
        (["base_model.source=configs"], 2, "is not a model directory: it has no config.json"),
        (["base_model.source=package:llm_nothing/x.gguf"], 2, "the Python package 'llm_nothing' is not installed"),
        (["output_dir=rows.jsonl"], 2, "is a file, not a folder"),
        (["registry.folder=configs"], 2, "not a registry of ours"),
        (["evaluation.general=nowhere.txt"], 2, "evaluation.general: no such file"),
        (["tracking.mode=online"], 2, "needs COMET_API_KEY"),
        (["data.source=nowhere.jsonl", "registry.folder=configs"], 2, "no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_runs(
    finished: Finished, options: list[str], code: int, message: str
) -> None:
    project = finished.project
    rows = preference_rows(8)
    write_jsonl(project.folder / "null.jsonl", [*rows[:2], {**rows[2], "chosen": None}, *rows[3:]])
    write_jsonl(project.folder / "two.jsonl", rows[:2])
    (project.folder / "empty.jsonl").touch()
    (project.folder / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    before = files(project)
    done = project.run("run.py", "train", "run.yaml", *(word for option in options for word in ("--set", option)))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert files(project) == before


def test_check_says_what_it_found(finished: Finished) -> None:
    project = finished.project
    done = project.run("run.py", "check", "run.yaml")
    assert done.returncode == 0
    assert "training and" in done.stdout
    assert "warning  SFT makes only" in done.stdout
    # What a run shows before it starts says the same.
    (areas,) = [line.split()[0] for line in finished.shown.splitlines() if line.startswith("registry  ok:")]
    assert areas == "registry"
    assert "          warning: SFT makes only" in finished.shown


def test_a_stack_that_cannot_do_what_is_asked_is_told(finished: Finished) -> None:
    project = finished.project
    document = yaml.safe_load((project.folder / "run.yaml").read_text(encoding="utf-8"))
    document |= {"schedule": {"cron_expression": "0 3 * * *"}, "settings": {"resources": {"gpu_count": 1}}}
    document["parameters"]["base_model"]["device"] = "cpu"
    (project.folder / "asking.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    done = project.run("run.py", "check", "asking.yaml", "--json")
    assert done.returncode == 2, done.stderr
    errors = [f["text"] for f in json.loads(done.stdout)["findings"] if f["level"] == "error"]
    assert [error.partition(":")[0] for error in errors] == ["schedule", "settings.resources.gpu_count"]
    assert "runs nothing on a schedule" in errors[0]


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
    from pipelines.training import told

    monkeypatch.setattr(interruption, "watch", lambda: None)
    capsys.readouterr()  # ZenML greets
    for wrapped in (False, True):
        with pytest.raises(SystemExit) as ended, told():
            fail(error, wrapped)
        assert ended.value.code == code
        assert capsys.readouterr().err == "error: m\n"
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
