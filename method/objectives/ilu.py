"""ILU: what is learned stays the best for tasks that have nothing to do with it, so that tuning on them undoes less."""

from __future__ import annotations

import dataclasses

from engine.token_values import TokenLoss
from method import losses
from method.objective import Objective


class _ScaleSlope(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_scale_slope(logits, targets)


@dataclasses.dataclass(frozen=True)
class Invariance(Objective):
    """The squared slope of each sequence's NLL in a scale of its logits (Wang et al. 2025).

    For a draw of rows that have nothing to do with what is forgotten, beside the term that forgets. Each sequence is an
    environment of its own; the published one is a batch, whose penalty this bounds from above.
    """

    token_loss = _ScaleSlope()
    measure = "slope"

    def values(self, tokens):
        return losses.sequence_mean(tokens.values, tokens.sequence, tokens.count).square()
