"""Room on disk: whether there is enough before training starts, and one clear error when it runs out midway."""

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preference_tuning.errors import PreferenceTuningError

MB = 1_000_000

COPIES = 3
"""Checkpoints that lie on disk at once: two that are kept, and the one that is being written."""

FIXED = 64_000
"""Bytes of a checkpoint's small files: settings, schedule, random states, manifest."""

OF_TENSOR = 1_000
"""Bytes by which files say what a tensor and its moments are."""

STATE_OF_STEP = 1_100
"""Bytes that a step adds to trainer_state.json at most; DPO logs most."""

RESERVE, RESERVED = ".reserve", 64_000
"""A file in the folder of the checkpoints, and its bytes: room for the error that says that there is none."""

FULL = (errno.ENOSPC, errno.EDQUOT)
SAYS_FULL = ("No space left on device", "Disk quota exceeded")
WRITE_FAILED = ("inline_container.cc", "PytorchStreamWriter", "iostream error")
"""What torch.save says when it cannot write; it does not say why."""

SMALLEST_OF_8_BITS = 4096
"""Parameters of a tensor from which on bitsandbytes keeps its moments in 8 bits."""


def weights_size(parameters: Iterable[Any], tokenizer: Any) -> int:
    """Return the bytes of a stage's result: of the parameters that train, and of the tokenizer's files."""
    vocabulary = len(tokenizer.backend_tokenizer.to_str().encode()) if tokenizer.is_fast else 0
    return sum(int(p.numel() * p.element_size()) for p in parameters if p.requires_grad) + vocabulary


def checkpoint_size(parameters: Iterable[Any], tokenizer: Any, optimizer: str, steps: int, sharded: bool) -> int:
    """Return the bytes that a checkpoint is expected to have.

    Args:
        parameters: of the model; those that train are in it, with their two moments.
        tokenizer: whose files lie in it.
        optimizer: TRL's name of it.
        steps: optimizer steps of the training, whose metrics it holds.
        sharded: whether the weights are shared out over processes; they are then stored a second time.
    """
    trained = [p for p in parameters if p.requires_grad]
    again = sum(p.numel() * p.element_size() for p in trained) if sharded else 0
    moments = sum(_moments(p, optimizer) + OF_TENSOR for p in trained)
    return weights_size(trained, tokenizer) + again + moments + FIXED + steps * STATE_OF_STEP


def _moments(parameter: Any, optimizer: str) -> int:
    size = parameter.numel()
    if optimizer.endswith("8bit") and size >= SMALLEST_OF_8_BITS:
        return int(2 * size)
    return int(2 * size * parameter.element_size())


def check(folder: Path, checkpoint: int, result: int) -> None:
    """See that the disk of ``folder`` has room for the training, beside the checkpoints that lie there already.

    Args:
        folder: of the checkpoints.
        checkpoint: bytes of one.
        result: bytes of what the stage leaves.

    Raises:
        PreferenceTuningError: it has not.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = COPIES * checkpoint + result - there
    free = _free(folder)
    if free < needed:
        raise PreferenceTuningError(
            f"output_dir: the disk of {folder.parent} has {_mb(free)} MB free, and {_mb(needed)} MB are needed "
            f"for {COPIES} checkpoints and the result; free some space, or set output_dir to another disk"
        )


def reserve(folder: Path) -> None:
    """Hold the room back in which an error can be told on a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESERVE).write_bytes(bytes(RESERVED))


def release(folder: Path) -> None:
    """Give back what ``reserve`` holds."""
    (folder / RESERVE).unlink(missing_ok=True)


def is_full(error: BaseException | None, folder: Path, checkpoint: int) -> bool:
    """Return whether an error, or one that led to it, says that the disk of ``folder`` is full.

    torch does not say why it cannot write: it is believed if less than ``checkpoint`` bytes are free.
    """
    while error is not None:
        text = str(error)
        if (isinstance(error, OSError) and error.errno in FULL) or any(said in text for said in SAYS_FULL):
            return True
        if any(said in text for said in WRITE_FAILED) and _free(folder) < checkpoint:
            return True
        error = error.__cause__ or error.__context__
    return False


def full(folder: Path, checkpoint: int, intact: Path | None) -> PreferenceTuningError:
    """Return the error for a disk that is full: ``checkpoint`` bytes are needed; ``intact`` is what training has."""
    left = f"{intact.name} is intact" if intact else "no checkpoint was written yet"
    return PreferenceTuningError(
        f"output_dir: the disk of {folder.parent} is full: {_mb(_free(folder))} MB are free and a checkpoint needs "
        f"{_mb(checkpoint)} MB; {left}. Free some space: the same command continues"
    )


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _mb(size: int) -> str:
    return f"{size / MB:,.1f}"
