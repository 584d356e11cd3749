"""SatImp: ascent on the tokens that are neither forgotten nor known by heart."""

from __future__ import annotations

import dataclasses

from method import losses
from method.objective import ForgetObjective
from options import WEIGHT, option


@dataclasses.dataclass(frozen=True)
class SatImp(ForgetObjective):
    """Gradient ascent, each token weighted by p^saturation * (1 - p)^importance (Yang et al. 2025)."""

    saturation: WEIGHT = option(5.0, "power of a token's probability in its weight: forgotten tokens are left alone")
    importance: WEIGHT = option(1.0, "power of 1 - p in its weight: so are those known by heart")

    def values(self, tokens):
        return losses.weighted_ascent(tokens.nll, self.saturation, self.importance)
