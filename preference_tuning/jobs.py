"""Heavy work as a job in its own process: a job file in, a result file out.

The child gives its memory back when it ends, owns its signals, and keeps torch out of the pipeline's process. Its
folder is named by a hash of the work, so the same work started again continues where it was, and finished work is
found finished.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.errors import BY_EXIT_CODE, ConfigError, InterruptedJobError, PreferenceTuningError

JOB, RESULT, ERROR, LOG, LOCK = "job.json", "result.json", "error.json", "job.log", ".lock"

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes; a job started from inside of somebody else's must not believe it is one."""

SHUTDOWN_SECONDS = 300
"""How long torchrun waits for its processes to save a checkpoint after a signal, before it kills them."""

Job = TypeVar("Job", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)


def run(
    module: str, folder: Path, job: BaseModel, result: type[Result], again: bool = False, processes: int = 1
) -> Result:
    """Run ``python -m module folder`` on ``job`` and return its result; at once if this job is already finished.

    Args:
        module: the child's entry point, which calls ``main``.
        folder: of the job, named by the hash of its identity.
        job: what the child reads.
        result: what it writes.
        again: do finished work anew.
        processes: how many of the child torchrun starts to do the job together; one needs no torchrun.

    Raises:
        PreferenceTuningError: of the kind that the job failed with, or of the base kind if it died.
    """
    _make(folder)
    with _lock(folder):
        finished = folder / RESULT
        if again and finished.is_file():
            _clear(folder)
        if not finished.is_file():
            write_json(folder / JOB, job.model_dump(mode="json"))
            (folder / ERROR).unlink(missing_ok=True)
            code = _run_child(module, folder, processes)
            if code or not finished.is_file():
                raise _failure(code, folder)
        return result.model_validate_json(finished.read_text(encoding="utf-8"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write {folder.absolute()}: {error.strerror}") from None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PreferenceTuningError(
                f"the same job is already running in {folder}; wait for it, or stop it"
            ) from None
        yield


def _run_child(module: str, folder: Path, processes: int) -> int:
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else []), module, str(folder)]
    # Ctrl-C reaches a process group. torchrun must hear of it once, from here: at a second signal it leaves its
    # processes behind.
    group = 0 if processes > 1 else None
    child = subprocess.Popen(command, env=_environment(processes), process_group=group)
    try:
        return child.wait()
    except BaseException:
        # Interrupted here: let the child save its checkpoint; its own account of it is the better one.
        child.send_signal(signal.SIGTERM)
        child.wait()
        told = _told(folder)
        if told and told["exit_code"] == InterruptedJobError.exit_code:
            return InterruptedJobError.exit_code
        raise


def _environment(processes: int) -> dict[str, str]:
    root = str(fingerprint.PACKAGE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**QUIET, **os.environ, "PYTHONPATH": path}
    for name in LAUNCHER:
        environment.pop(name, None)
    if processes > 1:
        # torchrun would give each process one thread.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    return environment


def _told(folder: Path) -> dict[str, Any] | None:
    """Return what the child told of its failure; torchrun's exit code says nothing of it."""
    error = folder / ERROR
    told: dict[str, Any] | None = json.loads(error.read_text(encoding="utf-8")) if error.is_file() else None
    return told


def _failure(code: int, folder: Path) -> PreferenceTuningError:
    if told := _told(folder):
        return BY_EXIT_CODE.get(told["exit_code"], PreferenceTuningError)(told["message"])
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return PreferenceTuningError(f"the job in {folder} was ended by {name}{hint}; the same command continues it")
    return PreferenceTuningError(f"the job in {folder} failed with exit code {code}; its log: {folder / LOG}")


def main(job: type[Job], work: Callable[[Path, Job], BaseModel | None]) -> None:
    """Be the child: read the job of the folder in ``sys.argv``, do ``work``, write the result or the error.

    Of several processes, one returns a result and the others None.
    """
    folder = Path(sys.argv[1])
    try:
        result = work(folder, job.model_validate_json((folder / JOB).read_text(encoding="utf-8")))
    except PreferenceTuningError as error:
        _tell(folder, error.exit_code, str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        message = f"{type(error).__name__}: {error} (traceback in {folder / LOG})"
        if _tell(folder, 1, message):
            (folder / LOG).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)
    if result is not None:
        write_json(folder / RESULT, result.model_dump(mode="json"))


def _tell(folder: Path, exit_code: int, message: str) -> bool:
    """Write the error, unless another process of the job was first: its end is then the reason for this one's."""
    aside = folder / f".{os.getpid()}-{ERROR}"
    try:
        write_json(aside, {"exit_code": exit_code, "message": message})
        (folder / ERROR).hardlink_to(aside)
    except FileExistsError:
        return False
    except OSError:  # most likely the disk is full, and that is what the message is about
        sys.stderr.write(f"{message}\n")
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, also after a power cut."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, sync it and put it in place of ``path`` in one step."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside = Path(stream.name)
    aside.chmod(0o644)
    aside.replace(path)
