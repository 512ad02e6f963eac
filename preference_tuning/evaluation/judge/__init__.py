"""An optional judge: a language model that compares the answers of two models, and is itself judged first.

    labelled = [judge.Comparison(...), ...]   chosen and rejected answers of held-out pairs
    answers = [judge.Comparison(...), ...]    the candidate's and its parent's answers to held-out prompts
    calibration = judge.calibrate(labelled, config, folder, key)
    judged = judge.compare(answers, config, folder, key, spent=calibration.cost)
    figures = judge.figures(judged, calibration, seed)

``prompt`` is what it reads, ``client`` asks, ``replies`` keeps what it said, ``comparison`` and ``calibration`` put the
questions, ``measures`` counts. Only ``client`` knows httpx.
"""

from preference_tuning.evaluation.judge import measures
from preference_tuning.evaluation.judge.calibration import Calibration, calibrate
from preference_tuning.evaluation.judge.client import check, key_of
from preference_tuning.evaluation.judge.comparison import Comparison, Judged, Opinion, compare, spread
from preference_tuning.evaluation.judge.prompt import conversation
from preference_tuning.evaluation.judge.replies import NOTHING, Cost
from preference_tuning.evaluation.statistics import Figure

__all__ = [
    "Calibration",
    "Comparison",
    "Cost",
    "Judged",
    "Opinion",
    "calibrate",
    "check",
    "compare",
    "conversation",
    "figures",
    "key_of",
    "spread",
]


def figures(judged: Judged, calibration: Calibration, seed: int, beside: Cost = NOTHING) -> dict[str, Figure]:
    """Return all ``judge/*`` figures of a candidate; ``judge/calibrated`` is 1 if the judge is to be listened to.

    What was spent ``beside`` these questions counts too.
    """
    found = {
        **measures.of_comparisons(judged, seed),
        "agreement_with_labels": calibration.agreement,
        "injection_shift": calibration.injection_shift,
        "calibrated": Figure.exact(float(calibration.calibrated)),
        **measures.of_cost(Cost.sum([judged.cost, calibration.cost, beside])),
    }
    return {f"judge/{name}": figure for name, figure in found.items()}
