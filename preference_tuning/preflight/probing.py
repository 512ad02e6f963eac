"""The probe's process: a stage, or the evaluation, on a few rows of the data, with a clock beside it.

``python -m preference_tuning.preflight.probing FOLDER``. What runs is the real job: real weights, the engine, TRL's
loop; only the rows are few.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from preference_tuning import jobs
from preference_tuning.evaluation.job import EvaluationJob
from preference_tuning.models import backend
from preference_tuning.training.job import TrainingJob

MODULE = "preference_tuning.preflight.probing"


class ProbeJob(jobs.Job):
    """One of the two."""

    training: TrainingJob | None = None
    evaluation: EvaluationJob | None = None


class Probe(BaseModel):
    """Seconds and bytes of a job on few rows."""

    steps: list[float] = []
    """Of each optimizer step."""
    reference: float = 0.0
    """Of the pass that gives DPO its reference, over training and held-out rows."""
    scoring: float = 0.0
    """Of one evaluation on the held-out rows."""
    answering: float = 0.0
    """Of the answers to held-out prompts."""
    rest: float = 0.0
    """Of everything else: loading, tokenising, saving."""
    peak: int
    """Of memory: resident on a CPU, allocated on a CUDA device."""


def main(folder: Path, job: ProbeJob) -> Probe:
    """Run the job and return what the clock says."""
    return _train(folder, job.training) if job.training else _evaluate(folder, job.evaluation)


def _train(folder: Path, work: TrainingJob) -> Probe:
    backend.activate(work.base_model)
    from transformers import TrainerCallback

    from preference_tuning.training.stage import Stage

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.scoring = 0.0
            self._last = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._last = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps.append(time.monotonic() - self._last)
            self._last = time.monotonic()

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self.scoring = time.monotonic() - self._last

    class Timed(Stage):
        clock, passed = Clock(), 0.0

        def _trainer(self, *args: Any) -> Any:
            trainer = super()._trainer(*args)
            trainer.add_callback(self.clock)
            return trainer

        def _with_reference(self, *args: Any) -> Any:
            start = time.monotonic()
            rows = super()._with_reference(*args)
            self.passed = time.monotonic() - start
            return rows

    start = time.monotonic()
    stage = Timed(folder, work)
    stage.run()
    clock = stage.clock
    timed = sum(clock.steps) + clock.scoring + stage.passed
    rest = time.monotonic() - start - timed
    return Probe(steps=clock.steps, reference=stage.passed, scoring=clock.scoring, rest=rest, peak=_peak())


def _evaluate(folder: Path, work: EvaluationJob | None) -> Probe:
    assert work is not None
    backend.activate(work.base_model)
    from preference_tuning.evaluation.measuring import Measuring

    class Timed(Measuring):
        scoring = answering = 0.0

        def _score(self, pairs: Any) -> None:
            start = time.monotonic()
            super()._score(pairs)
            self.scoring = time.monotonic() - start

        def _answer(self) -> None:
            start = time.monotonic()
            super()._answer()
            self.answering = time.monotonic() - start

    start = time.monotonic()
    measuring = Timed(folder, work)
    measuring.run()
    rest = time.monotonic() - start - measuring.scoring - measuring.answering
    return Probe(scoring=measuring.scoring, answering=measuring.answering, rest=rest, peak=_peak())


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    jobs.main(ProbeJob, main)
