"""What this machine has: CPUs, instructions, a GPU, packages. torch is imported by the jobs only."""

import importlib.util
import math
import os
import platform
from pathlib import Path
from typing import Any

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def describe() -> dict[str, Any]:
    """Return what tells one machine from another; a CPU's name alone does not, a virtual one may hide instructions."""
    import torch

    abilities = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "abilities": abilities, "usable_cpus": usable_cpus(), "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, within the quota of its container."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return min(affine, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return affine


def has_package(name: str) -> bool:
    """Return whether a package can be imported; it is not."""
    return importlib.util.find_spec(name) is not None
