"""Training jobs in processes of their own, with faults put into them: killed at a step, in a write, out of disk.

The processes are forked from one that has torch, transformers and TRL imported, so that a job starts in a fraction of a
second. A fault is called in the child before its job starts; it has to be picklable: a function of a module, or a
``functools.partial`` of one. Faults can be combined with ``both``.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint, jobs
from preference_tuning.training.job import TrainingJob

Fault = Callable[[], None]

IMPORTED = ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "peft", "datasets", "comet_ml")
KILLED = -signal.SIGKILL

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(IMPORTED))


def place(work: TrainingJob) -> Path:
    """Write the job file as ``job.train`` does, in the folder where it does, and return the folder."""
    name = f"{work.stage}-{fingerprint.of_value(work.identity())[:16]}"
    folder = (work.output_dir / "jobs" / name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    jobs.write_json(folder / jobs.JOB, work.model_dump(mode="json"))
    return folder


def run(folder: Path, fault: Fault | None = None, timeout: float = 120) -> int:
    """Run the job that lies in ``folder`` and return the exit code of its process, negative if a signal ended it."""
    (folder / jobs.ERROR).unlink(missing_ok=True)
    child = SERVER.Process(target=_be_the_child, args=(folder, fault))
    child.start()
    child.join(timeout)
    assert child.exitcode is not None, f"the job in {folder} did not end within {timeout} s"
    return child.exitcode


def said(folder: Path) -> str:
    """Return what the processes of a job have written to the terminal."""
    return _terminal(folder).read_text(encoding="utf-8")


def both(first: Fault, second: Fault) -> None:
    """Put two faults into one process."""
    first()
    second()


def kill_at_step(step: int) -> None:
    """Let the process be killed within an optimizer step, after the pass and before the update."""
    in_step(step, kill)


def in_step(step: int, act: Fault) -> None:
    """Call ``act`` within an optimizer step, after the forward and backward pass and before the update."""
    import transformers

    plain = transformers.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            act()
        return loss

    transformers.Trainer.training_step = training_step


def kill() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def _terminal(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.txt"


def _be_the_child(folder: Path, fault: Fault | None) -> None:
    os.environ.update(jobs.QUIET)
    terminal = os.open(_terminal(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    if fault is not None:
        fault()
    from preference_tuning.training.__main__ import main

    sys.argv = ["", str(folder)]
    jobs.main(TrainingJob, main)
