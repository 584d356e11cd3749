"""Memorisation and membership, from the scores of a given text's tokens: pure functions of numbers."""

from __future__ import annotations

import zlib

import numpy as np
import scipy.stats

from evaluation.metrics.statistics import Estimate, ratio


def perplexity_ratio(after, before, tokens) -> Estimate:
    """Return the token perplexity after over before, from each window's summed NLL (nats), (n,), and number of tokens,
    (n,). The bootstrap draws windows, since neighbouring tokens depend on each other."""
    nats = ratio(np.subtract(after, before), tokens)
    return Estimate(float(np.exp(nats.value)), nats.n, float(np.exp(nats.low)), float(np.exp(nats.high)))


def unique_token_share(tokens: list) -> float | None:
    """Return the diversity of one answer (Yao et al. 2023): distinct tokens as a share of all; None without tokens."""
    return len(set(tokens)) / len(tokens) if tokens else None


def extraction_strength(predicted: list[int], target: list[int]) -> float:
    """Return 1 - (shortest prefix from which greedy decoding gives the rest) / length (Carlini et al. 2021): 1 is fully
    extractable.

    `predicted[t]`: the likeliest token at position t after the true tokens before it. If all agree with the target from
    k on, greedy decoding from the first k tokens gives the rest.
    """
    _same_length(predicted, target)
    k = len(target)
    while k > 0 and predicted[k - 1] == target[k - 1]:
        k -= 1
    return 1 - k / len(target)


def exact_memorisation(predicted: list[int], target: list[int]) -> float:
    """Return the share of positions at which the likeliest token is the true one (Tirumala et al. 2022)."""
    _same_length(predicted, target)
    return sum(p == t for p, t in zip(predicted, target, strict=True)) / len(target)


def min_k(log_probs, share: float = 0.2) -> float:
    """Return the mean of the lowest `share` of a text's token log-probabilities (Shi et al. 2024): high for members."""
    ordered = np.sort(np.asarray(log_probs, float))
    return float(ordered[: max(1, int(len(ordered) * share))].mean())


def min_k_plus_plus(log_probs, means, deviations, share: float = 0.2) -> float:
    """Return min-k of log-probabilities that are standardised at each position (Zhang et al. 2024): high for members.

    means, deviations (T,): of log p over the vocabulary, weighted with p, at each position.
    """
    standard = (np.asarray(log_probs, float) - np.asarray(means, float)) / np.maximum(
        np.asarray(deviations, float), 1e-6
    )
    return min_k(standard, share)


def zlib_ratio(log_probs, text: str) -> float:
    """Return the mean token log-probability over the text's compressed size in bytes: high for members. Source: Carlini
    et al. 2021, whose loss is the log of the perplexity."""
    return float(np.mean(log_probs)) / len(zlib.compress(text.encode()))


def auc(members, others) -> float | None:
    """Return the chance that a member's score is above a non-member's, ties counted half; None if a side is empty. 0.5:
    membership does not show."""
    if len(members) == 0 or len(others) == 0:
        return None
    return float(scipy.stats.mannwhitneyu(members, others).statistic) / (len(members) * len(others))


def privacy_leakage(auc_after: float | None, auc_never_trained: float | None) -> float | None:
    """Return MUSE's PrivLeak in per cent: 0 if the model looks like one that never saw the text (Shi et al. 2024). None
    if an AUC was not measured or the retrained model's is 0."""
    return None if auc_after is None or not auc_never_trained else 100 * (auc_after / auc_never_trained - 1)


def _same_length(predicted: list, target: list) -> None:
    """Raise ValueError unless both lists have the same length, and at least one token."""
    if len(predicted) != len(target) or not target:
        raise ValueError(f"need as many predicted as true tokens, and at least one: {len(predicted)}, {len(target)}")
