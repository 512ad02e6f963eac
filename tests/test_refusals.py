"""What is wrong is told before anything runs, whole and in one message; and what a check says of what is right."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Finished, Project, preference_rows, write_jsonl


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


def test_a_stack_whose_images_cannot_be_built_is_told_before_anything_runs(finished: Finished, tmp_path: Path) -> None:
    project = finished.project
    # ZenML keeps the stack that it was told to take.
    shutil.copytree(project.folder.parent / "zenml", tmp_path / "zenml")
    environment = {"ZENML_CONFIG_PATH": str(tmp_path / "zenml"), "PATH": ""}
    environment |= {"DOCKER_HOST": "unix:///nowhere.sock", "CONTAINER_HOST": "unix:///nowhere.sock"}
    environment["ZENML_ACTIVE_STACK_ID"] = project.airflow_stack(**environment)
    done = project.run("run.py", "train", "run.yaml", **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the airflow orchestrator of stack 'flying' runs steps in a container image" in done.stderr
    assert "`zenml stack set default` runs the pipeline here" in done.stderr
    assert "Traceback" not in done.stderr


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
