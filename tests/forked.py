"""Commands of run.py in processes forked from one that has everything imported: a start takes a second instead of ten.

Run as a program, this module is that process: it reads a command a line, and answers with the pid of the process that
does it, or with the exit code of one that ended. A command leads a process group of its own; the jobs that it starts
are forked too, and belong to the group.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Commands:
    """The process that commands are forked from, seen from a test."""

    def __init__(self, zenml: Path) -> None:
        """Start it; ``zenml`` is the folder of ZenML's settings and database, which its import decides on."""
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ZENML_CONFIG_PATH": str(zenml)},
        )

    def start(self, folder: Path, *words: str) -> int:
        """Start ``run.py`` with ``words`` in a folder, and return its pid."""
        return self._ask({"folder": str(folder), "words": words})

    def wait(self, pid: int) -> int:
        """Wait for the end of a command and return its exit code, negative if a signal ended it."""
        return self._ask({"wait": pid})

    def ended(self, pid: int) -> bool:
        """Return whether a command has ended."""
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def close(self) -> None:
        """End the process."""
        self._server.kill()
        self._server.communicate()

    def _ask(self, question: dict[str, Any]) -> int:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


class Forked:
    """Stands in for ``forking.Child``: a fork of the command itself, which has imported the libraries too."""

    def __init__(self, module: str, folder: Path, environment: dict[str, str], lock: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _in_child(lambda: _be_the_job(module, folder, environment, lock))

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code

    def send_signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self._pid, number)


def _be_the_job(module: str, folder: Path, environment: dict[str, str], lock: int) -> None:
    import logging

    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd != lock:
            with contextlib.suppress(OSError):
                os.close(fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    # ZenML's own ones write into the log of the step, behind locks that another thread may have held.
    _open_terminal()
    for logger in (logging.getLogger(), logging.getLogger("zenml")):
        logger.handlers.clear()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, str(folder)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _open_terminal() -> None:
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115


def _be_the_command(folder: Path, words: list[str]) -> None:
    from preference_tuning.jobs import forking

    os.setsid()
    os.chdir(folder)
    terminal = os.open("terminal.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(terminal, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _open_terminal()
    os.environ.update(TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    forking.start = Forked
    sys.argv = ["run.py", *words]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


def _in_child(act: Any) -> None:
    """Do something in a forked process and end it as Python ends a program."""
    code = 0
    try:
        act()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while importing is no answer
    sys.path.insert(0, str(ROOT))
    os.environ.update(ZENML_ANALYTICS_OPT_IN="false", ZENML_LOGGING_VERBOSITY="WARN")
    from zenml.utils import source_utils

    source_utils.set_custom_source_root(str(ROOT))
    import peft  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401
    from zenml.environment import Environment
    from zenml.integrations.registry import integration_registry

    import pipelines.training  # noqa: F401

    integration_registry.activate_integrations()
    # Each run would ask pip for them twice.
    packages = Environment.get_python_packages()
    Environment.get_python_packages = staticmethod(lambda: packages)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _in_child(functools.partial(_be_the_command, Path(asked["folder"]), asked["words"]))
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    _serve()
