"""Rates, means and ratios with their 95 % intervals: pure functions of numbers."""

from __future__ import annotations

import dataclasses
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
    rows = np.stack([np.asarray(tops, float), np.asarray(bottoms, float)])  # (2, n)
    if not rows[1].sum():
        return Estimate(None, 0, None, None)
    n = rows.shape[1]
    top, bottom = rows[:, np.random.default_rng(seed).integers(n, size=(draws, n))].sum(axis=-1)  # (draws,) each
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return Estimate(float(rows[0].sum() / rows[1].sum()), n, float(low), float(high))
