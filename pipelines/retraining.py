"""`run.py retrain`: the decision of the library, wired to the pipeline.

ZenML is imported only when something is trained: a night without news takes a second.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from pipelines import ending, naming
from preference_tuning import continuing
from preference_tuning.config import RunConfig, RunFile, load
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.retraining import shown
from preference_tuning.retraining.attempt import attempt
from preference_tuning.retraining.history import Result, Run


def command(path: Path, overrides: Sequence[str], trigger: str, as_json: bool) -> int:
    """Retrain if there is reason to, print what became of it, and return the exit code.

    Args:
        path: of the run config.
        overrides: such as ``dpo.beta=0.1``.
        trigger: who or what starts it.
        as_json: print one line of JSON; everything else goes to stderr then.
    """
    with _printed(as_json) as out:
        try:
            ended = retrain(load(path, overrides), path.name, trigger)
        except PreferenceTuningError as error:  # it did not come to a run
            if as_json:
                told = {"outcome": "failed", "exit_code": error.exit_code, "error": str(error)}
                print(json.dumps(told, ensure_ascii=False), file=out)
            raise
        print(shown.as_json(ended) if as_json else shown.line(ended), file=out)
    if ended.error:
        print(f"error: {ended.error}", file=sys.stderr)
    if ended.then:
        print(f"{continuing.HEAD}{ended.then}", file=sys.stderr)
    return ended.exit_code or 0


def retrain(file: RunFile, name: str, trigger: str) -> Run:
    """Retrain if there is reason to, and return what became of it.

    Args:
        file: the run config.
        name: of its file.
        trigger: who or what starts it.

    Raises:
        ConfigError: ``trigger`` cannot be part of a run's name, or ``output_dir`` cannot be written, or ZenML is to
            start the runs.
    """
    if "schedule" in file.document:
        raise ConfigError("schedule: ZenML is to start the runs of this config, so retrain cannot; remove the section")
    naming.check_trigger(trigger, "--trigger")
    run = attempt(file.config, trigger, lambda config: _train(_document(file, config), name, trigger))
    ending.after(file.config, run)
    return run


def _train(document: dict[str, Any], name: str, trigger: str) -> Result:
    """Run the pipeline, wait for its end, and return what it left in the registry."""
    from pipelines.runs import finished, result_of
    from pipelines.training import training

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / name
        written.write_text(yaml.safe_dump(document), encoding="utf-8")
        pipeline = training.copy()
        pipeline.commanded, pipeline.trigger = True, trigger
        run = pipeline.with_options(config_path=str(written))()
    assert run is not None, "only a schedule makes no run"
    return result_of(finished(run))


def _document(file: RunFile, config: RunConfig) -> dict[str, Any]:
    """Return what ZenML reads: the file with what was decided for this run."""
    parameters = dict(file.document["parameters"])
    if config.training.unfinished != file.config.training.unfinished:
        parameters["training"] = {**parameters.get("training", {}), "unfinished": config.training.unfinished}
    return {**file.document, "parameters": parameters}


@contextmanager
def _printed(alone: bool) -> Iterator[TextIO]:
    """Yield where the outcome is printed; ``alone``: whatever else this process and its jobs print goes to stderr."""
    if not alone:
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            yield out
        finally:
            sys.stdout.flush()
            out.flush()
            os.dup2(out.fileno(), 1)
