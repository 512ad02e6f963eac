"""Heavy work as a job in its own process: a job file in, a result file out.

The child gives its memory back when it ends, owns its signals, and keeps torch out of the pipeline's process. Its
folder is named by a hash of the work, so the same work started again continues where it was, and finished work is
found finished.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from preference_tuning import events, failures, fingerprint
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.failures import Failure
from preference_tuning.jobs import forking, machine_memory, starter, stopping

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

OTHERS = ("ZENML_", "DISABLE_CREDENTIALS_DISK_CACHING")
"""What begins the names of variables that ZenML sets anew for each step, its keys among them: no business of a job."""

SHUTDOWN_SECONDS = 300
"""How long torchrun waits for its processes to save a checkpoint after a signal, before it kills them."""

BACKOFF_SECONDS = 2.0
"""Before the first retry; twice as long before each further one."""


class Job(BaseModel):
    """What a child reads, and how it is helped along when it fails."""

    retries: int = Field(default=2, ge=0)
    """Fresh processes after transient failures, for each start of the command."""
    parts: int = Field(default=1, ge=1)
    """Pieces that a batch is cut into, of which memory holds one at a time; the work stays the same."""

    @property
    def most_parts(self) -> int:
        """How many pieces are one row each; 1 where nothing is gained by cutting."""
        return 1

    def what_fits(self, facts: dict[str, Any]) -> str:
        """Return what to do when pieces cannot get smaller, from the ``facts`` that the child measured."""
        return "use a machine with more memory"


AnyJob = TypeVar("AnyJob", bound=Job)
Result = TypeVar("Result", bound=BaseModel)


def run(module: str, folder: Path, job: Job, result: type[Result], again: bool = False, processes: int = 1) -> Result:
    """Run ``python -m module folder`` on ``job`` and return its result; at once if this job is already finished.

    After a transient failure it is run again, ``job.retries`` times; when memory ran out, in smaller pieces.

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
    with starter.lock(folder / LOCK, folder) as lock:
        finished = folder / RESULT
        if again and finished.is_file():
            _clear(folder)
        if not finished.is_file():
            _finish(module, folder, job, processes, lock)
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


def _finish(module: str, folder: Path, job: Job, processes: int, lock: int) -> None:
    """Run children until one has done the job.

    Raises:
        PreferenceTuningError: a failure that trying again does not help.
    """
    job, retried = job.model_copy(update={"parts": _parts(folder, job)}), 0
    while failure := _attempt(module, folder, job, processes, lock):
        if failure.kind == "out_of_memory":
            job = _in_smaller_parts(folder, job, failure)
        elif failure.kind == "transient" and retried < job.retries:
            _wait(folder, failure, retried)
            retried += 1
        else:
            raise failure.error()


def _parts(folder: Path, job: Job) -> int:
    """Return the parts that an interrupted job had come to."""
    try:
        kept = json.loads((folder / JOB).read_text(encoding="utf-8")).get("parts", 1)
    except (OSError, ValueError):
        return job.parts
    return max(job.parts, min(int(kept), job.most_parts))


def _in_smaller_parts(folder: Path, job: Job, failure: Failure) -> Job:
    """Return the job with its batches cut once more.

    Raises:
        PreferenceTuningError: they cannot be, or it was one row that did not fit, or none had been read yet.
    """
    parts = min(2 * job.parts, job.most_parts)
    if parts == job.parts or failure.facts.get("rows") in (0, 1):
        raise PreferenceTuningError(f"{failure.message}; {job.what_fits(failure.facts)}")
    message = f"{failure.message}: a batch now goes through in {parts} pieces, the effective batch stays"
    events.add(folder, "out_of_memory", message, parts=parts, **failure.facts)
    print(f"warning: {message}", file=sys.stderr)
    return job.model_copy(update={"parts": parts})


def _wait(folder: Path, failure: Failure, retried: int) -> None:
    """Note the failure and wait, longer each time."""
    seconds = BACKOFF_SECONDS * 2**retried
    events.add(folder, "retried", failure.message, attempt=retried + 2, seconds=seconds)
    print(f"warning: {failure.message}; attempt {retried + 2} starts in {seconds:g} s", file=sys.stderr)
    time.sleep(seconds)


def _attempt(module: str, folder: Path, job: Job, processes: int, lock: int) -> Failure | None:
    """Run one child and return how it failed, or None if the job is done."""
    write_json(folder / JOB, job.model_dump(mode="json"))
    (folder / ERROR).unlink(missing_ok=True)
    killed_before = machine_memory.kills()
    code = _run_child(module, folder, processes, lock)
    if (folder / RESULT).is_file():
        return None  # it is written last: what went wrong after it, in a library's clean-up, changes nothing
    failure = _failure(code, folder)
    # A process that the kernel ended could not tell; if it was one of several, another told that it was gone.
    unexplained = _told(folder) is None or failure.kind == "transient"
    if unexplained and machine_memory.kills() > killed_before:
        message = f"the job in {folder} ran out of memory, and the kernel ended it"
        return Failure(exit_code=1, message=message, kind="out_of_memory")
    return failure


def _run_child(module: str, folder: Path, processes: int, lock: int) -> int:
    environment = _environment(processes)
    forked = forking.start(module, folder, environment, lock) if processes == 1 else None
    child = forked or _program(module, folder, processes, environment, lock)
    try:
        return child.wait()
    except BaseException:
        # Interrupted here: let the child save its checkpoint; its own account of it is the better one.
        child.send_signal(signal.SIGTERM)
        child.wait()
        told = _told(folder)
        if told and told.exit_code == InterruptedJobError.exit_code:
            return InterruptedJobError.exit_code
        raise


def _program(
    module: str, folder: Path, processes: int, environment: dict[str, str], lock: int
) -> "subprocess.Popen[bytes]":
    """Start a job as a program of its own, or several through torchrun."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else []), module, str(folder)]
    # Ctrl-C reaches a process group. torchrun must hear of it once, from here: at a second signal it leaves its
    # processes behind.
    group = 0 if processes > 1 else None
    return subprocess.Popen(command, env=environment, process_group=group, pass_fds=(lock,))


def _environment(processes: int) -> dict[str, str]:
    root = str(fingerprint.PACKAGE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**QUIET, **os.environ, "PYTHONPATH": path, starter.VARIABLE: starter.mark()}
    for name in [name for name in environment if name in LAUNCHER or name.startswith(OTHERS)]:
        del environment[name]
    if processes > 1:
        # torchrun would give each process one thread.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    return environment


def _told(folder: Path) -> Failure | None:
    """Return what the child told of its failure; torchrun's exit code says nothing of it."""
    try:
        return Failure.model_validate_json((folder / ERROR).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or the disk was too full for it
        return None


def _failure(code: int, folder: Path) -> Failure:
    if told := _told(folder):
        return told
    interrupted = InterruptedJobError.exit_code
    if -code in stopping.SIGNALS:
        message = f"the job in {folder} was stopped by {signal.Signals(-code).name}; the same command continues it"
        return Failure(exit_code=interrupted, message=message)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        message = f"the job in {folder} was ended by {name}{hint}; the same command continues it"
        return Failure(exit_code=1, message=message)
    message = f"the job in {folder} ended with exit code {code} and could not write why; its last line is above"
    return Failure(exit_code=code, message=message)


def main(job: type[AnyJob], work: Callable[[Path, AnyJob], BaseModel | None]) -> None:
    """Be the child: read the job of the folder in ``sys.argv``, do ``work``, write the result or the error.

    Of several processes, one returns a result and the others None.
    """
    folder = Path(sys.argv[1])
    try:
        with stopping.interruptible():
            starter.watch()
            result = work(folder, job.model_validate_json((folder / JOB).read_text(encoding="utf-8")))
        if result is not None:
            write_json(folder / RESULT, result.model_dump(mode="json"))
    except Exception as error:
        failure = failures.account(error, folder / LOG)
        try:
            _tell(folder, failure, traceback.format_exc())
        except OSError as problem:
            print(f"{failure.message} (not written to {folder}: {problem.strerror})", file=sys.stderr)
        sys.exit(failure.exit_code)


def _tell(folder: Path, failure: Failure, trace: str) -> None:
    """Write the error, unless another process of the job was first: its end is then the reason for this one's."""
    aside = folder / f".{os.getpid()}-{ERROR}"
    try:
        write_json(aside, failure.model_dump(mode="json"))
        (folder / ERROR).hardlink_to(aside)
    except FileExistsError:
        return
    finally:
        aside.unlink(missing_ok=True)
    (folder / LOG).write_text(trace, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, also after a power cut."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, sync it and put it in place of ``path`` in one step."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside = Path(stream.name)
    aside.chmod(0o644)
    aside.replace(path)
