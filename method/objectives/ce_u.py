"""CE-U: the model learns its own distribution without the forget token."""

from __future__ import annotations

import dataclasses

from engine.token_values import TokenLoss
from method import losses
from method.objective import ForgetObjective


class _CrossEntropyUnlearning(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_ce_u(logits, targets)


@dataclasses.dataclass(frozen=True)
class CeU(ForgetObjective):
    """Cross-entropy from the model's own distribution without the token (Yang 2025). Its gradient is unlikelihood's."""

    token_loss = _CrossEntropyUnlearning()
    is_linear = True
