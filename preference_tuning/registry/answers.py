"""What a run answers at a glance, in groups: on what data, how, how training went, how good it is, what became of it.

From what its steps left and not from what they logged, so that a run whose steps came from the cache answers as well.
"""

from typing import Any

from preference_tuning.config import RunConfig, StageConfig
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.job import REPORT, Evaluation, load_summary
from preference_tuning.registry.result import Registered, Result
from preference_tuning.training.job import TrainingRecord

SETTINGS = ("num_train_epochs", "learning_rate", "beta", "loss_type", "optim", "lr_scheduler_type", "seed")
"""Of a stage, where it has them."""


def of_run(result: Result, registered: Registered) -> dict[str, Any]:
    """Return the answers, as values that JSON has.

    Args:
        result: what the steps left.
        registered: what became of it.
    """
    evaluation = load_summary(registered.evaluation)
    return {
        "data": _data(result),
        "settings": _settings(result.config, tuple(result.training)),
        "training": {stage: _went(record) for stage, record in result.records().items()},
        "quality": _quality(evaluation),
        "registry": {
            **{name: value for name, value in registered.metadata().items() if name not in ("decision", "reason")},
            "report": str(registered.folder / "evidence" / "evaluation" / REPORT),
        },
    }


def _data(result: Result) -> dict[str, Any]:
    manifest = result.dataset.manifest
    return {
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
        "rows_in": manifest.rows_in,
        "training_pairs": manifest.train,
        "held_out_pairs": manifest.held_out,
        "dropped": manifest.dropped,
    }


def _settings(config: RunConfig, stages: tuple[str, ...]) -> dict[str, Any]:
    lora = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.lora else "none: every weight is trained"
    found: dict[str, Any] = {"finetuning_type": config.finetuning_type, "base_model": config.base_model.source}
    found |= {"revision": config.base_model.revision} if config.base_model.revision else {}
    found["lora"] = lora
    for stage in stages:
        section: StageConfig = getattr(config, stage)
        values = section.model_dump(mode="json", include=set(SETTINGS))
        found |= {f"{stage}_{name}": _plain(values[name]) for name in SETTINGS if name in values}
        batch = section.per_device_train_batch_size * section.gradient_accumulation_steps
        found[f"{stage}_batch"] = f"{batch} rows a step and process"
    return found


def _went(record: TrainingRecord) -> dict[str, Any]:
    return {
        "steps": record.steps,
        "seconds": round(record.seconds, 1),
        **{f"held_out_{name.replace('/', '_')}": round(value, 4) for name, value in record.metrics.items()},
    }


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    candidate = evaluation.models.get(evaluation.verdict.candidate, {})
    figures = catalogue.main({evaluation.verdict.candidate: candidate})
    return {
        "verdict": evaluation.verdict.decision,
        "reason": evaluation.verdict.reason,
        "compared_with": evaluation.champion or "no champion",
        "pairs": evaluation.pairs,
        **{words: catalogue.in_line(name, candidate.get(name)) for name, words in figures.items()},
        "worse": "; ".join(evaluation.worse) or "nothing",
    }


def _plain(value: Any) -> Any:
    return " + ".join(map(str, value)) if isinstance(value, list) else value
