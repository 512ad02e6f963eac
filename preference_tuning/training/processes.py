"""What the processes of one training job say to each other. One process is the same code, and says nothing.

torchrun starts them. A process that fails writes its error and ends; the others notice in their next exchange.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from preference_tuning.errors import ConfigError

PATIENCE = timedelta(hours=2)
"""How long one waits for the others, which may be tokenising or downloading; NCCL's own ten minutes are too few."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""What gloo says when the process at the other end is gone."""


def join(expected: int, device: str) -> None:
    """Meet the other processes of the job, on ``cpu`` or ``cuda``.

    Raises:
        ConfigError: there are not as many as the job is for.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if expected > 1 and found == expected:
        from accelerate import PartialState

        found = int(PartialState(cpu=device == "cpu", timeout=PATIENCE).num_processes)
    if found != expected:
        raise ConfigError(
            f"training.processes: the job is for {expected}, and {found} were started. Start it with run.py, which "
            "calls torchrun (`accelerate launch --cpu` starts one process whatever it is told)"
        )


def leave() -> None:
    """Part from the others after the last exchange; threads that still listen can crash the end of a process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """Return how many processes do the job."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def draw_apart(seed: int) -> None:
    """Give each process dropout masks of its own; the first keeps those of a single one."""
    if rank() > 0:
        torch.manual_seed(seed + rank())


def total(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over the processes; every one of them must call it."""
    if count() == 1:
        return values
    there = values.detach().to(_device(), copy=True)
    distributed.all_reduce(there)
    return there.to(values.device)


def any_of(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set in any process; every one of them must call it."""
    return [number > 0 for number in total(torch.tensor(flags, dtype=torch.float32)).tolist()]


def wait() -> None:
    """Wait until every process is here."""
    total(torch.zeros(1))


@contextmanager
def first_then_others() -> Iterator[None]:
    """Let the first process make what the others then find made."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def lost_another(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    kinds = tuple(getattr(distributed, name) for name in ("DistBackendError", "DistNetworkError"))
    return isinstance(error, kinds) or any(text in str(error) for text in LOST)


def _device() -> torch.device:
    cuda = "nccl" in str(distributed.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
