"""Unlikelihood: each token of an answer is pushed by its probability."""

from __future__ import annotations

import dataclasses

from engine.token_values import TokenLoss
from method import losses
from method.objective import BY_TOKENS, ForgetObjective


class _TokenUnlikelihood(TokenLoss):
    def values(self, logits, targets, original):
        return losses.token_unlikelihood(logits, targets)


@dataclasses.dataclass(frozen=True)
class Unlikelihood(ForgetObjective):
    """-ln(1 - p) of each answer token (Welleck et al. 2020)."""

    token_loss = _TokenUnlikelihood()
    note = BY_TOKENS + "; tokens known by heart have a gradient (earlier versions: none)"
    is_linear = True
