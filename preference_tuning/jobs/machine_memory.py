"""Memory as the operating system counts it: processes that the kernel ended for want of it, and how much there is."""

import os
import resource
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""A limit beyond this many bytes is none (cgroup v1 writes it so)."""


def kills(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes of this one's memory cgroup the kernel has ended so far; 0 where that is not told."""
    for folder, events, _ in _places(cgroups, own):
        for line in _read(folder / events).splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return 0


def of_machine(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes of main memory that this process may use: the machine's, or those of a lower limit."""
    own_limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [own_limit] if own_limit != resource.RLIM_INFINITY else []
    for folder, _, limit in _places(cgroups, own):
        text = _read(folder / limit).strip()
        limits += [int(text)] if text.isdigit() and int(text) < UNLIMITED else []
    return min(limits)


def available() -> int:
    """Return the bytes of main memory that a new process could take now without making others smaller."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return min(int(size.split()[0]) * 1024, of_machine())
    return of_machine()


def _places(cgroups: Path, own: Path) -> list[tuple[Path, str, str]]:
    """Return the folders of this process's memory cgroup, with the files of its events and its limit.

    A container may see its own cgroup as the root.
    """
    found = []
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found += [(place, "memory.events", "memory.max") for place in (cgroups / path[1:], cgroups)]
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            files = ("memory.oom_control", "memory.limit_in_bytes")
            found += [(place, *files) for place in (root / path[1:], root)]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
