"""Objectives: the loss of a term, as settings, a token loss, and values a sequence or token.

A new objective is a class like these, in a file of its own, with an import and an entry in OBJECTIVES. Its fields with
a help text are its settings in a recipe's YAML. The formulas are the pure functions of method/losses.py.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from engine.token_values import KL, TokenLoss
from method import losses
from method.objective import ForgetObjective, Objective
from options import COUNT, WEIGHT, number, option

BY_TOKENS = "divided by the step's answer tokens (earlier versions: by its rows, as with mean_over=sequences)"


# --------------------------------------------------------------------- towards an answer or the original
@dataclasses.dataclass(frozen=True)
class Nll(Objective):
    """Mean token NLL of each sequence (Yao et al. 2023, eq. 3). It falls as the continuation is learned."""

    length_normalised = True
    is_linear = True

    def values(self, tokens):
        return losses.sequence_mean(tokens.values, tokens.sequence, tokens.count)


@dataclasses.dataclass(frozen=True)
class Kl(Objective):
    """KL( original || model ) of each token (Yao et al. 2023, eq. 4). It is 0 for an unchanged model."""

    token_loss = KL
    measure = "kl"
    over = "tokens"
    is_linear = True

    def values(self, tokens):
        return tokens.values


# --------------------------------------------------------------------------------------------- away from an answer
@dataclasses.dataclass(frozen=True)
class Ascent(ForgetObjective):
    """Gradient ascent on the answer (Yao et al. 2023, eq. 2)."""

    ceiling: WEIGHT = option(0.0, "nats; an answer whose mean NLL is above it gives no gradient (0: no ceiling)")
    ceiling_of: Literal["number", "holdout"] = option(
        "number", "holdout: without a ceiling, it is the original's NLL of --holdout_text, text that it never saw"
    )
    back: bool = option(False, "pull an answer that is above the ceiling back to it")

    @property
    def stops_at_holdout(self) -> bool:
        return self.ceiling_of == "holdout" and not self.ceiling

    @property
    def is_linear(self) -> bool:
        return not self.ceiling and not self.stops_at_holdout

    def values(self, tokens):
        return losses.gradient_ascent(tokens.nll, tokens.sequence, tokens.count, self.ceiling, back=self.back)


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
        # means over the other draw's sequences; a selection by a mask would wait for the device
        answers = losses.sequence_sum(other.mine.float(), other.examples, other.num_examples)  # (rows,)
        by_row = losses.sequence_sum(preferred * other.mine, other.examples, other.num_examples) / answers.clamp(min=1)
        return losses.dpo(by_row[tokens.examples], rejected, self.beta) * tokens.mine


class _TokenUnlikelihood(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_unlikelihood(logits, targets)


@dataclasses.dataclass(frozen=True)
class Unlikelihood(ForgetObjective):
    """-ln(1 - p) of each answer token (Welleck et al. 2020)."""

    token_loss = _TokenUnlikelihood()
    note = BY_TOKENS + "; tokens known by heart have a gradient (earlier versions: none)"
    is_linear = True

    def values(self, tokens):
        return tokens.values


# ------------------------------------------------------------------------------------------------ on hidden states
@dataclasses.dataclass(frozen=True)
class Rmu(ForgetObjective):
    """RMU: steers the hidden states of forget answers to a fixed random direction (Li et al. 2024)."""

    layer: COUNT = option(7, "layer whose output is steered, counted from 0")
    coefficient: number(float, 0, above=True) = option(6.5, "length of the vector that the states are steered to")
    direction_seed: COUNT = option(0, "seed of the random direction")
    is_linear = True

    def values(self, tokens):
        target = losses.rmu_direction(tokens.states.shape[-1], self.coefficient, self.direction_seed)
        return losses.rmu(tokens.states, target.to(tokens.states.device))


@dataclasses.dataclass(frozen=True)
class StateDistance(Objective):
    """Distance of hidden states to the original's: RMU's retain loss (Li et al. 2024)."""

    layer: COUNT = option(7, "layer whose output is kept close to the original's, counted from 0")
    measure = "distance"
    over = "tokens"
    original_states = True
    is_linear = True

    def values(self, tokens):
        return losses.rmu(tokens.states, tokens.original_states)


OBJECTIVES = {"nll": Nll, "kl": Kl, "ascent": Ascent, "npo": Npo, "simnpo": SimNpo, "dpo": Dpo,
              "unlikelihood": Unlikelihood, "rmu": Rmu, "state_distance": StateDistance}  # fmt: skip
