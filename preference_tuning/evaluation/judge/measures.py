"""Figures of what the judge said. The unit is the prompt: comparisons of one prompt are averaged first."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preference_tuning.evaluation import statistics
from preference_tuning.evaluation.judge.comparison import Judged, Opinion
from preference_tuning.evaluation.judge.replies import Cost
from preference_tuning.evaluation.statistics import Array, Figure

MAX_INVALID = 0.1
"""Share of comparisons without a valid reply above which nothing is said of the others: what is missing may not be
missing by chance."""

RESAMPLES = 1000
"""Of the length-controlled win rate, whose every resample is a fit."""

RIDGE = 0.01
"""Penalty on both coefficients of that fit, against hundreds of comparisons: nothing, except where length separates
wins from losses perfectly and they would grow for ever."""


def of_comparisons(judged: Judged, seed: int) -> dict[str, Figure]:
    """Return the figures of a comparison of two models, without their ``judge/``."""
    opinions = [opinion for opinion in judged.opinions if opinion.asked]
    return {
        "win_rate": agreement(judged, seed),
        "lc_win_rate": length_controlled(judged, seed),
        "tie_rate": _mean(opinions, lambda o: _share([c == "tie" for c in o.valid]), seed),
        "position_consistency": _mean(opinions, _consistent, seed),
        "first_position_rate": _mean(opinions, lambda o: _share([c == "A" for c in o.valid if c != "tie"]), seed),
        "invalid_rate": _mean(opinions, lambda o: 1 - len(o.valid) / 2, seed),
    }


def of_cost(cost: Cost) -> dict[str, Figure]:
    """Return what was spent, as figures without an interval; tokens only where the server counts them."""
    counts = {
        "requests": cost.requests, "tokens_prompt": cost.prompt_tokens, "tokens_completion": cost.completion_tokens,
    }  # fmt: skip
    return {name: Figure.exact(count) for name, count in counts.items() if count is not None}


def agreement(judged: Judged, seed: int) -> Figure:
    """Return the win rate of the first answers, ties as half; nan if too many replies are missing."""
    return _mean(_usable(judged), lambda opinion: opinion.win, seed)


def shift(before: Judged, after: Judged, seed: int) -> Figure:
    """Return the mean fall of the wins from one to the other, over the comparisons that are valid in both."""
    falls = [
        (one.group, one.win - other.win)
        for one, other in zip(before.opinions, after.opinions, strict=True)
        if one.win is not None and other.win is not None
    ]
    values = _by_group(falls)
    return statistics.mean(values, np.arange(len(values)), seed) if len(values) else statistics.MISSING


def length_controlled(judged: Judged, seed: int) -> Figure:
    """Return the win rate that would be if both answers were equally long, with a bootstrap interval over prompts.

    As AlpacaEval 2 does it (Dubois et al. 2024, arXiv 2404.04475), without its term for the difficulty of an
    instruction, which is known for its own instructions only: logit P(win) = a + b tanh(d / s), where d is the
    difference of the lengths and s its standard deviation; the win rate at d = 0 is sigmoid(a).
    """
    opinions = _usable(judged)
    wins = np.array([opinion.win for opinion in opinions], dtype=np.float64)
    differences = np.array([opinion.length_difference for opinion in opinions], dtype=np.float64)
    from scipy import special, stats  # most of a second that only figures need

    spread = float(np.std(differences)) if len(opinions) else 0.0
    if len(wins) < 2 or np.ptp(wins) == 0 or not differences.any():
        return _mean(opinions, lambda opinion: opinion.win, seed)
    if spread == 0:
        # One answer is always longer by the same: nothing tells what length does.
        return statistics.MISSING
    lengths = np.tanh(differences / spread)
    names, group_of = np.unique([opinion.group for opinion in opinions], return_inverse=True)
    everyone = np.arange(len(names))
    fitted = _fit(wins, lengths, np.ones(len(wins)), np.zeros(2))
    value = float(special.expit(fitted[0]))
    if len(names) < 2:
        return Figure.exact(value)

    def rate(drawn: Any) -> float:
        weights = np.bincount(drawn, minlength=len(names))[group_of].astype(np.float64)
        return float(special.expit(_fit(wins, lengths, weights, fitted)[0]))

    interval = stats.bootstrap(
        (everyone,),
        rate,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=statistics.CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Figure(value=value, low=float(interval.low), high=float(interval.high))


def _fit(wins: Array, lengths: Array, weights: Array, start: Array) -> Array:
    """Return the coefficients of a logistic regression of wins on a constant and on lengths, nan if it fails."""
    from scipy import optimize, special

    features = np.stack([np.ones(len(lengths)), lengths])

    def gradient(coefficients: Array) -> tuple[Array, Array]:
        expected = special.expit(coefficients @ features)
        slopes = features @ (weights * (expected - wins)) + RIDGE * coefficients
        curvature = (features * (weights * expected * (1 - expected))) @ features.T + RIDGE * np.eye(2)
        return slopes, curvature

    found = optimize.root(gradient, start, jac=True)
    coefficients: Array = found.x if found.success else np.full(2, np.nan)
    return coefficients


def _usable(judged: Judged) -> list[Opinion]:
    """Return the opinions with both replies, or none at all if too many lack one."""
    valid = [opinion for opinion in judged.opinions if opinion.win is not None]
    return valid if len(valid) >= (1 - MAX_INVALID) * len(judged.opinions) else []


def _consistent(opinion: Opinion) -> float | None:
    if opinion.win is None:
        return None
    turned = {"A": "B", "B": "A", "tie": "tie"}[opinion.candidate_second or "tie"]
    return float(opinion.candidate_first == turned)


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean(opinions: Sequence[Opinion], look: Callable[[Opinion], float | None], seed: int) -> Figure:
    """Return the mean over prompts of a share, nan where there is none.

    Where all are equal there is nothing to resample, and the interval is Wilson's, with as many trials as prompts:
    twenty wins of twenty are no certainty.
    """
    found: list[tuple[str, float]] = []
    for opinion in opinions:
        value = look(opinion)
        if value is not None:
            found.append((opinion.group, value))
    values = _by_group(found)
    if not len(values):
        return statistics.MISSING
    alone = np.arange(len(values))
    return statistics.mean(values, alone, seed) if np.ptp(values) else statistics.proportion(values, alone)


def _by_group(values: Sequence[tuple[str, float]]) -> Array:
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in values:
        groups[group].append(value)
    return np.array([sum(found) / len(found) for found in groups.values()], dtype=np.float64)
