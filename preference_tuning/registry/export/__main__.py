"""The process that merges: ``python -m preference_tuning.registry.export FOLDER``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from preference_tuning import jobs
from preference_tuning.registry.export.merge import Merged, MergeJob


def main(folder: Path, job: MergeJob) -> Merged:
    """Merge, then load what was written and compare it with the probes of the version."""
    from preference_tuning.evaluation import probes as probes_of
    from preference_tuning.models import merging, published, scoring
    from preference_tuning.models.source import ModelSource
    from preference_tuning.registry.roundtrip import comparing

    for left in job.target.iterdir():  # of an attempt before
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    count = merging.merge(job.base_model, job.source, job.model, job.output_dir, job.dtype, job.target)
    quantised = job.base_model.load_in_4bit
    if job.probes is None:
        return Merged(parameters=count, compared=None, quantised_base=quantised)
    probes = probes_of.read(job.probes)
    whole = ModelSource(kind="directory", location=str(job.target), fingerprint="")
    config = job.base_model.model_copy(update={"load_in_4bit": False})
    loaded = published.load(config, whole, job.target, job.output_dir, merging.exact())
    tolerance = max(probes.tolerance, scoring.token_tolerance(job.dtype))
    compared = comparing.compare(loaded, probes, tolerance)
    if quantised and not compared.holds:
        print(f"warning: the adapter learned on a base model in 4 bits; {compared}", file=sys.stderr)
    return Merged(parameters=count, compared=compared, quantised_base=quantised)


if __name__ == "__main__":
    jobs.main(MergeJob, main)
