"""Rates, means and ratios with their 95 % intervals: pure functions of numbers."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a rate; (0, 1) if nothing was counted. Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    rate = hits / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at 0 and at n hits the bound is the rate itself, up to rounding; return it exactly
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure of `n` prompts with its 95 % interval [low, high].

    Where nothing was counted, the value is None; the interval of a rate is then [0, 1], that of a mean None.
    """

    value: float | None
    n: int
    low: float | None
    high: float | None


def rate(flags) -> Estimate:
    """Return the share of flags that are true, with its Wilson interval."""
    flags = [bool(f) for f in flags]
    low, high = wilson(sum(flags), len(flags))
    return Estimate(sum(flags) / len(flags) if flags else None, len(flags), low, high)


def mean(values) -> Estimate:
    """Return the mean of the values that are not None, with its bootstrap interval."""
    values = [v for v in values if v is not None]
    return ratio(values, np.ones(len(values)))


def ratio(tops, bottoms, seed: int = 0, draws: int = 2000) -> Estimate:
    """Return sum(tops) / sum(bottoms), both (n,), with its bootstrap interval: a row's two numbers are drawn together.
    The value is None if the bottoms sum to 0."""
    rows = np.stack([np.asarray(tops, float), np.asarray(bottoms, float)], axis=1)  # (n, 2)
    if not rows[:, 1].sum():
        return Estimate(None, 0, None, None)
    top, bottom = bootstrap_sums(rows, seed, draws).T  # (draws,) each
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return Estimate(float(rows[:, 0].sum() / rows[:, 1].sum()), len(rows), float(low), float(high))


def bootstrap_sums(rows: np.ndarray, seed: int = 0, draws: int = 2000) -> np.ndarray:
    """Return the column sums of `draws` samples of n rows with replacement, of rows (n, k): (draws, k).

    The samples depend on n, seed and draws alone, so that the sums of two calls with as many rows are paired.
    """
    if len(rows) <= MOST_ROWS_KEPT:
        return _times_drawn(len(rows), seed, draws) @ rows  # (draws, n) x (n, k)
    generator, at_once = np.random.default_rng(seed), max(1, 10_000_000 // len(rows))
    parts = [_counts(len(rows), min(at_once, draws - start), generator) @ rows for start in range(0, draws, at_once)]
    return np.concatenate(parts)


MOST_ROWS_KEPT = 4096  # how often each row is drawn, kept for so many rows: 66 MB a table


@functools.lru_cache(maxsize=3)
def _times_drawn(n: int, seed: int, draws: int) -> np.ndarray:
    """Return how often each of n rows is drawn in each sample: (draws, n). Measures of one group share it."""
    return _counts(n, draws, np.random.default_rng(seed))


def _counts(n: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    places = generator.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]  # (draws, n)
    return np.bincount(places.ravel(), minlength=draws * n).reshape(draws, n).astype(float)
