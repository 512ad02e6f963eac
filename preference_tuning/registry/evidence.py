"""What a result proves before it is registered: that it is finished, healthy, and the one that was measured."""

from collections.abc import Iterator
from pathlib import Path

from preference_tuning import fingerprint
from preference_tuning.data.table import Manifest
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.models import weights
from preference_tuning.models.source import ModelSource
from preference_tuning.tracking import spool
from preference_tuning.training.job import METRICS, RECORD, TrainingRecord


def records(training: dict[str, Path]) -> dict[str, TrainingRecord]:
    """Return the training record of each stage that has one, from the stages' evidence folders."""
    paths = {stage: folder / RECORD for stage, folder in training.items()}
    return {
        stage: TrainingRecord.model_validate_json(path.read_text(encoding="utf-8"))
        for stage, path in paths.items()
        if path.is_file()
    }


def problems(
    stages: tuple[str, ...],
    adapter: Path,
    training: dict[str, Path],
    evaluation: Path,
    source: ModelSource,
    manifest: Manifest,
) -> list[str]:
    """Return why a result must not be registered, a line for each reason; nothing if it is finished and proven.

    Args:
        stages: that the run consists of, the last one being the one that ``adapter`` comes from.
        adapter: folder of the last stage's weights.
        training: evidence folder of each stage.
        evaluation: evidence folder of the evaluation.
        source: the base model of the run.
        manifest: of the run's dataset.
    """
    found = records(training)
    if missing := [stage for stage in stages if stage not in found]:
        return [f"{stage.upper()} has no record of finished work" for stage in missing]
    told = [line for stage in stages for line in _of_stage(found[stage], training[stage], source, manifest)]
    if "dpo" in stages:
        told += _of_reference(found["sft"], found["dpo"])
    told += _of_weights(adapter, found[stages[-1]])
    return told + list(_of_evaluation(evaluation, {s: found[s].adapter_hash for s in stages}, source, manifest))


def _of_stage(record: TrainingRecord, folder: Path, source: ModelSource, manifest: Manifest) -> Iterator[str]:
    stage = record.stage.upper()
    if record.steps != record.max_steps:
        yield f"{stage} ended at step {record.steps} of {record.max_steps}"
    if record.identity["data_fingerprint"] != manifest.split_fingerprint:
        yield f"{stage} was trained on other data"
    if record.identity["base_model_fingerprint"] != source.fingerprint:
        yield f"{stage} was trained from another base model"
    if problem := _of_metrics(record, folder / METRICS):
        yield f"the metrics of {stage} {problem}"


def _of_metrics(record: TrainingRecord, path: Path) -> str | None:
    """Return what is wrong with the logged steps of a stage: one that is missing, or that is there twice."""
    if not path.is_file():
        return "are missing"
    name = f"{record.stage}/train/loss"
    steps = [step for step, _ in spool.series(list(spool.read(path)), name)]
    if steps != sorted(set(steps)):
        return "hold a step twice, or out of order"
    every = record.identity[record.stage]["logging_steps"]
    # Before a forced resume another interval may have held.
    first = record.forced["step"] if record.forced else 0
    wanted = {s for s in range(first + 1, record.max_steps + 1) if s % every == 0 or s == record.max_steps}
    if gaps := sorted(wanted - set(steps)):
        return f"have a gap at step {gaps[0]} of {record.max_steps}"
    return None


def _of_reference(sft: TrainingRecord, dpo: TrainingRecord) -> Iterator[str]:
    if dpo.identity["adapter_hash"] != sft.adapter_hash:
        yield "DPO did not start from this SFT result"
    if dpo.reference is None:
        yield "DPO has no proof of its reference"
    elif dpo.reference.sft_adapter_hash != sft.adapter_hash:
        yield "the proof of DPO's reference is that of another SFT result"


def _of_weights(adapter: Path, record: TrainingRecord) -> Iterator[str]:
    if problem := weights.problem(adapter):
        yield f"the weights are not healthy: {problem}"
    if fingerprint.of_directory(adapter) != record.adapter_hash:
        yield f"the weights are not those that {record.stage.upper()} wrote"


def _of_evaluation(
    folder: Path, adapter_hashes: dict[str, str], source: ModelSource, manifest: Manifest
) -> Iterator[str]:
    if not (folder / evaluation_job.SUMMARY).is_file():
        yield "the evaluation has no summary of finished work"
        return
    evaluation: Evaluation = evaluation_job.load_summary(folder)
    if evaluation.adapter_hashes != adapter_hashes:
        yield "the evaluation is of other weights"
    if evaluation.data_fingerprint != manifest.split_fingerprint:
        yield "the evaluation is on other data"
    if evaluation.base_model_fingerprint != source.fingerprint:
        yield "the evaluation is against another base model"
    path = folder / evaluation_job.METRICS
    points = spool.read(path) if path.is_file() else ()
    told = [(name, value) for point in points for name, value in point.metrics.items()]
    figures = {
        f"evaluation/{model}/{name}": figure.value
        for model, found in evaluation.models.items()
        for name, figure in found.items()
    }
    if sorted(map(repr, told)) != sorted(map(repr, figures.items())):
        yield "the metrics of the evaluation are not the figures of its summary, each once"
