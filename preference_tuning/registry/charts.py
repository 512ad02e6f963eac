"""The charts of a model card: how training went, from the metrics spool, and what came out."""

import math
from collections.abc import Iterator
from pathlib import Path

from preference_tuning import reports
from preference_tuning.evaluation import report
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.registry.versions import CHARTS
from preference_tuning.tracking import spool
from preference_tuning.tracking.spool import Point, series
from preference_tuning.training.job import METRICS

SIDES = {"training": "train", "held out": "eval"}


def draw(training: dict[str, Path], evaluation: Evaluation) -> dict[str, str]:
    """Return the charts as SVG documents by the names of their files; what has no values has no chart.

    Args:
        training: the evidence folder of each stage.
        evaluation: of the result.
    """
    found: list[tuple[str, reports.Html]] = []
    for stage, folder in training.items():
        found += _of_stage(stage, list(spool.read(folder / METRICS)))
    found += [(f"evaluation-{name}", chart) for name, chart in report.forests(evaluation).items()]
    return {f"{CHARTS}{name}.svg": chart.alone for name, chart in found if isinstance(chart, reports.Chart)}


def _of_stage(stage: str, points: list[Point]) -> Iterator[tuple[str, reports.Html]]:
    def both(name: str) -> dict[str, list[tuple[int, float]]]:
        lines = {side: series(points, f"{stage}/{part}/{name}") for side, part in SIDES.items()}
        return {side: line for side, line in lines.items() if line}

    level = math.log(2) if stage == "dpo" else None
    title = f"{stage.upper()}: loss" + (" (dashed: ln 2)" if level else "")
    yield f"{stage}-loss", reports.line_chart(title, both("loss"), level=level)
    if stage == "dpo":
        rewards = {side: series(points, f"dpo/train/rewards/{side}") for side in ("chosen", "rejected")}
        yield "dpo-rewards", reports.line_chart("DPO: rewards, training", rewards, level=0.0)
        accuracy = reports.line_chart("DPO: reward accuracy", both("rewards/accuracies"), level=0.5)
        yield "dpo-accuracy", accuracy
