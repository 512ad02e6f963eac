"""Registries for tests: models to publish, on a disk and on S3, and processes that are killed in the middle."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from preference_tuning import jobs
from preference_tuning.config import RegistryConfig
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry.folder import FolderRegistry

VERDICT = Verdict(decision="promote", candidate="dpo", rules=[])
FACTS: dict[str, Any] = {
    "finetuning_type": "dpo",
    "base_model": {"source": "org/base", "revision": None, "fingerprint": "x"},
    "data": {"source": "rows.jsonl", "train": 9, "held_out": 3, "fingerprint": "d1", "split_fingerprint": "d2"},
    "config": {},
    "code": "c",
    "metrics": {
        "seal": "5" * 64,
        "models": {
            "base": {"rewards/accuracies": {"value": None, "low": None, "high": None}},
            "dpo": {"rewards/accuracies": {"value": 0.75, "low": 0.5, "high": 1.0}},
        },
    },
    "verdict": VERDICT,
    "run": {"zenml_run": "training-1"},
}
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")
KILLED = 9
_servers: list[str] = []


def write_weights(folder: Path, text: str) -> None:
    """Write a file of weights that are the bytes of a text."""
    save_file({"weight": np.frombuffer(text.encode(), np.uint8)}, folder / "adapter_model.safetensors")


def model(folder: Path, weights: str = "w") -> Path:
    """Write what stands for a model; other weights make another version."""
    if not folder.exists():
        folder.mkdir(parents=True)
        write_weights(folder, weights)
        (folder / "adapter_config.json").write_text("{}")
    return folder


def evaluation(folder: Path, against: str | None = None) -> dict[str, Path]:
    """Write what stands for the evidence of a verdict against a champion."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("<html>")
        jobs.write_json(folder / "evaluation.json", {"terms": {"champion": against and {"version": against}}})
    return {"evaluation": folder}


def publish(
    registry: FolderRegistry, folder: Path, weights: str = "w", against: str | None = None, **facts: Any
) -> str:
    """Publish a model and return the id of its version."""
    evidence = evaluation(folder / f"evidence-{weights}", against)
    return registry.publish(
        model(folder / weights, weights), evidence, {"README.md": "# card\n"}, {**FACTS, **facts}
    ).id


def trained(folder: Path, *weights: str) -> None:
    """Have models ready in a folder, for processes that publish them at the same moment."""
    for name in weights:
        model(folder / name, name)
        evaluation(folder / f"evidence-{name}")


def consistent(registry: FolderRegistry) -> tuple[str | None, str | None]:
    """Check what any reader may expect at any time, and return the champion and the one before."""
    ids = registry.ids()
    assert [problem for version in ids for problem in registry.verify(version)] == []
    found = [pointer and pointer.version for pointer in (registry.champion(), registry.previous())]
    assert {version for version in found if version} <= set(ids)
    history = registry.history()
    assert [change.number for change in history] == list(range(1, len(history) + 1))
    assert [history[-1].after, history[-1].before] == found if history else found == [None, None]
    return found[0], found[1]


def left(registry: FolderRegistry) -> list[str]:
    """Return every file that lies in the storage of a registry, hidden ones too; only the locks are left out."""
    storage = registry.storage
    names = storage.sizes("")
    return sorted(name for name in names if not name.endswith(".lock"))


def empty_folders(registry: FolderRegistry) -> list[str]:
    return [
        str(path.relative_to(registry.root))
        for path in registry.root.rglob("*")
        if path.is_dir() and not any(path.iterdir())
    ]


def forked(act: Callable[[], Any]) -> int:
    """Do something in a forked process and return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            os._exit(getattr(error, "exit_code", 1))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(number: int, act: Callable[[], Any]) -> bool:
    """Do something in a forked process that dies before its ``number``-th change on the disk; False: it came so far.

    Changes are files opened for writing, folders made, renames, removals and syncs.
    """
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1
        if counted == number:
            os._exit(KILLED)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            count()

    def watched() -> None:
        fsync = os.fsync
        os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]  # the only change without an audit event
        sys.addaudithook(watch)
        act()

    code = forked(watched)
    assert code in (0, KILLED)
    return code == KILLED


def let_leases_end(registry: FolderRegistry) -> None:
    """Let the time pass after which the dead are taken for dead."""
    for name in (".lock", f"{registry.name}/.lock"):
        text = registry.storage.read(name)
        if text is not None:
            registry.storage.write(name, json.dumps({**json.loads(text), "lease": 0.01}).encode())


def at_once(*acts: Callable[[], Any]) -> list[int]:
    """Do several things at the same moment, each in a forked process, and return their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(acts))

    def act_of(act: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            act()
        except BaseException as error:
            os._exit(getattr(error, "exit_code", 1))
        os._exit(0)

    processes = [context.Process(target=act_of, args=(act,)) for act in acts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [int(process.exitcode or 0) for process in processes]


@contextmanager
def s3() -> Iterator[str]:
    """Serve S3 on loopback and yield its address."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "s3_server.py")], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.communicate()


def use(address: str, patch: pytest.MonkeyPatch, folder: Path) -> str:
    """Let this process find the server, with copies in a folder of its own, and return the URL of a new bucket."""
    from s3fs import S3FileSystem

    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }.items():
        patch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    if address not in _servers:
        S3FileSystem.clear_instance_cache()  # they go on speaking to the server that they were made for
        _servers[:] = [address]
    S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"


def opened(folder: str | Path, name: str = "m") -> FolderRegistry:
    """Open a registry."""
    return FolderRegistry(RegistryConfig(folder=str(folder), name=name))


def copied(template: Path, to: Path) -> FolderRegistry:
    """Return a copy of a registry on a disk."""
    if template.exists():
        shutil.copytree(template, to)
    return opened(to)
