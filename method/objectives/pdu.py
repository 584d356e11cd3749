"""PDU's forget loss: all tokens equally likely where a forget answer stands."""

from __future__ import annotations

import dataclasses

from engine.token_values import TokenLoss
from method import losses
from method.objective import ForgetObjective


class _Margin(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_margin(logits)


@dataclasses.dataclass(frozen=True)
class Margin(ForgetObjective):
    """The squared margin of the largest logit over the mean (Entesari et al. 2025)."""

    token_loss = _Margin()
    is_linear = True
