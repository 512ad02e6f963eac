"""The evaluation job's process: ``python -m preference_tuning.evaluation FOLDER``."""

from __future__ import annotations

from pathlib import Path

from preference_tuning import jobs
from preference_tuning.evaluation.job import Evaluation, EvaluationJob


def main(folder: Path, job: EvaluationJob) -> Evaluation:
    """Measure every model of the job, write the evidence, and return the evaluation."""
    from preference_tuning.models import backend

    backend.activate(job.base_model)
    from preference_tuning.evaluation.measuring import Measuring

    return Measuring(folder, job).run()


if __name__ == "__main__":
    jobs.main(EvaluationJob, main)
