"""Figures with their uncertainty. The unit is the prompt: pairs of one prompt are not independent of each other.

Everything here takes one value a pair and the prompt of each pair; intervals are those of 95 %.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

Array = np.ndarray[Any, np.dtype[Any]]

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 5000
BATCH_ELEMENTS = 4_000_000
"""Values that are resampled at a time: 32 MB."""


class Figure(BaseModel):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Figure":
        """Return a figure that is not an estimate, such as a count."""
        return cls(value=value, low=value, high=value)

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.low == self.high else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


MISSING = Figure.exact(math.nan)


def proportion(outcomes: Array, prompts: Array) -> Figure:
    """Return the share of successes, ties as half, with Wilson's interval (1927), which holds at 0 and 1.

    Its n is the effective number of prompts, (sum of m)^2 / (sum of m^2) for m pairs a prompt (Kish 1965): the interval
    is right if the pairs of a prompt always agree, and too wide otherwise. scipy's takes whole successes only.
    """
    from scipy import stats  # most of a second that only figures need

    sizes = _sums(np.ones(len(outcomes)), prompts)
    n = float(sizes.sum() ** 2 / (sizes**2).sum())
    share = float(np.mean(outcomes))
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Figure(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def mean(values: Array, prompts: Array, seed: int) -> Figure:
    """Return the mean over the pairs with a percentile bootstrap interval over the prompts."""
    return means({"": values}, prompts, seed)[""]


def means(columns: Mapping[str, Array], prompts: Array, seed: int, weights: Array | None = None) -> dict[str, Figure]:
    """Return the mean of each column, with percentile bootstrap intervals over the prompts.

    Of values that are all equal, or of a single prompt, the interval is the value; of values that are not finite,
    value and interval are nan.

    Args:
        columns: values of the pairs, by name.
        prompts: of the pairs.
        seed: of the resamples, which all columns share.
        weights: of the pairs, such as their tokens. None: equal ones.
    """
    values = np.stack(list(columns.values())).astype(np.float64)
    weights = np.ones(values.shape[1]) if weights is None else weights
    finite: Array = np.logical_and.reduce(np.isfinite(values), axis=1)
    sums, sizes = _sums(np.where(finite[:, None], values, 0.0) * weights, prompts), _sums(weights[None], prompts)
    value = np.where(finite, _ratio(sums, sizes), np.nan)
    low, high = _interval(_ratio, (sums, sizes), seed)
    constant = (values.max(axis=1) == values.min(axis=1)) | ~finite
    low, high = np.where(constant, value, low), np.where(constant, value, high)
    return {
        name: Figure(value=float(value[i]), low=float(low[i]), high=float(high[i])) for i, name in enumerate(columns)
    }


def correlation(one: Array, other: Array, prompts: Array, seed: int) -> Figure | None:
    """Return Pearson's correlation over the pairs, with a bootstrap interval over the prompts; None of a constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    x, y = one - np.mean(one), other - np.mean(other)
    sums = tuple(_sums(column, prompts) for column in (np.ones(len(x)), x, y, x * x, y * y, x * y))
    low, high = _interval(_correlation, sums, seed)
    return Figure(value=float(_correlation(*sums)), low=float(low), high=float(high))


def mcnemar(differences: Array, prompts: Array) -> float:
    """Return the p-value of McNemar's exact test (1947) on paired outcomes: the sign test over the prompts.

    Args:
        differences: outcome of one model less that of the other, for each pair.
        prompts: of the pairs.
    """
    from scipy import stats

    sums = _sums(differences, prompts)
    if not np.isfinite(sums).all():
        return math.nan
    up, down = int((sums > 0).sum()), int((sums < 0).sum())
    return float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0


def needed(variance: float, difference: float) -> int:
    """Return how many prompts, of one pair each, find a mean difference in 80 % of trials.

    Args:
        variance: of one pair's value.
        difference: of the mean from what it is compared with, in the same unit.
    """
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2) + stats.norm.ppf(POWER))
    return math.ceil(z * z * variance / difference**2)


def count(prompts: Array) -> int:
    """Return the number of different prompts."""
    return len(np.unique(prompts))


def _sums(values: Array, prompts: Array) -> Array:
    """Return the sums of ``values`` [..., pairs] over the pairs of each prompt [..., prompts], by prompt in order."""
    order = np.argsort(prompts, kind="stable")
    starts = np.unique(prompts[order], return_index=True)[1]
    sums: Array = np.add.reduceat(values[..., order], starts, axis=-1)
    return sums


def _interval(statistic: Callable[..., Array], sums: tuple[Array, ...], seed: int) -> tuple[Array, Array]:
    """Return both ends of the interval of a statistic of the prompts' sums, each [..., prompts]."""
    from scipy import stats

    prompts = sums[0].shape[-1]
    if prompts < 2:
        value = statistic(*sums)
        return value, value
    found = stats.bootstrap(
        sums,
        statistic,
        paired=True,
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_ELEMENTS // max(column.size for column in sums)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found.low, found.high


def _ratio(sums: Array, sizes: Array, axis: int = -1) -> Array:
    ratio: Array = sums.sum(axis=axis) / sizes.sum(axis=axis)
    return ratio


def _correlation(*sums: Array, axis: int = -1) -> Array:
    n, x, y, xx, yy, xy = (column.sum(axis=axis) for column in sums)
    spread = np.sqrt(np.maximum(xx - x * x / n, 0.0) * np.maximum(yy - y * y / n, 0.0))
    # A resample may hold one prompt alone; what does not vary explains nothing.
    shared = np.divide(xy - x * y / n, spread, out=np.zeros_like(spread), where=spread > 0)
    found: Array = np.clip(shared, -1.0, 1.0)
    return found
