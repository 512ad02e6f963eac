"""Every run that starts here is in the history, whatever started it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zenml.models import PipelineRunResponse

from pipelines import ending, naming
from pipelines.runs import result_of
from preference_tuning.config import RunConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.retraining import fingerprints
from preference_tuning.retraining.history import History, Record, Run, now, recorded

Ended = Callable[[PipelineRunResponse | None], PipelineRunResponse | None]


@contextmanager
def written_down(config: RunConfig | None, trigger: str | None) -> Iterator[Ended]:
    """Write down that a run starts, and how it ends; yield what is to be told of it then.

    Args:
        config: of the run; None: nothing is written down.
        trigger: who or what starts it; None: as the environment says.
    """
    if config is None:
        yield lambda run: run
        return
    run = Run(
        name=config.registry.name,
        trigger=trigger or naming.trigger(),
        started=now(),
        fingerprints=fingerprints.of(config),
    )
    records: list[Record] = []
    try:
        with recorded(History(Path(config.output_dir)), run) as record:
            records.append(record)
            yield lambda ended: _end(record, ended)
    finally:
        for record in records:
            ending.after(config, record.run)


def _end(record: Record, run: PipelineRunResponse | None) -> PipelineRunResponse | None:
    if run is None or not run.status.is_finished:
        record.hand_over()
        return run
    try:
        record.complete(result_of(run))
    except PreferenceTuningError as error:
        record.fail(error)
    return run
