"""Schedules: what is shown is what is written, it fires when cron would, and it goes away again."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from conftest import Finished, make_project, preference_rows, write_jsonl
from croniter import croniter

from preference_tuning import scheduling
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.scheduling import Retraining, cron, systemd


@pytest.fixture
def work(tmp_path: Path) -> Retraining:
    project = tmp_path / "a project's folder, 100 %"
    project.mkdir()
    (project / "run.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ.get('A_KEY'))\nsys.exit(10)\n")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    return Retraining("model", project, project / "run.yaml", ("--set", "a=b c"), tmp_path / "logs", environment)


@pytest.mark.parametrize("wrong", ["", "* * * *", "* * * * * *", "61 * * * *", "@daily", "0 3 * * noday"])
def test_what_is_no_cron_expression(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no cron expression of five fields"):
        scheduling.check_cron(wrong)


# --- cron ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def crontab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's crontab behind the command that reads and writes it."""
    table, program = tmp_path / "crontab.txt", tmp_path / "bin" / "crontab"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nif [ "$1" = -l ]; then cat "{table}"; else cat > "{table}"; fi\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return table


def test_a_crontab_keeps_its_other_lines(work: Retraining, crontab: Path) -> None:
    others = "MAILTO=me\n0 1 * * * backup # preference_tuning retrains models\n"
    crontab.write_text(others)
    cron.install(work, "0 3 * * *")
    cron.install(work, "0 4 * * *")
    added = crontab.read_text().removeprefix(others)
    assert added.startswith("0 4 * * * ")
    assert added.count("\n") == 1
    assert added.strip() in str(cron.plan(work, "0 4 * * *"))
    assert cron.remove(work)
    assert crontab.read_text() == others
    assert not (work.logs / "retrain.sh").exists()
    assert not cron.remove(work)


def test_without_cron(work: Retraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cron is not installed"):
        cron.install(work, "0 3 * * *")


def fire(crontab: Path) -> subprocess.CompletedProcess[str]:
    """Do what cron does with the last line of a crontab: sh, and next to no environment."""
    command = crontab.read_text().splitlines()[-1].split(" ", 5)[5].replace(r"\%", "%")
    return subprocess.run(["/bin/sh", "-c", command], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)


def test_cron_starts_it_with_environment_keys_and_log(work: Retraining, crontab: Path) -> None:
    crontab.write_text("")
    cron.install(work, "* * * * *")
    work.keys.parent.mkdir(parents=True)
    work.keys.write_text("A_KEY='of mine'\n")
    work.keys.chmod(0o644)
    refused = fire(crontab)
    assert (refused.returncode, "may be read by others" in refused.stderr) == (2, True)
    work.keys.chmod(0o600)
    for day in range(1, scheduling.LOGS_KEPT + 5):
        (work.logs / f"2020-01-01T00-00-{day:02}.log").touch()
    assert fire(crontab).returncode == 10
    logs = sorted(work.logs.glob("*.log"))
    assert len(logs) == scheduling.LOGS_KEPT
    command = ["retrain", str(work.config), "--set", "a=b c", "--trigger", "cron"]
    assert logs[-1].read_text() == f"{command} of mine\nexit code 10\n"


# --- systemd ------------------------------------------------------------------------------------------------------------

analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
EXPRESSIONS = (
    "0 3 * * *", "*/15 3-5 * * *", "30 2 1,15 * *", "0 0 * jan-mar *", "5 4 * * 1-5", "0 12 * * sun,wed", "0 6 * */3 *",
    "10-40/10 8 * * 7", "0 3 1 * 1", "0 0 29 2 *", "17 23 */10 * *",
)  # fmt: skip


@analyze
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_timer_fires_when_cron_would(expression: str) -> None:
    start = datetime(2026, 11, 26, 1, 2, 3)
    times = croniter(expression, start)
    expected = [times.get_next(datetime) for _ in range(5)]
    found: set[str] = set()
    for value in systemd.on_calendar(expression):
        command = ["systemd-analyze", "calendar", f"--base-time={start:%Y-%m-%d %H:%M:%S}", "--iterations=5", value]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"})
        lines = [line.split(":", 1) for line in shown.stdout.splitlines()]
        found |= {" ".join(told.split()[1:3]) for name, told in lines if "elapse" in name or "Iter" in name}
    assert sorted(found)[:5] == [f"{time:%Y-%m-%d %H:%M:%S}" for time in expected]


@analyze
def test_the_units_are_what_systemd_takes(work: Retraining, tmp_path: Path) -> None:
    plan = systemd.plan(work, "0 3 * * *")
    for path, text in plan.files.items():
        (tmp_path / path.name).write_text(text)
    units = [str(tmp_path / path.name) for path in plan.files]
    shown = subprocess.run(["systemd-analyze", "--user", "verify", *units], capture_output=True, text=True)
    own = [line for line in (shown.stdout + shown.stderr).splitlines() if "preference-tuning" in line]
    assert own == []
    assert "Persistent=true\nAccuracySec=1s\n" in str(plan)


def test_units_are_installed_and_removed(work: Retraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    systemd.install(work, "0 3 * * *")
    units = [path for path in systemd.plan(work, "0 3 * * *").files if path.is_file()]
    assert len(units) == 2
    assert systemd.remove(work)
    assert not any(path.exists() for path in units)
    assert not systemd.remove(work)
    timer = "preference-tuning-model.timer"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--user daemon-reload", f"--user enable --now {timer}", f"--user disable --now {timer}", "--user daemon-reload",
    ]  # fmt: skip
    program.write_text("#!/bin/sh\necho no bus >&2\nexit 1\n")
    with pytest.raises(PreferenceTuningError, match="systemctl --user daemon-reload` failed: no bus"):
        systemd.install(work, "0 3 * * *")


# --- ZenML's orchestrators ----------------------------------------------------------------------------------------------


def test_airflow_gets_each_step_as_a_command_of_this_project(work: Retraining, tmp_path: Path) -> None:
    """The archive that ZenML's orchestrator writes, read by a stand-in of Airflow's classes."""
    from pipelines import airflow_dag

    arguments = {"python": sys.executable, "project": str(work.project), "environment": {"A": "b"}}
    tasks = [
        airflow_dag.TaskConfiguration(
            id=name, zenml_step_name=name, upstream_steps=upstream, docker_image="none", command=["python"],
            arguments=["--step_name", name], environment={"B": "c"}, operator_source="x", operator_args=arguments,
        )
        for name, upstream in (("one", []), ("two", ["one"]))
    ]  # fmt: skip
    config = airflow_dag.DagConfiguration(
        id="retrain-model", tasks=tasks, schedule="0 3 * * *", start_date=datetime(2026, 1, 1), dag_args={"max_active_runs": 1}
    )  # fmt: skip
    archive = tmp_path / "retrain-model.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(airflow_dag.__file__, "dag.py")
        opened.writestr(airflow_dag.CONFIG_FILENAME, config.model_dump_json())
    stand_in = tmp_path / "airflow"
    (stand_in / "providers" / "standard" / "operators").mkdir(parents=True)
    operator = (
        "class BashOperator:\n"
        "    def __init__(self, **given): self.given, self.upstream = given, []\n"
        "    def set_upstream(self, other): self.upstream.append(other.given['task_id'])\n"
        "    def __repr__(self): return f'{self.given} after {self.upstream}'\n"
    )
    (stand_in / "providers" / "standard" / "operators" / "bash.py").write_text(operator)
    dag = "class DAG(dict):\n    def __enter__(self): print(sorted(self.items()))\n    def __exit__(self, *_): ...\n"
    (stand_in / "sdk.py").write_text(dag)
    script = (
        f"import runpy, sys\nsys.path[:0] = [{str(tmp_path)!r}]\n"
        f"sys.path.insert(0, {str(archive)!r})\nimport dag, airflow.sdk\nassert dag.dag['dag_id'] == 'retrain-model'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "('max_active_runs', 1)" in done.stdout
    assert "('schedule', '0 3 * * *')" in done.stdout
    assert airflow_dag.command_of(tasks[1]) == f"{sys.executable} -m pipelines.airflow_step --step_name two "
    assert airflow_dag.environment_of(tasks[1]) == {"A": "b", "B": "c", "ZENML_AIRFLOW_RUN_ID": "{{ run_id }}"}


def test_random_expressions_are_taken_or_refused_as_croniter_does() -> None:
    rng = random.Random(0)
    for _ in range(200):
        expression = " ".join(rng.choice(["*", "*/2", "5", "70", "1-5", "x", "0,3"]) for _ in range(5))
        try:
            assert scheduling.check_cron(expression) == expression
            assert croniter.is_valid(expression)
        except ConfigError:
            assert not croniter.is_valid(expression)


def test_a_stack_without_schedules_is_refused_before_anything_runs(finished: Finished) -> None:
    document = yaml.safe_load((finished.project.folder / "run.yaml").read_text())
    scheduled = finished.project.folder / "scheduled.yaml"
    scheduled.write_text(yaml.safe_dump({**document, "schedule": {"cron_expression": "0 3 * * *"}}))
    for command in (
        ("train", "scheduled.yaml"),
        ("schedule", "run.yaml", "--on", "local", "--cron", "0 3 * * *", "--install"),
    ):
        refused = finished.project.run("run.py", *command)
        assert refused.returncode == 2, refused.stderr
        assert "schedules" in refused.stderr
        assert "--on cron" in refused.stderr
        assert "model     ok" not in refused.stdout
    other = finished.project.run("run.py", "schedule", "run.yaml", "--on", "kubernetes", "--cron", "0 3 * * *")
    assert other.returncode == 2
    assert "runs on 'local', not on kubernetes" in other.stderr


def test_kubernetes_is_told_to_forbid_a_second_run(work: Retraining, tmp_path: Path) -> None:
    from pipelines import schedules

    settings = schedules.settings_of(work, "kubernetes", tmp_path)
    assert settings["orchestrator"]["concurrency_policy"] == "Forbid"
    assert schedules.settings_of(work, "vertex", tmp_path) == {}


@pytest.mark.whole
@pytest.mark.skipif("AIRFLOW" not in os.environ, reason="AIRFLOW names an airflow command of another environment")
@pytest.mark.timeout(1200)
def test_airflow_runs_the_pipeline_again_and_again(tmp_path: Path, tiny_model: Path) -> None:
    """Two scheduled runs, the second on grown data: success in Airflow, completed in ZenML."""
    project = make_project(tmp_path, tiny_model)
    settings = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__API__PORT": "8793",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": "http://127.0.0.1:8793/execution/", "AIRFLOW__API__WORKERS": "1",
    }  # fmt: skip
    settings["ZENML_ACTIVE_STACK_ID"] = project.airflow_stack()
    installed = project.run(
        "run.py", "schedule", "run.yaml", "--on", "airflow", "--cron", "* * * * *", "--install", **settings
    )
    assert installed.returncode == 0, installed.stderr
    environment = {**os.environ, **settings}
    airflow = os.environ["AIRFLOW"]
    subprocess.run([airflow, "db", "migrate"], env=environment, check=True, capture_output=True)
    with contextlib.ExitStack() as servers:
        for server in ("api-server", "dag-processor", "scheduler"):
            started = servers.enter_context(
                subprocess.Popen([airflow, server], env=environment, start_new_session=True)
            )
            servers.callback(os.killpg, started.pid, signal.SIGTERM)
            time.sleep(20 if server == "api-server" else 1)
        deadline, grown = time.monotonic() + 1000, False
        while len(done := [run for run in project.last_runs(5) if run["status"] == "completed"]) < 2:
            assert time.monotonic() < deadline, project.last_runs(5)
            if done and not grown:
                write_jsonl(project.folder.parent / "project" / "rows.jsonl", preference_rows(80))
                grown = True
            time.sleep(10)
    assert {name for run in done for name in run["steps"]} >= {"load_preferences", "train_dpo", "register"}
