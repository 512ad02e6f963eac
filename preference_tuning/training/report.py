"""The report of a training stage: what was done, its curves, and the proof of the reference."""

import math
from typing import Any

from preference_tuning import reports
from preference_tuning.models.compute import Compute
from preference_tuning.tracking.spool import Point, series
from preference_tuning.training.job import TrainingRecord


def render(record: TrainingRecord, points: list[Point]) -> str:
    """Return the report of a stage as HTML."""
    parts = [_facts(record), reports.section("Curves", reports.charts(*_curves(record.stage, points)))]
    if record.reference:
        parts.append(_reference(record))
    if record.forced:
        parts.append(_forced(record.forced))
    parts.append(_settings(record))
    lead = f"{record.steps} steps · {record.compute.device} {record.compute.dtype} · job {record.job}"
    return reports.page(f"{record.stage.upper()} training", lead, *parts)


def _facts(record: TrainingRecord) -> reports.Html:
    shown: dict[str, object] = {
        "training rows": record.rows,
        "optimizer steps": record.steps,
        "training time": f"{record.seconds:.0f} s",
        "tokens a second": f"{record.tokens / max(record.seconds, 1e-9):,.0f}",
        "held-out loss": f"{record.metrics.get('loss', math.nan):.4f}",
    }
    if record.stage == "dpo":
        shown["held-out reward accuracy"] = f"{record.metrics.get('rewards/accuracies', math.nan):.3f}"
    return reports.facts(shown)


def _curves(stage: str, points: list[Point]) -> list[reports.Html]:
    def both(name: str) -> dict[str, list[tuple[int, float]]]:
        found = {
            "training": series(points, f"{stage}/train/{name}"),
            "held out": series(points, f"{stage}/eval/{name}"),
        }
        return {label: line for label, line in found.items() if line}

    level = math.log(2) if stage == "dpo" else None
    figures = [reports.line_chart("Loss" + (" (dashed: ln 2)" if level else ""), both("loss"), level=level)]
    if stage == "dpo":
        rewards = {
            "chosen": series(points, "dpo/train/rewards/chosen"),
            "rejected": series(points, "dpo/train/rewards/rejected"),
        }
        figures += [
            reports.line_chart("Reward accuracy", both("rewards/accuracies"), level=0.5),
            reports.line_chart("Reward margin", both("rewards/margins"), level=0.0),
            reports.line_chart("Rewards, training", rewards, level=0.0),
        ]
    else:
        figures.append(reports.line_chart("Token accuracy", both("mean_token_accuracy")))
    figures += [
        reports.line_chart("Gradient norm", {"training": series(points, f"{stage}/train/grad_norm")}),
        reports.line_chart("Learning rate", {"training": series(points, f"{stage}/train/learning_rate")}),
    ]
    return figures


def _reference(record: TrainingRecord) -> reports.Html:
    proof = record.reference
    assert proof is not None
    expected = "no fixed value for this loss" if proof.expected_loss is None else f"{proof.expected_loss:.6f}"
    return reports.section(
        "The reference is the SFT policy",
        reports.table(
            ["measured before the first update", "value"],
            [
                ["loss", f"{proof.loss:.6f}"],
                ["expected loss (ln 2)", expected],
                ["largest difference of a log-probability", f"{proof.largest_difference:.3g} nats"],
                ["allowed difference", f"{proof.tolerance:g} nats ({record.compute.dtype})"],
                ["pairs checked", proof.pairs],
                ["SFT weights", proof.sft_adapter_hash],
                ["data", proof.data_fingerprint],
                ["chat template", proof.template_hash],
            ],
        ),
    )


def _forced(forced: dict[str, Any]) -> reports.Html:
    rows = [["continued", forced["from"]], ["at step", forced["step"]]]
    rows += [["changed there", line] for line in forced["changed"]]
    return reports.section("Went on with other settings", reports.table(["forced resume", "value"], rows))


def _settings(record: TrainingRecord) -> reports.Html:
    settings = record.identity.get(record.stage) or {}
    return reports.section(
        "Settings",
        reports.table(
            ["setting", "value"],
            [
                *((name, value) for name, value in settings.items()),
                ("engine", f"{record.engine} ({record.engine_reason})"),
                ("rows in one forward pass", record.micro_batch),
                ("pieces of a batch, because memory ran out", record.parts),
                *_compute(record.compute),
                ("rows left out: no room for an answer", record.dropped_rows),
                ("rows with an answer cut", record.cut_rows),
                ("trainable parameters", f"{record.trainable_parameters:,}"),
                ("weights", record.adapter_hash),
                *record.versions.items(),
            ],
        ),
    )


def _compute(compute: Compute) -> list[tuple[str, object]]:
    return [
        ("device", compute.device),
        ("dtype", compute.dtype),
        ("attention", compute.attention),
        ("threads", compute.threads),
        ("kernels", compute.kernels),
        ("measured", compute.speeds()),
        ("why", compute.reason),
    ]
