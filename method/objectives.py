"""Objectives: the loss of a term, as settings, a token loss, and values a sequence or token.

A new objective is a class like these, in a file of its own, and one line in OBJECTIVES. Its fields with a help text
are its settings in a recipe's YAML. The formulas are the pure functions of method/losses.py.
"""

from __future__ import annotations

import dataclasses

import torch

from engine.token_values import KL, NLL, TokenLoss
from method import losses
from options import COUNT, WEIGHT, number, option


@dataclasses.dataclass(frozen=True)
class TermTokens:
    """The tokens of a term in one batch, as its objective gets them: M answer tokens; the batch has S sequences.

    `nll`, `original_nll` (M,): NLL of the targets, in nats, under the model and under the original. `values` (M,): the
    token loss. `states`, `original_states` (M, D): hidden states at the objective's layer, at the place that predicts
    each token. `sequence` (M,) in [0, S): each token's sequence. `count`: S. `examples` (S,): example_id of each
    sequence. `mine` (S,) bool: the term's own sequences. `preferred`: the tokens of the term that `prefers` names.
    """

    nll: torch.Tensor
    values: torch.Tensor
    sequence: torch.Tensor
    count: int
    examples: torch.Tensor
    mine: torch.Tensor
    original_nll: torch.Tensor | None = None
    states: torch.Tensor | None = None
    original_states: torch.Tensor | None = None
    preferred: TermTokens | None = None

    def first_only(self, is_first: torch.Tensor) -> TermTokens:
        """Return only the first token of each sequence: is_first (M,) bool."""
        names = ("values", "nll", "original_nll", "states", "original_states", "sequence")
        selected = {name: value[is_first] for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **selected)


class Objective:
    """The base of all objectives. A term sums `values` and divides the sum by its number of sequences or tokens."""

    token_loss: TokenLoss = NLL  # gives TermTokens.values
    measure = "nll"  # name of the value that the log shows for the term
    logs_nll = False  # True: the log shows the NLL of the term's tokens, not the minimised value
    better = "falls"  # direction of the measure in a successful run: "falls" or "rises"
    length_normalised = False  # a sequence's value is a mean over its tokens, not a sum
    # The unit of the mean, unless the recipe sets it. Objectives that unlearn answers use "tokens": a sequence then
    # counts once a token, so that one weight gives each of them the same gradient at the start.
    over = "sequences"
    original_nll = original_states = False  # what it needs from the original beside its token loss
    layer: int | None = None  # the layer whose hidden states it needs
    prefers: str | None = None  # the draw whose answers it prefers to the term's own

    def values(self, tokens: TermTokens) -> torch.Tensor:
        """Return the values to minimise, (S,) or (M,)."""
        raise NotImplementedError

    @property
    def needs_original(self) -> bool:
        """Whether the term's tokens need the original's logits."""
        return self.original_nll or self.token_loss.needs_original


# --------------------------------------------------------------------- towards an answer or the original
@dataclasses.dataclass(frozen=True)
class Nll(Objective):
    """Mean token NLL of each sequence (Yao et al. 2023, eq. 3). It falls as the continuation is learned."""

    def values(self, tokens):
        return losses.random_mismatch(tokens.values, tokens.sequence, tokens.count)


@dataclasses.dataclass(frozen=True)
class Kl(Objective):
    """KL( original || model ) of each token (Yao et al. 2023, eq. 4). It is 0 for an unchanged model."""

    token_loss = KL
    measure = "kl"
    over = "tokens"

    def values(self, tokens):
        return tokens.values


# --------------------------------------------------------------------------------------------- away from an answer
@dataclasses.dataclass(frozen=True)
class Ascent(Objective):
    """Gradient ascent on the answer (Yao et al. 2023, eq. 2)."""

    ceiling: WEIGHT = option(0.0, "nats; an answer whose mean NLL is above it gives no gradient (0: no ceiling)")
    better = "rises"
    logs_nll = True
    over = "tokens"

    def values(self, tokens):
        return losses.gradient_ascent(tokens.nll, tokens.sequence, tokens.count, self.ceiling)


@dataclasses.dataclass(frozen=True)
class Npo(Objective):
    """Negative preference optimisation (Zhang et al. 2024)."""

    beta: number(float, 0, above=True) = option(0.1, "the larger, the sooner the gradient of a forgotten answer fades")
    over = "tokens"
    better = "rises"
    logs_nll = True
    original_nll = True

    def values(self, tokens):
        values = losses.npo(tokens.nll, tokens.original_nll, tokens.sequence, tokens.count, self.beta)
        return values * tokens.mine


@dataclasses.dataclass(frozen=True)
class SimNpo(Objective):
    """SimNPO (Fan et al. 2024); it needs no original."""

    beta: number(float, 0, above=True) = option(2.5, "the larger, the sooner the gradient of a forgotten answer fades")
    gamma: WEIGHT = option(0.0, "margin, in nats")
    over = "tokens"
    length_normalised = True
    better = "rises"
    logs_nll = True

    def values(self, tokens):
        return losses.simnpo(tokens.nll, tokens.sequence, tokens.count, self.beta, self.gamma) * tokens.mine


@dataclasses.dataclass(frozen=True)
class Dpo(Objective):
    """Direct preference optimisation (Rafailov et al. 2023): prefers a row's replacement answers to its own."""

    beta: number(float, 0, above=True) = option(0.1, "the larger, the closer the model stays to the original")
    prefers = "mismatch"
    over = "tokens"
    better = "rises"
    logs_nll = True
    original_nll = True

    def values(self, tokens):
        rejected = losses.sequence_sum(tokens.nll - tokens.original_nll, tokens.sequence, tokens.count)
        other = tokens.preferred
        preferred = losses.sequence_sum(other.nll - other.original_nll, other.sequence, other.count)  # (S,)
        rows = int(tokens.examples.max()) + 1
        by_row = losses.sequence_mean(preferred[other.mine], other.examples[other.mine], rows)  # (rows,)
        return losses.dpo(by_row[tokens.examples], rejected, self.beta) * tokens.mine


class _TokenUnlikelihood(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_unlikelihood(logits, targets)


@dataclasses.dataclass(frozen=True)
class Unlikelihood(Objective):
    """-ln(1 - p) of each answer token (Welleck et al. 2020)."""

    token_loss = _TokenUnlikelihood()
    better = "rises"
    over = "tokens"
    logs_nll = True

    def values(self, tokens):
        return tokens.values


# ------------------------------------------------------------------------------------------------ on hidden states
@dataclasses.dataclass(frozen=True)
class Rmu(Objective):
    """RMU: steers the hidden states of forget answers to a fixed random direction (Li et al. 2024)."""

    layer: COUNT = option(7, "layer whose output is steered, counted from 0")
    coefficient: number(float, 0, above=True) = option(6.5, "length of the vector that the states are steered to")
    direction_seed: COUNT = option(0, "seed of the random direction")
    over = "tokens"
    better = "rises"
    logs_nll = True

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

    def values(self, tokens):
        return losses.rmu(tokens.states, tokens.original_states)


OBJECTIVES = {"nll": Nll, "kl": Kl, "ascent": Ascent, "npo": Npo, "simnpo": SimNpo, "dpo": Dpo,
              "unlikelihood": Unlikelihood, "rmu": Rmu, "state_distance": StateDistance}  # fmt: skip
