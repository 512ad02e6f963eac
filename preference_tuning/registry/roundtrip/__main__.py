"""The process of a round trip: ``python -m preference_tuning.registry.roundtrip FOLDER``."""

from __future__ import annotations

from pathlib import Path

from preference_tuning import jobs
from preference_tuning.registry.roundtrip import RoundTrip, RoundTripJob


def main(folder: Path, job: RoundTripJob) -> RoundTrip:
    """Load the published model and compare it with its probes."""
    from preference_tuning.registry.roundtrip import comparing

    return comparing.round_trip(job)


if __name__ == "__main__":
    jobs.main(RoundTripJob, main)
