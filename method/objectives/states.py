"""RMU: objectives on hidden states."""

from __future__ import annotations

import dataclasses

from method import losses
from method.objective import ForgetObjective, Objective
from options import COUNT, number, option


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
