"""Jobs that start at once: one process imports torch and its kin, and forks each job, which would import them again.

It starts with the first job, lives as long as the process that runs jobs, and computes nothing itself, so that a fork
of it is what a program of its own would be. Only on Linux, and not where there is an accelerator: CUDA cannot be used
in a process whose parent has asked for its devices, which these libraries do while they are imported.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ALL_NEED = ("torch", "transformers.models.auto.tokenization_auto", "transformers.models.auto.modeling_auto")
SOME_NEED = {
    "preference_tuning.training": ("peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
    "preference_tuning.evaluation": ("peft",),
}
"""What jobs spend their start with, by their modules, and imported with the first of these.

Our own modules are not among them: a job reads them as they are when it starts.
"""

ACCELERATORS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Devices of NVIDIA's drivers (the second is Jetson's), of WSL's and of AMD's."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What a terminal or a supervisor sends to all processes at once: to the jobs, not to the one they are forked from."""

MESSAGE = 65_536


class Child:
    """A job that was forked; of ``subprocess.Popen`` what running it needs."""

    def __init__(self, pid: int, answers: socket.socket) -> None:
        self._answers = answers
        self._code: int | None = None
        self._process: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            self._process = os.pidfd_open(pid)

    def wait(self) -> int:
        """Wait for its end and return its exit code; negative if a signal ended it."""
        if self._code is None:
            answer = self._answers.recv(MESSAGE)
            if not answer and self._process is not None:
                # The one that would tell was killed. A job that nobody hears of must not go on.
                self.send_signal(signal.SIGTERM)
                select.select([self._process], [], [])
                close()
            self._code = int(answer) if answer else -signal.SIGKILL
            self._answers.close()
            if self._process is not None:
                os.close(self._process)
                self._process = None
        return self._code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)


class _Parent:
    """The process that jobs are forked from, seen from the one that runs them."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self._owner = environment, os.getpid()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "preference_tuning.jobs"]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)

    def ask(self, module: str, folder: Path, lock: int) -> socket.socket:
        """Ask for a job, and return where its pid and then its exit code are told."""
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps({"module": module, "folder": str(folder), "cwd": str(Path.cwd())}).encode()
            socket.send_fds(self._requests, [request], [theirs.fileno(), 1, 2, lock])
        return answers

    def ended(self) -> bool:
        """Return whether it was killed, or could not import a library."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Let it end as soon as its jobs have."""
        if self._owner == os.getpid():  # a fork of this process has it from before
            with contextlib.suppress(OSError):  # it has ended
                self._requests.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a job may wait to see this process gone
                self._process.wait(1.0)
        self._requests.close()


_parent: _Parent | None = None
_one_at_a_time = threading.Lock()


def start(module: str, folder: Path, environment: dict[str, str], lock: int) -> Child | None:
    """Start ``python -m module folder`` as a fork and return it; None if it has to be started as a program.

    Args:
        module: the job's entry point.
        folder: of the job.
        environment: of the job.
        lock: the descriptor of the job's lock, which it inherits.
    """
    if not _possible():
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with _one_at_a_time:
            answers = _with(environment).ask(module, folder, lock)
        child = _told(answers)
    except OSError:
        child = None
    # If there is none, a library could not be imported: a program of its own will say what is wrong with it.
    return child


def _told(answers: socket.socket) -> Child | None:
    """Return the job whose pid is told as soon as the libraries are imported, or None at the end of answers."""
    try:
        pid = answers.recv(MESSAGE)
    except BaseException:
        # Interrupted here: the job is not to go on alone.
        if pid := answers.recv(MESSAGE):
            child = Child(int(pid), answers)
            child.send_signal(signal.SIGTERM)
            child.wait()
        raise
    if not pid:
        answers.close()
    return Child(int(pid), answers) if pid else None


def close() -> None:
    """Let the process that jobs are forked from end, if there is one."""
    global _parent
    if _parent is not None:
        _parent.close()
    _parent = None


atexit.register(close)


def _possible() -> bool:
    return sys.platform == "linux" and not any(Path(device).exists() for device in ACCELERATORS) and _has_pidfds()


@functools.cache
def _has_pidfds() -> bool:
    """Return whether the kernel tells of a process's end through a descriptor; old ones and some containers do not."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _with(environment: dict[str, str]) -> _Parent:
    """Return the process to fork from for an environment, which libraries look at while they are imported."""
    global _parent
    if _parent is None or _parent.ended() or _parent.environment != environment:
        close()
        _parent = _Parent(environment)
    return _parent


class Request(NamedTuple):
    """What a fork is to be."""

    module: str
    folder: str
    cwd: str


class _Running(NamedTuple):
    """A job, seen from the process that it was forked from."""

    pid: int
    process: int
    """Becomes readable when it ends."""
    answers: socket.socket


def serve() -> Request | None:
    """Fork a job for each request that comes through stdin. Returns in the jobs; None at the end, in the parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # a fifth of the time of these imports, for objects that stay
    requests = _Requests(socket.socket(fileno=os.dup(0)))
    _import(ALL_NEED)
    while requests.wait():
        if request := requests.attend():
            return request
    return None


def _import(libraries: Sequence[str]) -> None:
    for library in libraries:
        importlib.import_module(library)
    gc.freeze()  # what is shared stays shared


class _Requests:
    """Requests for jobs, and the jobs that run."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection
        self._jobs: list[_Running] = []
        self._ready: list[int] = []

    def wait(self) -> bool:
        """Wait for something to attend to; False: there will be nothing any more."""
        awaited = [job.process for job in self._jobs]
        if self._connection:
            awaited.append(self._connection.fileno())
        self._ready = select.select(awaited, [], [])[0] if awaited else []
        return bool(self._ready)

    def attend(self) -> Request | None:
        """Tell of jobs that ended, and fork one if asked to; returns its request in the job, and None in the parent."""
        for job in [job for job in self._jobs if job.process in self._ready]:
            _bury(job)
            self._jobs.remove(job)
        if self._connection is None or self._connection.fileno() not in self._ready:
            return None
        message, descriptors, _, _ = socket.recv_fds(self._connection, MESSAGE, 4)
        if not message:
            self._connection.close()
            self._connection = None
            return None
        request = Request(**json.loads(message))
        _import(SOME_NEED.get(request.module, ()))
        if started := _fork(descriptors):
            self._jobs.append(started)
            return None
        for connection in (self._connection, *(job.answers for job in self._jobs)):
            connection.close()
        for job in self._jobs:
            os.close(job.process)
        gc.enable()
        os.chdir(request.cwd)
        with contextlib.suppress(OSError):  # what `top` shows
            Path("/proc/self/comm").write_text(request.module.rpartition(".")[2], encoding="utf-8")
        return request


def _fork(descriptors: list[int]) -> _Running | None:
    """Fork a job and tell its pid, or be the job: then return None, with the signals and the terminal of a program.

    Args:
        descriptors: where to answer, the job's output and errors, and its lock.
    """
    answer, *streams, lock = descriptors
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none may come before the job heeds it
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        _be_a_program(streams)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for stream in streams:
        os.close(stream)
    if pid == 0:
        return None
    os.close(lock)
    answers = socket.socket(fileno=answer)
    with contextlib.suppress(OSError):  # who asked may be gone
        answers.send(str(pid).encode())
    return _Running(pid, os.pidfd_open(pid), answers)


def _be_a_program(streams: list[int]) -> None:
    """Take the signals and the terminal of a program."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for place, stream in enumerate([nothing, *streams]):
        os.dup2(stream, place)
    os.close(nothing)


def _bury(job: _Running) -> None:
    """Tell how a job ended."""
    os.close(job.process)
    code = os.waitstatus_to_exitcode(os.waitpid(job.pid, 0)[1])
    with job.answers, contextlib.suppress(OSError):  # who asked may be gone
        job.answers.send(str(code).encode())
