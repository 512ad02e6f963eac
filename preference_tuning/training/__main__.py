"""The training job's process: ``python -m preference_tuning.training FOLDER``."""

from __future__ import annotations

from pathlib import Path

from preference_tuning import failures, jobs
from preference_tuning.errors import OutOfMemoryError, TransientError
from preference_tuning.training.job import TrainingJob, TrainingRecord


def main(folder: Path, job: TrainingJob) -> TrainingRecord | None:
    """Train the stage in ``folder`` and return its record, in the first of its processes."""
    from preference_tuning.models import backend, compute
    from preference_tuning.training import memory, processes

    try:
        processes.join(job.processes, compute.device_of(job.base_model))
        backend.activate(job.base_model)
        from preference_tuning.training.stage import Stage

        record = Stage(folder, job).run()
        processes.leave()
        return record
    except (RuntimeError, MemoryError) as error:
        if failures.kind_of(error) == "out_of_memory":
            raise OutOfMemoryError(f"{job.stage.upper()} ran out of memory", memory.facts()) from error
        if processes.lost_another(error):
            message = "another process of the job ended without a word (out of memory?); the same command continues it"
            raise TransientError(message) from error
        raise


if __name__ == "__main__":
    jobs.main(TrainingJob, main)
