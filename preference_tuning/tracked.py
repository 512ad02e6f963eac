"""What of each stage is tracked beside its metrics: facts, tables, and reports with their charts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preference_tuning.data.table import REPORT as DATA_REPORT
from preference_tuning.data.table import Dataset
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.registry.result import Registered, Result
from preference_tuning.tracking.recording import Told, Tracking
from preference_tuning.tracking.spool import FILE
from preference_tuning.training.job import RECORD, REPORT, TrainingRecord

UNTOLD = ("settings/", "held_out/")
"""Of a training record's summary: what is a parameter or a metric already."""


def of_data(dataset: Dataset) -> Told:
    """Return fingerprints, counts and the report of a dataset."""
    facts = {f"data/{name}": value for name, value in dataset.manifest.metadata().items()}
    return Told(others=facts, reports={"data/report.html": dataset.folder / DATA_REPORT})


def of_training(evidence: Path) -> Told:
    """Return what a training stage did: steps, time, hashes, machine, the proof of the reference."""
    record = TrainingRecord.model_validate_json((evidence / RECORD).read_text(encoding="utf-8"))
    facts = {f"{record.stage}/{name}": value for name, value in record.summary().items() if _is_fact(name)}
    return Told(others=facts, reports={f"{record.stage}/report.html": evidence / REPORT}, spool=evidence / FILE)


def of_evaluation(evidence: Path) -> Told:
    """Return the verdict with its reasons, what got worse, and the samples side by side."""
    evaluation = evaluation_job.load_summary(evidence)
    verdict = evaluation.verdict
    facts: dict[str, Any] = {
        "evaluation/verdict": verdict.decision,
        "evaluation/reason": verdict.reason,
        "evaluation/worse": evaluation.worse or "nothing",
        "evaluation/champion": evaluation.champion or "none",
        "evaluation/pairs": evaluation.pairs,
        "evaluation/dropped": evaluation.dropped,
        "evaluation/seconds": evaluation.seconds,
        "evaluation/data_fingerprint": evaluation.data_fingerprint,
        "evaluation/seal": evaluation.seal,
    }
    rules = [[rule.name, rule.measured, rule.wanted, rule.outcome] for rule in verdict.rules]
    tables = {"evaluation/verdict.csv": [["rule", "measured", "wanted", "outcome"], *rules]}
    if evaluation.samples:
        tables["evaluation/samples.csv"] = list(_samples(evaluation))
    report = {"evaluation/report.html": evidence / evaluation_job.REPORT}
    return Told(others=facts, tables=tables, reports=report, spool=evidence / FILE)


def of_registered(registered: Registered) -> Told:
    """Return the version and its standing."""
    facts = {name: value for name, value in registered.metadata().items() if name != "folder"}
    return Told(others={"registry/name": registered.version.name, **{f"registry/{k}": v for k, v in facts.items()}})


def complete(tracking: Tracking, result: Result, registered: Registered) -> None:
    """Tell what became of a run, and of the stages that came from the step cache."""
    tracking.add("data", of_data(result.dataset))
    for stage, evidence in result.training.items():
        tracking.add(stage, of_training(evidence))
    tracking.add("evaluation", of_evaluation(result.evaluation))
    if registered.evaluation != result.evaluation:
        # Another champion reigned by now than the one that the run's evaluation had met.
        tracking.add("evaluation", of_evaluation(registered.evaluation))
    tracking.add("registry", of_registered(registered))


def _is_fact(name: str) -> bool:
    return not name.startswith(UNTOLD)


def _samples(evaluation: Evaluation) -> Iterator[list[str]]:
    models = list(evaluation.samples[0].answers)
    yield ["prompt", "chosen", *models, *(f"{model}, sampled" for model in models)]
    for sample in evaluation.samples:
        yield [sample.prompt, sample.chosen, *sample.answers.values(), *sample.sampled.values()]
