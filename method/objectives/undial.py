"""UNDIAL: the model learns what the original says, with the logit of each forget token lowered."""

from __future__ import annotations

import dataclasses

from engine.token_values import TokenLoss
from method import losses
from method.objective import ForgetObjective
from options import number, option


@dataclasses.dataclass(frozen=True)
class _AdjustedKl(TokenLoss):
    strength: float
    needs_original = True

    def values(self, logits, targets, original):
        return losses.token_adjusted_kl(logits, targets, original, self.strength)


@dataclasses.dataclass(frozen=True)
class Undial(ForgetObjective):
    """KL to the original with `strength` taken off the logit of each forget token (Dong et al. 2025)."""

    strength: number(float, 0, above=True) = option(
        10.0, "what is taken off a forget token's logit; published: 3 to 30"
    )
    is_linear = True

    @property
    def token_loss(self):
        return _AdjustedKl(self.strength)
