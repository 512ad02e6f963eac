"""Jobs that are forked: like programs of their own, and never left alone. The libraries they share are stubs here."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preference_tuning import jobs
from preference_tuning.jobs import forking

JOB = """
import gc, json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
print("said")
print("complained", file=sys.stderr)
facts = {
    "parent": os.getppid(), "cwd": os.getcwd(), "name": __name__, "stdin": os.readlink("/proc/self/fd/0"),
    "open": sorted(set(map(int, os.listdir("/proc/self/fd"))))[:-1],
    "mask": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "signals": [signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler) for n in (1, 2, 15)],
    "imported": "torch" in sys.modules, "collects": gc.isenabled(),
}
(folder / "facts.json").write_text(json.dumps(facts))
while (folder / "wait").is_file():
    time.sleep(0.02)
sys.exit(7)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An environment in which what jobs import is empty, and ``stub_job`` is a job."""
    monkeypatch.setattr(forking, "ACCELERATORS", ())
    libraries = tmp_path / "libraries"
    for name in forking.ALL_NEED:
        folder = libraries.joinpath(*name.split("."))
        folder.mkdir(parents=True)
        for package in (folder, *folder.parents):
            if libraries in package.parents:
                (package / "__init__.py").touch()
    (libraries / "stub_job.py").write_text(JOB)
    yield {**os.environ, "PYTHONPATH": os.pathsep.join([str(libraries), str(Path(jobs.__file__).parents[2])])}
    forking.close()


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., forking.Child]]:
    """Start a job, and return it as soon as it runs; the file ``wait`` in its folder keeps it."""
    with (tmp_path / "lock").open("w") as lock:

        def begin(name: str, waits: bool = False, **more: str) -> forking.Child:
            folder = tmp_path / name
            folder.mkdir()
            if waits:
                (folder / "wait").touch()
            child = forking.start("stub_job", folder, environment | more, lock.fileno())
            assert child is not None
            end = time.monotonic() + 20
            while not (folder / "facts.json").is_file() or not (folder / "facts.json").read_text():
                assert time.monotonic() < end
                time.sleep(0.01)
            return child

        yield begin


def facts(folder: Path) -> dict[str, Any]:
    """Return what a job saw of itself."""
    return dict(json.loads((folder / "facts.json").read_text()))


def test_a_fork_is_like_a_program(
    begin: Callable[..., forking.Child], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert begin("first").wait() == 7
    assert capfd.readouterr() == ("said\n", "complained\n")
    seen = facts(tmp_path / "first")
    assert seen["imported"]
    assert seen["collects"]
    assert (seen["name"], seen["cwd"], seen["stdin"]) == ("__main__", str(Path.cwd()), os.devnull)
    assert (seen["mask"], seen["signals"]) == (0, [True, True, True])
    assert len(seen["open"]) == 4, "its terminal and its lock, and nothing of other jobs"


def test_jobs_of_one_environment_come_from_one_process(begin: Callable[..., forking.Child], tmp_path: Path) -> None:
    """Two at the same time: each is told its own end, and holds nothing of the other."""
    slow, quick = begin("slow", waits=True), begin("quick")
    assert quick.wait() == 7
    slow.send_signal(signal.SIGTERM)
    assert slow.wait() == slow.wait() == -signal.SIGTERM
    slow.send_signal(signal.SIGTERM)  # too late, and no error
    begin("other", OMP_NUM_THREADS="3").wait()
    parents = [facts(tmp_path / name)["parent"] for name in ("slow", "quick", "other")]
    assert parents[0] == parents[1] != parents[2]
    assert len(facts(tmp_path / "quick")["open"]) == 4


def test_a_job_does_not_outlive_the_one_that_would_tell_its_end(
    begin: Callable[..., forking.Child], tmp_path: Path
) -> None:
    child = begin("orphan", waits=True)
    os.kill(facts(tmp_path / "orphan")["parent"], signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert begin("next").wait() == 7, "there is a new one"


@pytest.mark.parametrize("reason", ["accelerator", "library", "kernel"])
def test_where_jobs_cannot_be_forked_they_are_programs(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "accelerator":
        monkeypatch.setattr(forking, "ACCELERATORS", (str(tmp_path),))
    elif reason == "kernel":
        monkeypatch.setattr(forking, "_has_pidfds", lambda: False)
    else:
        (tmp_path / "libraries" / "torch" / "__init__.py").write_text("raise ImportError('of another CUDA')")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "lock").open("w") as lock:
        assert forking.start("stub_job", tmp_path, environment, lock.fileno()) is None
        assert jobs._run_child("stub_job", tmp_path, 1, lock.fileno()) == 7
    seen = facts(tmp_path)
    assert seen["parent"] == os.getpid()
    assert not seen["imported"]


def test_variables_of_a_step_are_no_reason_to_import_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jobs._environment(1)
    monkeypatch.setenv("ZENML_STORE_PASSWORD", "secret")
    assert jobs._environment(1) == before
