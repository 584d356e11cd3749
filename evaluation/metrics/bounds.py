"""Bounds of rates, of their ratio and of their difference, at any confidence: pure functions of counts."""

from __future__ import annotations

import math

import scipy.stats

from evaluation.metrics.statistics import Estimate, wilson

Z95 = 1.959964  # two-sided 95 %


def exact_bounds(hits: int, n: int, alpha: float) -> tuple[float, float]:
    """Return the Clopper-Pearson bounds of a rate, each wrong with a chance of at most `alpha`; (0, 1) of no rows.

    Wilson's score is too narrow far out in the tails (of 12 groups' bounds at a rate of .9 it errs three times too
    often), where a correction for many comparisons looks. Source: Clopper & Pearson 1934.
    """
    low = scipy.stats.beta.ppf(alpha, hits, n - hits + 1) if hits else 0.0
    high = scipy.stats.beta.ppf(1 - alpha, hits + 1, n - hits) if hits < n else 1.0
    return float(low), float(high)


def exact_ratio_bounds(top_hits: int, bottom_hits: int, n: int, alpha: float) -> tuple[float, float]:
    """Return bounds of the ratio of two rates on the same `n` rows, each wrong with a chance of at most `alpha`.

    Each rate gets half of `alpha`, so the bounds hold however the two depend on each other; they are wide.
    """
    top, bottom = exact_bounds(top_hits, n, alpha / 2), exact_bounds(bottom_hits, n, alpha / 2)
    return top[0] / bottom[1] if bottom[1] else 0.0, top[1] / bottom[0] if bottom[0] else math.inf


def paired_ratio(before, after) -> Estimate:
    """Return rate(after) / rate(before) of flags on the same rows, (n,) each, with its 95 % hybrid Wilson interval.

    Unlike a bootstrap it stays wide where few rows were hit before, or none after. The value is None if none was hit
    before. Source: Bonett & Price 2006, as recommended by Fagerland, Lydersen & Laake 2014.
    """
    pairs = [(bool(x), bool(y)) for x, y in zip(before, after, strict=True)]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    bottom, top = lost + pairs.count((True, True)), gained + pairs.count((True, True))
    if not bottom:
        return Estimate(None, 0, None, None)
    hit = bottom + gained  # rows hit by either
    spread = math.sqrt((lost + gained + 2) / ((top + 1) * (bottom + 1)))
    apart = (math.sqrt((1 - (k + 1) / (hit + 2)) / (k + 1)) for k in (top, bottom))
    z = Z95 * spread / sum(apart)
    (top_low, top_high), (low, high) = wilson(top, hit, z), wilson(bottom, hit, z)
    return Estimate(top / bottom, len(pairs), top_low / high, top_high / low)


def rate_difference(hits: int, n: int, other_hits: int, other_n: int, z: float = Z95) -> Estimate:
    """Return hits / n less other_hits / other_n, with Newcombe's interval from two Wilson intervals (1998, method 10).

    For rates on the same rows it is wider than need be. The value is None if a side has no rows.
    """
    if not n or not other_n:
        return Estimate(None, 0, None, None)
    one, other = hits / n, other_hits / other_n
    (low, high), (other_low, other_high) = wilson(hits, n, z), wilson(other_hits, other_n, z)
    below = math.hypot(one - low, other_high - other)
    above = math.hypot(high - one, other - other_low)
    return Estimate(one - other, n, one - other - below, one - other + above)
