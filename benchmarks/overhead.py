"""Where the time of a run goes that is not training: a cold run, two cached ones, and the same pipeline of bare ZenML.

    .venv/bin/python benchmarks/overhead.py

A tiny model and 64 pairs, so that nearly everything is overhead. Each run is a process of its own that runs `run.py
train` with a clock around the parts named below; CPU seconds are those of the process and of all processes that the
part started and waited for. Parts are told without the parts inside of them, so that a column adds up.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("preference_tuning", "pipelines", "steps", "run.py")
ROWS = 64
JOBS = "jobs, with the process they are forked from"
IMPORTS = (
    "from preference_tuning.jobs import forking; "
    "[forking._import(some) for some in (forking.ALL_NEED, *forking.SOME_NEED.values())]"
)
"""What the process does that jobs are forked from; one that is not forked does it too."""

BARE = """
import os
from zenml import pipeline, step
@step
def one() -> str: return "1"
@step
def two(x: str) -> str: return "2"
@step(enable_cache=False)
def last(x: str) -> str: return "3"
@pipeline
def bare():
    x = one()
    for number in range(3):
        x = two.with_options(parameters={})(x)
    last(x)
bare()
"""

Seconds = tuple[float, float]
"""Wall clock, CPU."""


class Clock:
    """Seconds by part, without those of the parts inside."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self._inside: list[list[float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile."""
        began = now()
        self._inside.append([0.0, 0.0])
        try:
            yield
        finally:
            took = [after - before for after, before in zip(now(), began, strict=True)]
            inside = self._inside.pop()
            total = self.parts.setdefault(name, [0.0, 0.0])
            for i in range(2):
                total[i] += took[i] - inside[i]
                if self._inside:
                    self._inside[-1][i] += took[i]

    def around(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Count the calls of a function as a part; its name may follow from the arguments."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


def now() -> Seconds:
    """Return the wall clock and the CPU seconds of this process and of those that it waited for."""
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def inside(told: Path) -> None:
    """Run `run.py train run.yaml` here with the clock, and write what it says."""
    clock = Clock()
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["run.py", "train", "run.yaml"]
    with clock.part("rest"):
        run = importlib.import_module("run")
        with clock.part("imports: config"):
            config = importlib.import_module("preference_tuning.config")
        clock.around(config, "load", "config: read and checked")
        with clock.part("imports: ZenML"):
            importlib.import_module("zenml.client")
            importlib.import_module("zenml.zen_stores.sql_zen_store")
        from zenml.utils import source_utils

        source_utils.set_custom_source_root(str(Path.cwd()))
        with clock.part("imports: ours"):
            importlib.import_module("pipelines.training")
        _watch(clock)
        run.main()
        from preference_tuning.jobs import forking

        with clock.part(JOBS):  # their CPU seconds are counted when it is waited for
            forking.close()
    told.write_text(json.dumps(clock.parts), encoding="utf-8")


def _watch(clock: Clock) -> None:
    """Put the clock around the parts of a run."""
    from zenml.orchestrators.base_orchestrator import BaseOrchestrator
    from zenml.orchestrators.step_launcher import StepLauncher
    from zenml.pipelines.pipeline_definition import Pipeline
    from zenml.steps import BaseStep

    from pipelines import runs
    from preference_tuning import jobs, preflight
    from preference_tuning.preflight import world
    from preference_tuning.registry import result
    from preference_tuning.retraining import fingerprints
    from preference_tuning.tracking import sending
    from steps import models

    class AtOnce(Executor):
        def __init__(self, workers: int) -> None:
            pass

        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(function(*args, **kwargs))
            return done

    def area(name: str, look: Callable[..., Any]) -> Callable[..., Any]:
        def timed(world: Any) -> list[Any]:
            with clock.part(f"checks: {name}"):
                return list(look(world))

        return timed

    world.ThreadPoolExecutor = AtOnce  # a clock counts one thing at a time
    preflight.AREAS = tuple((name, area(name, look)) for name, look in preflight.AREAS)
    clock.around(jobs, "_run_child", lambda module, *_: f"job: {module.removeprefix('preference_tuning.')}")
    clock.around(runs, "reconcile", "runs: killed ones looked for")
    clock.around(fingerprints, "of", "history: fingerprints of the run")
    clock.around(Pipeline, "_compile", "ZenML: compile")
    clock.around(Pipeline, "_run", "ZenML: snapshot and run")
    clock.around(BaseOrchestrator, "run", "ZenML: cached steps")
    clock.around(StepLauncher, "launch", "ZenML: around each step")
    clock.around(BaseStep, "call_entrypoint", lambda step, *_: f"step: {step.name}")
    clock.around(result, "register", "registry: evidence, version, verdict")
    clock.around(models, "record", "registry: ZenML's models")
    clock.around(sending, "written", "tracking: archives for Comet, waited for")


def measure(command: list[str], folder: Path) -> Seconds:
    """Run a command and return what it took with everything that it started."""
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "ZENML_CONFIG_PATH": str(folder.parent / "zenml"), "TQDM_DISABLE": "1",
        "ZENML_ANALYTICS_OPT_IN": "false", "ZENML_LOGGING_VERBOSITY": "WARN", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    began = time.perf_counter()
    with (folder / "log").open("ab") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, (folder / "log").read_text(encoding="utf-8")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure everything and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = project(Path(name))
        me = [sys.executable, str(Path(__file__).resolve())]
        (folder / "bare.py").write_text(BARE, encoding="utf-8")
        bare = [measure([sys.executable, "bare.py"], folder) for _ in range(3)]
        totals, parts = {}, {}
        for run in ("cold", "cached", "again"):
            told = folder / f"{run}.json"
            totals[run] = measure([*me, "--inside", str(told)], folder)
            parts[run] = json.loads(told.read_text(encoding="utf-8"))
        imports = measure([sys.executable, "-c", IMPORTS], folder)
    _table(totals, parts)
    print("\nwhat jobs are forked from, its imports (wall, CPU):", _row({"": imports}))
    print(
        "bare ZenML, five steps (first, cached, again):",
        _row(dict(zip(("first", "cached", "again"), bare, strict=True))),
    )
    in_jobs = parts["cold"][JOBS][1]
    print(
        f"result: cold_wall={totals['cold'][0]:.1f} cold_cpu={totals['cold'][1]:.1f} "
        f"own_process_cpu={totals['cold'][1] - in_jobs:.1f} imports_of_jobs_cpu={imports[1]:.1f} "
        f"jobs_own_work_cpu={in_jobs - imports[1]:.1f} cached_wall={totals['again'][0]:.1f} "
        f"cached_cpu={totals['again'][1]:.1f} bare_cached_wall={bare[-1][0]:.1f} bare_cached_cpu={bare[-1][1]:.1f}"
    )


def _row(seconds: dict[str, Seconds]) -> str:
    return ", ".join(f"{name} {wall:.1f} {cpu:.1f}" for name, (wall, cpu) in seconds.items())


def _table(totals: dict[str, Seconds], parts: dict[str, dict[str, list[float]]]) -> None:
    print(
        "| part | " + " | ".join(f"{run}, wall | CPU" for run in totals) + " |\n|---" + "|---" * 2 * len(totals) + "|"
    )
    for run, total in totals.items():
        seen = [sum(values) for values in zip(*parts[run].values(), strict=True)]
        parts[run]["python's start and end"] = [whole - part for whole, part in zip(total, seen, strict=True)]
    for name in sorted({name for found in parts.values() for name in found}):
        row = [parts[run].get(name, [0.0, 0.0]) for run in totals]
        if max(max(seconds) for seconds in row) >= 0.02:
            print(f"| {name} | " + " | ".join(f"{value:.2f}" for seconds in row for value in seconds) + " |")
    print("| **all** | " + " | ".join(f"**{value:.2f}**" for total in totals.values() for value in total) + " |")


def project(folder: Path) -> Path:
    """Copy the project, make a model and rows, and write a run config."""
    import yaml

    copy = folder / "project"
    copy.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / part, copy / part)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "."], cwd=copy, check=True)
    subprocess.run([sys.executable, __file__, "--model", str(folder / "model"), str(copy / "rows.jsonl")], check=True)
    stage = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0.1,
        "learning_rate": 3e-3,
    }
    parameters = {
        "finetuning_type": "dpo",
        "base_model": {"source": str(folder / "model"), "max_seq_length": 128, "dtype": "float32"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"source": str(copy / "rows.jsonl"), "held_out": 0.25},
        "sft": {**stage, "num_train_epochs": 1},
        "dpo": {**stage, "num_train_epochs": 2, "beta": 0.1, "max_length": 128},
        "evaluation": {"samples": 2, "max_new_tokens": 8, "gate": {"min_prompts": 5, "max_nll_increase": 5.0}},
    }
    (copy / "run.yaml").write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    return copy


def make(model: Path, rows: Path) -> None:
    """Write a random model of 0.3M parameters, and pairs that anything learns."""
    sys.path.insert(0, str(ROOT))
    import memory

    memory.make(model, {"vocab": 4096, "hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv": 2})
    rng = random.Random(0)
    pairs = [
        {
            "prompt": f"Tell me about thing {i}.",
            "chosen": f"It is {rng.choice(['plain', 'old', 'useful'])} and number {i % 7}.",
            "rejected": f"WELL WELL WELL {rng.choice(['WHO', 'WHAT', 'WHY'])} KNOWS, {i % 5}!",
        }
        for i in range(ROWS)
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--model"]:
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
