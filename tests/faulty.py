"""Training jobs in processes of their own, with faults put into them: killed at a step, in a write, out of disk.

The processes are forked from one that has torch, transformers and TRL imported, so that a job starts in a fraction of a
second. A fault is called in the child before its job starts; it has to be picklable: a function of a module, or a
``functools.partial`` of one. Faults can be combined with ``both``.
"""

import contextlib
import functools
import gc
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

IMPORTED = ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "peft", "datasets")
KILLED = -signal.SIGKILL

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(IMPORTED))


def place(work: TrainingJob, folder: Path | None = None) -> Path:
    """Write the job file as ``job.train`` does, in ``folder`` or in the one that it takes, and return the folder."""
    name = f"{work.stage}-{fingerprint.of_value(work.identity())[:16]}"
    folder = folder or (work.output_dir / "jobs" / name).absolute()
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


WHOLE_WRITE = 99
"""The exit code of a process that came to its second checkpoint."""


def kill_in_write(number: int, checkpoints: Path) -> None:
    """Let the process be killed at an operation of the first checkpoint that it writes, counted from 1.

    Operations are: a folder is made, a file is opened for writing, a file of weights or of torch is half written, a
    file or folder is renamed, a folder is removed. Where there are fewer the process ends with ``WHOLE_WRITE``.
    """
    aside = checkpoints / ".writing"
    done, saves = 0, 0

    def now(what: str, path: Path) -> bool:
        nonlocal done
        done += saves > 0
        if saves > 0 and done == number:
            os.write(2, f"killed at {what} {path.name}\n".encode())
            return True
        return False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal saves
        path = _changed(event, arguments)
        if path is None or checkpoints not in path.parents:
            return
        saves += event == "os.mkdir" and path.parent == aside
        if saves > 1:
            os._exit(WHOLE_WRITE)
        if now(event, path):
            kill()

    sys.addaudithook(hook)
    _half_written(now)


def _changed(event: str, arguments: tuple[Any, ...]) -> Path | None:
    """Return what an operation that Python is about to do makes or takes away."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(path, str | bytes | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return Path(os.fsdecode(path)) if writes else None
    if event == "os.rename":
        return Path(os.fsdecode(arguments[1]))
    if event == "os.mkdir":
        path = Path(os.fsdecode(arguments[0]))
        return None if path.is_dir() else path
    if event == "os.rmdir":
        name, folder = arguments
        return Path(name) if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink() / name
    return None


def _half_written(now: Callable[[str, Path], bool]) -> None:
    """Let the process be killed with half of a file on disk, where that file is written outside of Python."""
    import safetensors.torch
    import torch
    from transformers import PreTrainedTokenizerFast

    save_tokenizer = PreTrainedTokenizerFast._save_pretrained

    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        def write(_: None, path: Path) -> Any:
            return save_tokenizer(self, str(path.parent), *args, **kwargs)

        return wrap(write)(None, Path(save_directory) / "tokenizer.json")

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def wrapped(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            end = now("half of", Path(path))
            done = write(what, path, *args, **kwargs)
            if end:
                os.truncate(path, Path(path).stat().st_size // 2)
                kill()
            return done

        return wrapped

    PreTrainedTokenizerFast._save_pretrained = save_pretrained
    torch.save = wrap(torch.save)
    safetensors.torch.serialize_file = wrap(safetensors.torch.serialize_file)


def kill_before(name: str) -> None:
    """Let the process be killed when it is about to put a file of this name in place."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(arguments[1])).name == name:
            kill()

    sys.addaudithook(hook)


def fill_disk(step: int, filler: Path, left: int) -> None:
    """Let the disk of ``filler`` have only ``left`` bytes when the process comes to an optimizer step."""
    in_step(step, functools.partial(fill, filler, left))


def fill(filler: Path, left: int) -> None:
    """Write a file that leaves ``left`` bytes on its disk."""
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(filler, max(0, filler.stat().st_size - left))


def _terminal(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.txt"


def _be_the_child(folder: Path, fault: Fault | None) -> None:
    os.environ.update(jobs.QUIET)
    terminal = os.open(_terminal(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    gc.freeze()  # what the server imported need not be looked through again
    if fault is not None:
        fault()
    from preference_tuning.training.__main__ import main

    sys.argv = ["", str(folder)]
    jobs.main(TrainingJob, main)
