"""Membership: can a row that was trained on be told from one that never was? Pure functions of numbers.

Every score is high for a member. Members are forget rows that the run trained on; the others are rows that no model
ever saw. Rows that the run alone held out are no others: the original may know them as well as the members.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import scipy.optimize
import scipy.stats

from evaluation.metrics.statistics import Estimate

MUSE_SHARE = 0.4  # of the tokens: MUSE's Min-40 %
Z = 1.959964  # of a 95 % interval


# ------------------------------------------------------------------------------------------ scores of one text
def min_k(log_probs, share: float = 0.2) -> float:
    """Return the mean of the lowest `share` of a text's token log-probabilities (Shi et al. 2024)."""
    ordered = np.sort(np.asarray(log_probs, float))
    return float(ordered[: max(1, int(len(ordered) * share))].mean())


def min_k_plus_plus(log_probs, means, deviations, share: float = 0.2) -> float:
    """Return min-k of log-probabilities that are standardised at each position (Zhang et al. 2024).

    means, deviations (T,): of log p over the vocabulary, weighted with p, at each position. Variances below 1e-6 count
    as 1e-6, as in OpenUnlearning.
    """
    deviations = np.maximum(np.asarray(deviations, float), 1e-3)
    return min_k((np.asarray(log_probs, float) - np.asarray(means, float)) / deviations, share)


def zlib_ratio(log_probs, text: str) -> float:
    """Return the mean token log-probability over the text's compressed size in bytes. Source: Carlini et al. 2021,
    whose loss is the log of the perplexity."""
    return float(np.mean(log_probs)) / len(zlib.compress(text.encode()))


# --------------------------------------------------------------------------------------------- of many texts
def auc(members, others) -> Estimate:
    """Return the chance that a member's score is above another row's, ties counted half. 0.5: membership does not show.

    `n` counts the rows of both sides; scores that are not numbers (of a broken model) are left out. Without a row on
    each side, the value is None. The interval is Newcombe's method 5 (Statistics in Medicine 2006, 25:559-573): it has
    a width even where every member is above every other row, where DeLong's and the bootstrap's have none.
    """
    members, others = (scores[~np.isnan(scores)] for scores in (np.asarray(members, float), np.asarray(others, float)))
    n, m = len(members), len(others)
    if not n or not m:
        return Estimate(None, 0, None, None)
    value = float(scipy.stats.mannwhitneyu(members, others).statistic) / (n * m)
    return Estimate(value, n + m, *_newcombe(value, n, m))


def _newcombe(value: float, n: int, m: int) -> tuple[float, float]:
    """Return the bounds of an AUC of n and m scores: those true values that are Z standard errors from it."""
    mean_count = (n + m) / 2

    def excess(true: float) -> float:
        spread = 1 + (mean_count - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return (value - true) ** 2 - Z**2 * true * (1 - true) * spread / (n * m)

    # at 0 and 1 the error is 0, so `excess` is positive there (or 0 if that is the value), and negative at the value
    low = 0.0 if value == 0 else scipy.optimize.brentq(excess, 0.0, value if value < 1 else 1 - 1e-9)
    high = 1.0 if value == 1 else scipy.optimize.brentq(excess, value if value > 0 else 1e-9, 1.0)
    return float(low), float(high)


def muse_privacy_leakage(auc_after: float, auc_retrained: float) -> float | None:
    """Return MUSE's PrivLeak in per cent, from AUCs in which members are the trained forget rows; None if the retrained
    model's is 1.

    0: the model looks like one that never saw the rows. Near -100: the rows still stand out as members. Above 0: they
    stand out as rows that were pushed away. MUSE's own AUC is 1 minus this one. Source: Shi et al. 2024, sect. 3.
    """
    return None if auc_retrained >= 1 else 100 * ((1 - auc_after) - (1 - auc_retrained)) / (1 - auc_retrained)


def privacy_leakage(after: Estimate, retrained: Estimate) -> Estimate:
    """Return `muse_privacy_leakage` of two AUCs with its interval; the value is None if it is not defined.

    The interval is that of a ratio of two estimates by their own intervals, MOVER-R (Donner and Zou 2012, Statistical
    Methods in Medical Research 21:347-359). It takes the AUCs as independent; they are of the same rows, which makes it
    rather too wide than too narrow. `high` is None where the retrained model's AUC may be 1.
    """
    if after.value is None or retrained.value is None or retrained.value >= 1:
        return Estimate(None, 0, None, None)
    top, top_low, top_high = 1 - after.value, 1 - after.high, 1 - after.low
    bottom, bottom_low, bottom_high = 1 - retrained.value, 1 - retrained.high, 1 - retrained.low
    product = top * bottom

    def bound(of_top: float, of_bottom: float, sign: int) -> float:
        tops, bottoms = of_top * (2 * top - of_top), of_bottom * (2 * bottom - of_bottom)
        root = math.sqrt(max(0.0, product**2 - tops * bottoms))
        if sign > 0:
            return 100 * ((product + root) / bottoms - 1)
        return 100 * ((tops / (product + root) if product + root else 0.0) - 1)  # the same, and safe if bottoms is 0

    high = bound(top_high, bottom_low, +1) if bottom_low > 0 else None
    value = muse_privacy_leakage(after.value, retrained.value)
    return Estimate(value, min(after.n, retrained.n), bound(top_low, bottom_high, -1), high)
