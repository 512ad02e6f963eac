"""Intervals and tests: against scipy and by hand, and whether they hold as often as they say."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr

from preference_tuning.evaluation import statistics
from preference_tuning.evaluation.statistics import Array, Figure


def prompts_of(count: int, pairs_each: int = 1) -> Array:
    return np.repeat([f"prompt {i:04d}" for i in range(count)], pairs_each)


def test_wilsons_interval() -> None:
    wins = np.array([1.0] * 18 + [0.0] * 3)
    expected = binomtest(18, 21).proportion_ci(0.95, "wilson")
    figure = statistics.proportion(wins, prompts_of(21))
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high))
    all_won = statistics.proportion(np.ones(20), prompts_of(20))
    assert all_won.value == 1
    assert 0.8 < all_won.low < 0.9, "twenty of twenty is no certainty"
    assert statistics.proportion(np.full(20, 0.5), prompts_of(20)).value == 0.5, "ties are half"


def test_pairs_of_one_prompt_add_no_certainty() -> None:
    once = statistics.proportion(np.array([1.0] * 18 + [0.0] * 3), prompts_of(21))
    many = statistics.proportion(np.array([1.0] * 90 + [0.0] * 15), prompts_of(21, 5))
    assert (many.value, many.low, many.high) == pytest.approx((once.value, once.low, once.high))
    # One prompt with 97 pairs and three with one: about 1.06 prompts' worth.
    uneven = statistics.proportion(np.ones(100), np.array(["big"] * 97 + ["a", "b", "c"]))
    assert uneven.low < statistics.proportion(np.ones(4), prompts_of(4)).low
    values = np.random.default_rng(1).normal(3.0, 1.0, 40)
    once = statistics.mean(values, prompts_of(40), seed=0)
    many = statistics.mean(np.repeat(values, 5), prompts_of(40, 5), seed=0)
    assert (many.value, many.low, many.high) == pytest.approx((once.value, once.low, once.high))


def test_the_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    figure = statistics.mean(values, prompts_of(400), seed=0)
    assert figure.low < values.mean() < figure.high
    assert figure.high - figure.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert statistics.mean(values, prompts_of(400), seed=0) == figure, "the same seed gives the same interval"
    assert statistics.mean(values, prompts_of(400), seed=1) != figure


def test_columns_share_their_resamples() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 50)
    columns = {"x": values, "twice": 2 * values, "constant": np.full(50, 0.1), "broken": np.append(values[1:], np.nan)}
    found = statistics.means(columns, prompts_of(50), seed=0)
    alone = statistics.mean(values, prompts_of(50), seed=0)
    assert (found["x"].low, found["x"].high) == pytest.approx((alone.low, alone.high))
    assert found["twice"].low == pytest.approx(2 * found["x"].low)
    assert (found["constant"].value, found["constant"].low) == pytest.approx((0.1, 0.1))
    assert found["constant"].low == found["constant"].value == found["constant"].high
    assert all(math.isnan(end) for end in (found["broken"].value, found["broken"].low, found["broken"].high))


def test_weights_are_those_of_a_weighted_mean() -> None:
    values, tokens = np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 8.0])
    figure = statistics.means({"x": values}, prompts_of(3), 0, weights=tokens)["x"]
    assert figure.value == pytest.approx((1 + 2 + 48) / 10)
    assert (figure.low, figure.high) == (1, 6), "a resample of three may hold one prompt alone"


def test_one_prompt_has_no_interval() -> None:
    assert statistics.mean(np.array([1.0, 3.0]), prompts_of(1, 2), seed=0) == Figure.exact(2)


def test_the_clustered_bootstrap_covers_what_it_says() -> None:
    """Prompts of one to six pairs that share most of their deviation: 95 % of intervals hold the true mean.

    A bootstrap over pairs, which takes them for independent, holds it far less often.
    """
    rng, trials, covered, naive = np.random.default_rng(7), 150, 0, 0
    for seed in range(trials):
        sizes = rng.integers(1, 7, 60)
        prompts = np.repeat(prompts_of(60), sizes)
        values = np.repeat(rng.normal(0, 1, 60), sizes) + rng.normal(0, 0.3, sizes.sum())
        figure = _quick(values, prompts, seed)
        covered += figure.low <= 0 <= figure.high
        figure = _quick(values, prompts_of(len(values)), seed)
        naive += figure.low <= 0 <= figure.high
    assert 0.91 <= covered / trials <= 0.98
    assert naive / trials < 0.8


def _quick(values: Array, prompts: Array, seed: int) -> Figure:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 300)
        return statistics.mean(values, prompts, seed)


def test_correlation() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, 300)
    y = x + rng.normal(0, 1, 300)
    figure = statistics.correlation(x, y, prompts_of(300), seed=0)
    assert figure is not None
    expected = pearsonr(x, y)
    interval = expected.confidence_interval()
    assert figure.value == pytest.approx(expected.statistic)
    assert (figure.low, figure.high) == pytest.approx((interval.low, interval.high), abs=0.03)
    assert statistics.correlation(x, np.ones(300), prompts_of(300), seed=0) is None
    tiny = statistics.correlation(np.array([0.0, 1.0]), np.array([0.0, 2.0]), prompts_of(2), seed=0)
    assert tiny == Figure(value=1, low=0, high=1), "a resample that does not vary explains nothing"


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0] * 5 + [0.0] * 9, 2 * 0.5**5),
        ([1.0] * 8 + [-1.0] * 2, 2 * (1 + 10 + 45) / 1024),
        ([0.0] * 6, 1.0),
        ([1.0, math.nan], math.nan),
    ],
)
def test_mcnemars_exact_test(differences: list[float], p: float) -> None:
    found = statistics.mcnemar(np.array(differences), prompts_of(len(differences)))
    assert found == pytest.approx(p, nan_ok=True)


def test_mcnemar_counts_prompts() -> None:
    """Five prompts for one model, whatever the number of their pairs; a prompt that is split even says nothing."""
    differences = np.array([1.0] * 15 + [1.0, 0.0, -1.0])
    assert statistics.mcnemar(differences, prompts_of(6, 3)) == pytest.approx(2 * 0.5**5)


def test_how_many_prompts_a_difference_needs() -> None:
    """The textbook's 7.849 variance / difference^2, and that many really give the power."""
    assert statistics.needed(0.25, 0.1) == math.ceil(7.8489 * 25)
    n, rng = statistics.needed(0.25, 0.1), np.random.default_rng(0)
    found = [statistics.proportion(rng.binomial(1, 0.6, n), prompts_of(n)).low > 0.5 for _ in range(1000)]
    assert 0.76 < np.mean(found) < 0.86


@pytest.mark.parametrize(
    ("figure", "shown"),
    [(Figure(value=0.5, low=0.25, high=0.75), "0.500 [0.250, 0.750]"), (Figure.exact(3), "3.000")],
)
def test_a_figure_is_shown_with_its_interval(figure: Any, shown: str) -> None:
    assert str(figure) == shown
