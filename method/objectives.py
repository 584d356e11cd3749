"""Objectives: what a term makes of its tokens. Each is settings, a token loss, and a rule for a sequence.

A new objective is a class like these, in a file of its own, and one line in OBJECTIVES. The fields with a help text
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
    """What an objective sees of its term in one batch: M answer tokens of S sequences.

    `nll`, `original_nll` (M,): of the targets, in nats, by the model and by the original. `values` (M,): the token
    loss. `states`, `original_states` (M, D): hidden states at the objective's layer, where the token is predicted.
    `sequence` (M,) in [0, S): whose token it is. `examples` (S,): the row of each sequence. `mine` (S,) bool: sequences
    of this term. `preferred`: the tokens of the term that an objective prefers (`prefers`).
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
        """The same with each sequence's first token alone: is_first (M,) bool."""
        names = ("values", "nll", "original_nll", "states", "original_states", "sequence")
        kept = {name: value[is_first] for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **kept)


class Objective:
    """`values(tokens)` gives what is minimised, (S,) or (M,), to be summed and divided by the term's mean."""

    token_loss: TokenLoss = NLL  # gives TermTokens.values
    measure = "nll"  # what the log shows of the term
    logs_nll = False  # the log shows the NLL of the term's tokens, not the value that is minimised
    better = "falls"  # which way the measure goes in a run that works
    length_normalised = False  # a sequence's value is a mean over its tokens, not a sum
    # What the mean is over, unless the recipe says otherwise. "tokens", for whatever pushes answers away: a sequence
    # counts as many times as it has tokens, so that a weight gives every objective the same gradient at the start.
    over = "sequences"
    original_nll = original_states = False  # what it needs of the original beside its token loss
    layer: int | None = None  # whose hidden states it needs
    prefers: str | None = None  # the draw whose sequences it prefers to its own

    def values(self, tokens: TermTokens) -> torch.Tensor:
        raise NotImplementedError

    @property
    def needs_original(self) -> bool:
        """Whether the original's final states are needed at the term's tokens."""
        return self.original_nll or self.token_loss.needs_original


# ------------------------------------------------------------------------------- towards an answer, or the original
@dataclasses.dataclass(frozen=True)
class Nll(Objective):
    """Mean token NLL of each sequence (Yao et al. 2023, eq. 3): falls as the continuation is learned."""

    def values(self, tokens):
        return losses.random_mismatch(tokens.values, tokens.sequence, tokens.count)


@dataclasses.dataclass(frozen=True)
class Kl(Objective):
    """KL( original || model ) of each token (Yao et al. 2023, eq. 4): 0 where nothing has changed."""

    token_loss = KL
    measure = "kl"
    over = "tokens"

    def values(self, tokens):
        return tokens.values


# --------------------------------------------------------------------------------------------- away from an answer
@dataclasses.dataclass(frozen=True)
class Ascent(Objective):
    """Gradient ascent on the answer (Yao et al. 2023, eq. 2)."""

    ceiling: WEIGHT = option(0.0, "nats: a row whose mean NLL is above it is pushed no further (0: no ceiling)")
    better = "rises"
    logs_nll = True
    over = "tokens"

    def values(self, tokens):
        return losses.gradient_ascent(tokens.nll, tokens.sequence, tokens.count, self.ceiling)


@dataclasses.dataclass(frozen=True)
class Npo(Objective):
    """Negative preference optimisation (Zhang et al. 2024)."""

    beta: number(float, 0, above=True) = option(0.1, "how soon a row that is forgotten is pushed less")
    over = "tokens"
    better = "rises"
    logs_nll = True
    original_nll = True

    def values(self, tokens):
        found = losses.npo(tokens.nll, tokens.original_nll, tokens.sequence, tokens.count, self.beta)
        return found * tokens.mine


@dataclasses.dataclass(frozen=True)
class SimNpo(Objective):
    """SimNPO (Fan et al. 2024): needs no original."""

    beta: number(float, 0, above=True) = option(2.5, "how soon a row that is forgotten is pushed less")
    gamma: WEIGHT = option(0.0, "margin, in nats")
    over = "tokens"
    length_normalised = True
    better = "rises"
    logs_nll = True

    def values(self, tokens):
        return losses.simnpo(tokens.nll, tokens.sequence, tokens.count, self.beta, self.gamma) * tokens.mine


@dataclasses.dataclass(frozen=True)
class Dpo(Objective):
    """Direct preference optimisation (Rafailov et al. 2023): a row's replacement answers are preferred to its own."""

    beta: number(float, 0, above=True) = option(0.1, "how far the model may move from the original")
    prefers = "mismatch"
    over = "tokens"
    better = "rises"
    logs_nll = True
    original_nll = True

    def values(self, tokens):
        rejected = losses.sequence_sum(tokens.nll - tokens.original_nll, tokens.sequence, tokens.count)
        other = tokens.preferred
        gained = losses.sequence_sum(other.nll - other.original_nll, other.sequence, other.count)
        rows = int(tokens.examples.max()) + 1
        by_row = losses.sequence_mean(gained[other.mine], other.examples[other.mine], rows)  # (rows,)
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
    """Hidden states of forget answers are steered to a fixed random direction (Li et al. 2024)."""

    layer: COUNT = option(7, "layer whose output is steered, counted from 0")
    coefficient: number(float, 0, above=True) = option(6.5, "length of the vector that it is steered to")
    direction_seed: COUNT = option(0, "seed of the direction")
    over = "tokens"
    better = "rises"
    logs_nll = True

    def values(self, tokens):
        target = losses.rmu_direction(tokens.states.shape[-1], self.coefficient, self.direction_seed)
        return losses.rmu(tokens.states, target.to(tokens.states.device))


@dataclasses.dataclass(frozen=True)
class StateDistance(Objective):
    """Hidden states stay with the original's (RMU's retain loss, Li et al. 2024)."""

    layer: COUNT = option(7, "layer whose output is held, counted from 0")
    measure = "distance"
    over = "tokens"
    original_states = True

    def values(self, tokens):
        return losses.rmu(tokens.states, tokens.original_states)


OBJECTIVES = {"nll": Nll, "kl": Kl, "ascent": Ascent, "npo": Npo, "simnpo": SimNpo, "dpo": Dpo,
              "unlikelihood": Unlikelihood, "rmu": Rmu, "state_distance": StateDistance}  # fmt: skip
