"""Weighted gradient ascent: ascent that fades where a token is unlikely already."""

from __future__ import annotations

import dataclasses

from method import losses
from method.objective import ForgetObjective
from options import WEIGHT, option


@dataclasses.dataclass(frozen=True)
class Wga(ForgetObjective):
    """Gradient ascent, each token weighted by p^beta (Wang et al. 2025)."""

    beta: WEIGHT = option(1.0, "power of a token's probability in its weight (0: gradient ascent)")

    def values(self, tokens):
        return losses.weighted_ascent(tokens.nll, self.beta)
