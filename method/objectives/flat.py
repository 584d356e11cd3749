"""FLAT: the largest f-divergence between an answer to give and the forget answer."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from method import losses
from method.objective import ForgetObjective, TermTokens, mean_by_example
from options import option


@dataclasses.dataclass(frozen=True)
class Flat(ForgetObjective):
    """FLAT: an f-divergence between a row's other answers and its own is maximised (Wang et al. 2025)."""

    divergence: Literal["kl", "pearson", "total_variation", "jensen_shannon"] = option(
        "total_variation", "the f-divergence"
    )
    prefers: Literal["mismatch", "wanted", "alternative"] = option("wanted", "the draw whose answers are preferred")
    length_normalised = True

    def values(self, tokens):
        preferred = mean_by_example(tokens.preferred, _probability(tokens.preferred))  # (rows,)
        values = losses.flat(preferred[tokens.examples], _probability(tokens), self.divergence)
        return values * tokens.mine


def _probability(tokens: TermTokens) -> torch.Tensor:
    """Return the mean probability of each sequence's tokens, (S,)."""
    return losses.sequence_mean(torch.exp(-tokens.nll), tokens.sequence, tokens.count)
