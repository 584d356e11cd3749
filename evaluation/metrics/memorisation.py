"""Memorisation, from what a model predicts at each token of a given text: pure functions of numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from evaluation.metrics.statistics import Estimate, bootstrap_sums, ratio


def perplexity_ratio(after, before, tokens) -> Estimate:
    """Return the token perplexity after over before, from each window's summed NLL (nats), (n,), and number of tokens,
    (n,). The bootstrap draws windows, since neighbouring tokens depend on each other."""
    nats = ratio(np.subtract(after, before), tokens)
    return Estimate(float(np.exp(nats.value)), nats.n, float(np.exp(nats.low)), float(np.exp(nats.high)))


def unique_token_share(tokens: list) -> float | None:
    """Return the diversity of one answer (Yao et al. 2023): distinct tokens as a share of all; None without tokens."""
    return len(set(tokens)) / len(tokens) if tokens else None


def extraction_strength(predicted: list[int], target: list[int]) -> float:
    """Return 1 - (shortest prefix from which greedy decoding gives the rest) / length: 1 is fully extractable.

    `predicted[t]`: the likeliest token at position t after the true tokens before it. If all agree with the target from
    k on, greedy decoding from the first k tokens gives the rest. The prefix leaves at least the last token, which is
    not asked for: so the score of a text that the model does not know at all is 1 / length, its floor. Source: Carlini
    et al. 2021, as OpenUnlearning computes it (Dorna et al. 2025).
    """
    _same_length(predicted, target)
    k = len(target) - 1
    while k > 0 and predicted[k] == target[k] and predicted[k - 1] == target[k - 1]:
        k -= 1
    return 1 - k / len(target)


@dataclasses.dataclass(frozen=True)
class ExtractionLeft:
    """What is left of what a model could extract beyond its floor.

    left: (after - floor) / (before - floor), 1 if nothing was forgotten; its value is None if the original itself is
    not above the floor for certain, so that there was nothing to forget.
    excess: after - floor, in extraction strength.
    floor: the mean extraction strength of what was never seen, as `floor_of` says: "the retrained model", "the holdout
    rows" (under the same model), or "one token" (the last one, 1 / length).
    """

    left: Estimate
    excess: Estimate
    floor: float | None
    floor_of: str


def extraction_left(
    before, after, *, num_tokens, retrained=None, holdout_before=None, holdout_after=None
) -> ExtractionLeft:
    """Return what is left of the extraction strength of forgotten rows: before, after, num_tokens (n,).

    retrained (n,): of the same rows under a model that never saw them. holdout_before, holdout_after (m,): of rows that
    no model saw, under each. The first of the two that is given is the floor, else the rows' own 1 / num_tokens. The
    bootstrap draws the rows with all of their numbers, and the holdout rows apart from them.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    rows, others = np.stack([after, before], axis=1), None  # (n, 2)
    if retrained is not None:
        floor_of, floor = "the retrained model", np.asarray(retrained, float)
    elif holdout_after is not None and len(holdout_after):
        floor_of, floor = "the holdout rows", np.zeros(len(rows))
        others = np.stack([np.asarray(holdout_after, float), np.asarray(holdout_before, float)], axis=1)  # (m, 2)
    else:
        floor_of, floor = "one token", 1 / np.asarray(num_tokens, float)
    if not len(rows):
        nothing = Estimate(None, 0, None, None)
        return ExtractionLeft(nothing, nothing, None, floor_of)
    rows = rows - floor[:, None]
    excess = rows.mean(axis=0)  # (2,) after, before
    drawn = bootstrap_sums(rows) / len(rows)  # (draws, 2)
    floor_value = float(floor.mean())
    if others is not None:
        excess, floor_value = excess - others.mean(axis=0), float(others[:, 0].mean())
        drawn = drawn - bootstrap_sums(others, seed=1) / len(others)
    low, high = np.quantile(drawn[:, 0], [0.025, 0.975])
    after_excess = Estimate(float(excess[0]), len(rows), float(low), float(high))
    if np.quantile(drawn[:, 1], 0.025) <= 0:
        return ExtractionLeft(Estimate(None, 0, None, None), after_excess, floor_value, floor_of)
    known = drawn[:, 1] > 0
    low, high = np.quantile(drawn[known, 0] / drawn[known, 1], [0.025, 0.975])
    left = Estimate(float(excess[0] / excess[1]), len(rows), float(low), float(high))
    return ExtractionLeft(left, after_excess, floor_value, floor_of)


def exact_memorisation(predicted: list[int], target: list[int]) -> float:
    """Return the share of positions at which the likeliest token is the true one (Tirumala et al. 2022)."""
    _same_length(predicted, target)
    return sum(p == t for p, t in zip(predicted, target, strict=True)) / len(target)


def _same_length(predicted: list, target: list) -> None:
    """Raise ValueError unless both lists have the same length, and at least one token."""
    if len(predicted) != len(target) or not target:
        raise ValueError(f"need as many predicted as true tokens, and at least one: {len(predicted)}, {len(target)}")
