"""Objectives of preference: an answer against the original's view of it, or against other answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from method import losses
from method.objective import BY_TOKENS, ForgetObjective, mean_by_example
from options import WEIGHT, number, option


@dataclasses.dataclass(frozen=True)
class Npo(ForgetObjective):
    """Negative preference optimisation (Zhang et al. 2024)."""

    beta: number(float, 0, above=True) = option(0.1, "the larger, the sooner the gradient of a forgotten answer fades")
    note = BY_TOKENS
    original_nll = True

    def values(self, tokens):
        values = losses.npo(tokens.nll, tokens.original_nll, tokens.sequence, tokens.count, self.beta)
        return values * tokens.mine


@dataclasses.dataclass(frozen=True)
class SimNpo(ForgetObjective):
    """SimNPO (Fan et al. 2024); it needs no original."""

    beta: number(float, 0, above=True) = option(2.5, "the larger, the sooner the gradient of a forgotten answer fades")
    gamma: WEIGHT = option(0.0, "margin, in nats")
    length_normalised = True
    note = BY_TOKENS

    def values(self, tokens):
        return losses.simnpo(tokens.nll, tokens.sequence, tokens.count, self.beta, self.gamma) * tokens.mine


@dataclasses.dataclass(frozen=True)
class Dpo(ForgetObjective):
    """Direct preference optimisation (Rafailov et al. 2023): prefers a row's other answers to its own."""

    beta: number(float, 0, above=True) = option(0.1, "the larger, the closer the model stays to the original")
    prefers: Literal["mismatch", "wanted", "alternative"] = option("mismatch", "the draw whose answers are preferred")
    note = BY_TOKENS
    original_nll = True

    def values(self, tokens):
        rejected = losses.sequence_sum(tokens.nll - tokens.original_nll, tokens.sequence, tokens.count)
        other = tokens.preferred
        preferred = losses.sequence_sum(other.nll - other.original_nll, other.sequence, other.count)  # (S,)
        by_row = mean_by_example(other, preferred)  # (rows,)
        return losses.dpo(by_row[tokens.examples], rejected, self.beta) * tokens.mine
