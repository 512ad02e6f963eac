"""`run.py data`: a look at preference data from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, preference_rows, tiny_parameters, write_jsonl


def look(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "run.py"), "data", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_path_alone(tmp_path: Path) -> None:
    rows = preference_rows(60)
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0], {**rows[1], "rejected": rows[1]["chosen"]}])
    done = look(tmp_path, str(path), "--out", str(tmp_path / "prepared"))
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl: 62 rows as pairs: the prompt is `prompt`" in done.stdout
    for line in (
        "left out               2",
        "duplicate",
        "(line 61: an earlier row is the same) -> drop",
        "characters",
    ):
        assert line in done.stdout
    assert len(done.stdout.splitlines()) < 40, "one screen"
    saved = {file.name for file in (tmp_path / "prepared").iterdir()}
    assert {
        "train.arrow",
        "held_out.arrow",
        "manifest.json",
        "split.parquet",
        "quarantine.jsonl",
        "report.html",
    } <= saved
    again = look(tmp_path, str(path), "--out", str(tmp_path / "prepared"))
    assert (again.returncode, "name a new or empty folder" in again.stderr) == (2, True)


def test_a_sample_too_small_to_split_is_shown_all_the_same(tmp_path: Path) -> None:
    done = look(tmp_path, str(write_jsonl(tmp_path / "two.jsonl", preference_rows(2))))
    assert done.returncode == 0, done.stderr
    assert "two.jsonl: 2 rows as pairs" in done.stdout
    assert "warning: two.jsonl: 2 different prompts split into 2 training and 0 held-out pairs" in done.stdout


def test_a_config_with_its_tokenizer_for_machines(tmp_path: Path, tiny_model: Path) -> None:
    parameters = tiny_parameters(tiny_model, write_jsonl(tmp_path / "rows.jsonl", preference_rows(60)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    done = look(tmp_path, "run.yaml", "--json", "--set", "data.held_out=0.4", "--set", "evaluation.gate.min_prompts=50")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows_in"], found["unit"], found["max_length"]) == (60, "tokens", 128)
    assert {finding["name"] for finding in found["of_run"]} == {"few_steps", "few_held_out"}
    html = Path(found["report"]).read_text(encoding="utf-8")
    assert "few_held_out" in html
    assert "<mark class='chosen special'>" in html
    typo = look(tmp_path, "run.yaml", "--set", "data.problems.duplicates=keep")
    assert (typo.returncode, "did you mean 'duplicate'?" in typo.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere.jsonl",), 3, "no such file"),
        (("rows.jsonl", "--set", "data.max_dropped=0"), 3, "(line 2: `chosen` is null)"),
        (("rows.jsonl", "--set", "dpo.beta=1"), 2, "without a run config only data.NAME=VALUE can be set"),
        (("rows.jsonl", "--set", "data.columns.chosen=best"), 3, "there is no column 'best' (data.columns.chosen)"),
        (("some/dataset",), 2, "cannot reach the hub to find the dataset 'some/dataset'"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    rows = preference_rows(40)
    write_jsonl(tmp_path / "rows.jsonl", [rows[0], {**rows[1], "chosen": None}, *rows[2:]])
    done = look(tmp_path, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
