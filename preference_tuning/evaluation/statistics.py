"""Figures with their uncertainty, from per-example scores.

Ties count as half: a policy that equals its reference has a reward accuracy of 0.5.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

Array = np.ndarray[Any, np.dtype[np.float64]]
Scores = Mapping[str, Array]
"""Columns of the score table: ``<model>/chosen``, ``<model>/rejected`` (summed log-probabilities) and token counts."""

CONFIDENCE = 0.95
RESAMPLES = 5000


class Figure(BaseModel):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def preference_accuracy(margins: Array) -> Figure:
    """Return the share of positive margins, ties as half, with Wilson's interval (1927), which holds at 0 and 1."""
    from scipy import stats  # most of a second that only the figures need

    n = len(margins)
    share = float(np.mean(np.where(np.isfinite(margins), np.heaviside(margins, 0.5), np.nan)))
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Figure(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def mean(values: Array, seed: int) -> Figure:
    """Return the mean with a percentile bootstrap interval over the examples."""
    value = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
        return Figure(value=value, low=value, high=value)
    from scipy import stats

    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Figure(value=value, low=float(found.low), high=float(found.high))


def model_figures(scores: Scores, model: str, seed: int) -> dict[str, Figure]:
    """Return what can be said of any model: which answer it finds likelier, and its loss on the chosen ones."""
    chosen, rejected = scores[f"{model}/chosen"], scores[f"{model}/rejected"]
    chosen_tokens, rejected_tokens = scores["chosen_tokens"], scores["rejected_tokens"]
    return {
        "likelihood/accuracy": preference_accuracy(chosen - rejected),
        "likelihood/accuracy_norm": preference_accuracy(chosen / chosen_tokens - rejected / rejected_tokens),
        "nll/chosen": mean(-chosen / chosen_tokens, seed),
        "logps/chosen": mean(chosen, seed),
        "logps/rejected": mean(rejected, seed),
    }


def reward_margins(scores: Scores, model: str, reference: str) -> Array:
    """Return (log pi/ref of chosen) - (log pi/ref of rejected), [n] nats; times beta, these are TRL's margins."""
    chosen = scores[f"{model}/chosen"] - scores[f"{reference}/chosen"]
    rejected = scores[f"{model}/rejected"] - scores[f"{reference}/rejected"]
    margins: Array = chosen - rejected
    return margins


def reward_figures(scores: Scores, model: str, reference: str, beta: float, seed: int) -> dict[str, Figure]:
    """Return TRL's rewards/* of ``model`` against ``reference``, and the change of the loss on chosen answers."""
    chosen = beta * (scores[f"{model}/chosen"] - scores[f"{reference}/chosen"])
    rejected = beta * (scores[f"{model}/rejected"] - scores[f"{reference}/rejected"])
    per_token = (scores[f"{reference}/chosen"] - scores[f"{model}/chosen"]) / scores["chosen_tokens"]
    return {
        "rewards/accuracies": preference_accuracy(chosen - rejected),
        "rewards/margins": mean(chosen - rejected, seed),
        "rewards/chosen": mean(chosen, seed),
        "rewards/rejected": mean(rejected, seed),
        "nll/chosen_change": mean(per_token, seed),
    }


def accuracy_difference(scores: Scores, challenger: str, champion: str, reference: str, seed: int) -> Figure:
    """Return the paired difference of two models' reward accuracies against one reference, on the same examples."""
    outcomes = [np.heaviside(reward_margins(scores, model, reference), 0.5) for model in (challenger, champion)]
    return mean(outcomes[0] - outcomes[1], seed)
